"""Checkpoints: whole or not at all, broken ones skipped, old ones deleted but for the kept."""

import logging
import os
import time

import pytest
import torch

from dinogen.training import data as data_module
from dinogen.training.checkpointing import checkpoint as module
from dinogen.training.checkpointing.checkpoint import (
    NewestCheckpoints,
    load_checkpoint,
    newest_checkpoint,
    on_host,
    prune,
    save_checkpoint,
)
from dinogen.training.run import train


def save(parent, nimg, **state):
    torch.manual_seed(nimg)
    weights = torch.randn(5, 3)
    tensors = on_host({"G": {"a": weights, "a_view": weights[1:]}})
    return save_checkpoint(parent, nimg, tensors, state)


def test_it_comes_back_bit_for_bit(tmp_path):
    folder = save(tmp_path, 7, progress={"nimg": 7})
    torch.manual_seed(7)
    expected = torch.randn(5, 3)
    found = load_checkpoint(folder)
    assert folder.name == "000000007"
    assert found.state["progress"] == {"nimg": 7}
    assert torch.equal(found.tensors("G")["a"], expected)
    assert torch.equal(found.tensors("G")["a_view"], expected[1:])


def test_colleagues_may_read_it_as_the_umask_says(tmp_path):
    before = os.umask(0o027)
    try:
        folder = save(tmp_path, 7)
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in folder.iterdir()}
    assert modes == {"G.safetensors": 0o640, "state.json": 0o640}


@pytest.mark.parametrize("damage", ["flip", "cut", "no weights", "no state", "half a state"])
def test_a_broken_one_is_skipped_with_a_warning(tmp_path, damage, caplog):
    good, bad = save(tmp_path, 100), save(tmp_path, 200)
    weights, state = bad / "G.safetensors", bad / "state.json"
    if damage == "flip":
        data = bytearray(weights.read_bytes())
        data[-1] ^= 1
        weights.write_bytes(data)
    elif damage == "cut":
        weights.write_bytes(weights.read_bytes()[:-8])
    elif damage == "no weights":
        weights.unlink()
    elif damage == "no state":
        state.unlink()
    else:
        state.write_text(state.read_text()[:20])
    with caplog.at_level(logging.WARNING):
        found = newest_checkpoint(tmp_path)
    assert found is not None and found.folder == good
    assert str(bad) in caplog.text


def test_a_save_that_fails_leaves_no_checkpoint(tmp_path, monkeypatch):
    save(tmp_path, 100)

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "write_json", full)
    with pytest.raises(OSError, match="No space"):
        save(tmp_path, 200)
    monkeypatch.undo()
    assert newest_checkpoint(tmp_path).folder.name == "000000100"
    prune(tmp_path, keep_last=1)
    assert [p.name for p in tmp_path.iterdir()] == ["000000100"]


def test_prune_keeps_the_newest_and_the_kept(tmp_path):
    for nimg in range(1, 8):
        save(tmp_path, nimg, keep=nimg in (2, 4))
    prune(tmp_path, keep_last=2)
    assert sorted(int(p.name) for p in tmp_path.iterdir()) == [2, 4, 6, 7]


def test_nothing_there(tmp_path):
    assert newest_checkpoint(tmp_path / "none") is None


@pytest.fixture
def hashed(monkeypatch):
    """The files that are hashed from now on, each as often as it is."""
    found = []
    plain = module.sha256_file
    monkeypatch.setattr(module, "sha256_file", lambda path: found.append(path) or plain(path))
    return found


def save_of_a_run(parent, nimg):
    state = {
        "progress": {"nimg": nimg, "step": 1, "num_worse": 0},
        "start": 0,
        "config": {},
        "data": "",
        "engine": {},
        "logger": {"sums": {}, "weights": {}},
        "facts": {},
        "versions": {"dinogen": "0.1.0"},
    }
    return save(parent, nimg, **state)


def test_the_newest_is_hashed_again_only_if_a_file_has_changed(tmp_path, hashed, caplog):
    parent = tmp_path / "8x8/checkpoints"
    old, new = save_of_a_run(parent, 100), save_of_a_run(parent, 200)
    hashed.clear()
    newest = NewestCheckpoints(tmp_path)
    assert newest.of(8).folder == newest.of(8).folder == new
    assert hashed == [new / "G.safetensors"]

    weights, before = new / "G.safetensors", (new / "G.safetensors").stat()
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    time.sleep(0.02)  # a file system counts time in ticks
    weights.write_bytes(data)
    os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))  # as a careful copy leaves it
    assert newest.of(8).folder == old
    assert f"{new} is broken and skipped" in caplog.text

    hashed.clear()
    assert newest.of(8).folder == old
    assert hashed == []
    third = save_of_a_run(parent, 300)
    assert newest.of(8).folder == third


def test_a_resumed_run_opens_its_data_once_and_hashes_each_file_once(
    make_config, monkeypatch, hashed
):
    train(make_config(), 4)
    train(make_config("stages.1.kimg=0.12"))
    opened = []
    plain = data_module.open_dataset
    monkeypatch.setattr(
        data_module, "open_dataset", lambda *args: opened.append(args) or plain(*args)
    )
    before = set(make_config().run.rglob("*.safetensors"))
    hashed.clear()
    longer = train(make_config())
    assert [result["nimg"] for result in longer] == [80, 240]
    assert len(opened) == 1
    read = [path for path in hashed if path in before]
    assert {path.parts[-4:-2] for path in read} >= {("4x4", "checkpoints"), ("8x8", "checkpoints")}
    assert len(read) == len(set(read))
