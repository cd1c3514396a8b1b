"""Checkpoints: whole or not at all, broken ones skipped, old ones deleted but for the kept."""

import logging
import os

import pytest
import torch

from dinogen.training.checkpointing import checkpoint as module
from dinogen.training.checkpointing.checkpoint import (
    load_checkpoint,
    newest_checkpoint,
    on_host,
    prune,
    save_checkpoint,
)


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
