"""Part files of pyramids: what is in them, who makes which, and what survives a kill."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open

from dinogen.config import GuideConfig
from dinogen.distributed import process_group
from dinogen.features import load_guide, native_pyramid, pooled_pyramid
from dinogen.features.dinov2 import make_random_dinov2
from dinogen.prepare.parts import PartFiles, write_pyramids
from dinogen.prepare.photos.read import PrepareError, decode_photo
from dinogen.prepare.pyramid import PyramidMaker
from tests.forked import torchrun
from tests.prepare.counting_guide import (
    CONFIG,
    CPU,
    Counting,
    as_an_older_version_wrote_it,
    names_in,
    random_photo,
    same,
    whole,
)

NUM_FACES = 8


@pytest.fixture
def guide(checkpoint):
    return Counting(load_guide(GuideConfig(path=str(checkpoint)), CPU))


@pytest.fixture
def make(guide):
    return lambda **changes: PyramidMaker(guide, CONFIG.model_copy(update=changes), CPU)


@pytest.fixture
def faces(tmp_path):
    folder = tmp_path / "faces"
    folder.mkdir()
    for number in range(NUM_FACES):
        (folder / f"f{number}.jpg").write_bytes(random_photo(number, file_format="JPEG"))
    return folder


def test_levels_are_those_of_each_photo_alone(faces, tmp_path, make, guide):
    write_pyramids(faces, tmp_path / "out", make())
    found = whole(tmp_path / "out")
    assert {name for _, name in found} == {"p4", "p8", "p16", "n4", "n8", "n16"}
    for number in range(NUM_FACES):
        pixels = np.asarray(Image.open(faces / f"f{number}.jpg")).astype(np.float32)
        images = torch.from_numpy(pixels).permute(2, 0, 1)[None] / 127.5 - 1
        pooled = pooled_pyramid(guide, images, (4, 8, 16))
        native = native_pyramid(guide, images, (4, 8, 16))
        for grid in (4, 8, 16):
            for name, levels in ((f"p{grid}", pooled), (f"n{grid}", native)):
                array = found[f"f{number}", name]
                assert array.dtype == np.float16 and array.shape == (grid * grid, 16)
                np.testing.assert_allclose(array, levels[grid][0], rtol=1e-3, atol=1e-4)


def test_parts_follow_the_keys_and_kinds_and_grids_the_config(faces, tmp_path, make):
    summary = write_pyramids(faces, tmp_path / "out", make(kinds=("native",), grids=(8,)))
    assert (summary.num_parts, summary.num_done, summary.num_kept) == (3, 3, 0)
    names = [f"part-{number:05d}.safetensors" for number in range(3)]
    assert names_in(tmp_path / "out") == names
    parts = PartFiles(tmp_path / "out")
    assert parts.keys() == {f"f{number}" for number in range(NUM_FACES)}
    assert {key: array.shape for key, array in parts.levels("f7").items()} == {"n8": (64, 16)}
    assert parts.guide["random"] is True


def test_a_second_run_computes_nothing(faces, tmp_path, make, guide):
    out = tmp_path / "out"
    write_pyramids(faces, out, make())
    times = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    num_before = guide.num_photos
    seen = []
    summary = write_pyramids(
        faces, out, make(), progress=lambda done, total: seen.append((done, total))
    )
    assert (summary.num_done, summary.num_kept) == (0, 3)
    assert guide.num_photos == num_before
    assert times == {path: path.stat().st_mtime_ns for path in out.iterdir()}
    assert seen == [(3, 8), (6, 8), (8, 8)]


class Killed(BaseException):
    pass


@pytest.mark.parametrize("after", [0, 1, 3, 4, 6, 7])
def test_after_an_interruption_at_most_one_part_is_made_again(faces, tmp_path, make, guide, after):
    write_pyramids(faces, tmp_path / "whole", make())

    def kill(done, total):
        if done > after:
            raise Killed

    out = tmp_path / "out"
    with pytest.raises(Killed):
        write_pyramids(faces, out, make(), progress=kill)
    (out / ".part-00001.safetensors.77.tmp").write_bytes(b"left by SIGKILL")
    num_whole = sum(not path.name.startswith(".") for path in out.iterdir())
    assert num_whole in (after // 3, after // 3 + 1)
    summary = write_pyramids(faces, out, make())
    assert (summary.num_kept, summary.num_done) == (num_whole, 3 - num_whole)
    assert same(whole(out), whole(tmp_path / "whole"))
    assert len(list(out.iterdir())) == 3


def test_ranks_share_the_parts_and_together_make_the_same(faces, tmp_path, make, monkeypatch):
    write_pyramids(faces, tmp_path / "one", make())
    out = tmp_path / "two"
    made = []
    for rank in (1, 0):
        monkeypatch.setattr(process_group, "rank", lambda rank=rank: rank)
        monkeypatch.setattr(process_group, "world_size", lambda: 2)
        before = set(names_in(out)) if out.exists() else set()
        summary = write_pyramids(faces, out, make())
        made.append(sorted(set(names_in(out)) - before))
        assert summary.num_done == len(made[-1])
    assert made == [
        ["part-00001.safetensors"],
        ["part-00000.safetensors", "part-00002.safetensors"],
    ]
    assert same(whole(out), whole(tmp_path / "one"))


def test_a_rank_reads_its_own_faces_alone(faces, tmp_path, make, monkeypatch):
    read = []
    monkeypatch.setattr(
        "dinogen.prepare.faces.folder.decode_photo",
        lambda path, most: (read.append(path.stem), decode_photo(path, most))[1],
    )
    monkeypatch.setattr(process_group, "rank", lambda: 1)
    monkeypatch.setattr(process_group, "world_size", lambda: 2)
    write_pyramids(faces, tmp_path / "out", make())
    assert read == ["f3", "f4", "f5"]


def test_the_folder_of_the_faces_is_refused(faces, make):
    before = names_in(faces)
    for out in (faces, faces / "pyramids"):
        with pytest.raises(PrepareError, match="is below the faces in"):
            write_pyramids(faces, out, make())
    assert names_in(faces) == before


def test_two_real_ranks_from_the_command_line(faces, tmp_path, make, checkpoint):
    script = tmp_path / "command.py"
    script.write_text(
        "import typer\nfrom launch.cli import prepare as data\n"
        "app = typer.Typer()\ndata.register(app)\napp()\n"
    )
    config = tmp_path / "c.yaml"
    config.write_text(f"guide: {{path: {checkpoint}}}\nprepare: {{pyramids: {{batch: 2}}}}\n")
    words = ("pyramids", faces, tmp_path / "out", "-c", config, "prepare.pyramids.shard_size=3")
    done = torchrun(2, script, *words, timeout=280, CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("RANDOM guide") == 1, "rank 0 alone says it, loudly"
    write_pyramids(faces, tmp_path / "here", make())
    assert same(whole(tmp_path / "out"), whole(tmp_path / "here"))


def changed_guide(make, tmp_path):
    folder = tmp_path / "other"
    make_random_dinov2(folder, seed=4, hidden_size=16, num_layers=1, num_heads=2, image_size=56)
    return PyramidMaker(load_guide(GuideConfig(path=str(folder)), CPU), CONFIG, CPU)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("guide", r"guide: RANDOM guide \(dinov2\) layer 1, now"),
        ("grids", r"prepare\.pyramids\.grids: \[4, 8, 16\], now \[4\]"),
        ("shard_size", r"prepare\.pyramids\.shard_size: 3, now 4"),
        ("other pixels", r"part-00000.safetensors: .*the faces have changed"),
        ("other names", r"part-00000.safetensors: .*8 of 8 faces are not in FACES"),
        ("older", r"part-00001.safetensors: .*the faces have changed"),
    ],
)
def test_pyramids_of_something_else_are_never_mixed(faces, tmp_path, make, change, message):
    out = tmp_path / "out"
    write_pyramids(faces, out, make())
    before = {path: path.read_bytes() for path in out.iterdir()}
    maker = make()
    if change == "guide":
        maker = changed_guide(make, tmp_path)
    elif change == "grids":
        maker = make(grids=(4,))
    elif change == "shard_size":
        maker = make(shard_size=4)
    elif change == "other pixels":
        for number in range(NUM_FACES):
            (faces / f"f{number}.jpg").write_bytes(random_photo(50 + number, file_format="JPEG"))
    elif change == "other names":
        for number in range(NUM_FACES):
            (faces / f"f{number}.jpg").rename(faces / f"g{number}.jpg")
    else:
        before = as_an_older_version_wrote_it(out)
        shutil.copy(faces / "f0.jpg", faces / "f4.jpg")
    with pytest.raises(PrepareError, match=message):
        write_pyramids(faces, out, maker)
    assert before == {path: path.read_bytes() for path in out.iterdir()}


@pytest.mark.parametrize("damage", ["cut", "header", "empty"])
def test_a_damaged_part_is_named_and_made_again(faces, tmp_path, make, caplog, damage):
    out = tmp_path / "out"
    write_pyramids(faces, out, make())
    expected = whole(out)
    path = out / "part-00001.safetensors"
    data = path.read_bytes()
    path.write_bytes({"cut": data[:-10], "header": b"\xff" * 8 + data[8:], "empty": b""}[damage])
    with pytest.raises(PrepareError, match=r"part-00001.safetensors: damaged .*delete it and run"):
        PartFiles(out)
    summary = write_pyramids(faces, out, make())
    assert (summary.num_done, summary.num_kept) == (1, 2)
    assert "part-00001.safetensors" in caplog.text
    assert same(whole(out), expected)


def test_parts_that_do_not_belong_together_are_refused(faces, tmp_path, make):
    write_pyramids(faces, tmp_path / "a", make())
    write_pyramids(faces, tmp_path / "b", make(kinds=("pooled",)))
    shutil.copy(tmp_path / "b" / "part-00001.safetensors", tmp_path / "a")
    with pytest.raises(PrepareError, match=r"part-00001.safetensors: differs .*kinds"):
        PartFiles(tmp_path / "a")


def test_the_header_is_plain_json(faces, tmp_path, make):
    write_pyramids(faces, tmp_path / "out", make())
    with safe_open(tmp_path / "out" / "part-00000.safetensors", "numpy") as file:
        header = json.loads(file.metadata()["dinogen"])
        assert header["keys"] == ["f0", "f1", "f2"]
        assert sorted(file.keys()) == sorted(
            f"{key}/{name}"
            for key in header["keys"]
            for name in ("p4", "p8", "p16", "n4", "n8", "n16")
        )
