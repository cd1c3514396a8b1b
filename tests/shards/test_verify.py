"""Each kind of damage is found and named, and a wrong index is made again."""

from __future__ import annotations

import io
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from launch.cli.shards import app
from shards import Sample, open_dataset, pack
from shards.check.adopt import adopt
from shards.check.repair import rebuild_indexes, repair
from shards.check.verify import verify
from shards.errors import IndexFileError, ManifestError, PackError, ShardsError
from shards.format.index import load, save
from shards.format.sample import encode

from .damaged import Flip, change_manifest, place, problems_of


def test_a_sound_dataset_has_no_problems(packed: Path):
    counts: list[int] = []
    assert verify(open_dataset(packed), counts.append) == []
    assert sum(counts) == 61


@pytest.mark.parametrize("suffix", ["json", "p4.npy", "p8.npy", "p16.npy"])
def test_a_flipped_bit_names_the_member(copy: Path, flip: Flip, suffix: str):
    key, offset, size = place(copy, "train-00002", 3, suffix)
    for position in (offset, offset + size // 2, offset + size - 1):
        flip(copy / "train-00002.tar", position)
        (problem,) = problems_of(copy)
        assert (problem.shard, problem.key, problem.member) == ("train-00002.tar", key, suffix)
        flip(copy / "train-00002.tar", position)
    assert problems_of(copy) == []


def test_a_flipped_bit_in_a_header_is_found(copy: Path, flip: Flip):
    key, offset, _ = place(copy, "train-00001", 4, "p4.npy")
    for position in (offset - 128 + 20, offset - 128 - 512 + 3):
        flip(copy / "train-00001.tar", position)
        found = problems_of(copy)
        assert any(p.shard == "train-00001.tar" and p.key == key for p in found), found
        flip(copy / "train-00001.tar", position)


def test_a_cut_off_tar_names_every_lost_sample(copy: Path):
    tar = copy / "train-00001.tar"
    _, offset, _ = place(copy, "train-00001", 5, "p16.npy")
    tar.write_bytes(tar.read_bytes()[: offset + 10])
    found = problems_of(copy)
    assert all(problem.shard == tar.name for problem in found)
    index = load(copy / "train-00001.index.npz")
    assert {p.key for p in found if "cut off before" in p.what} == {
        index.key(row) for row in range(5, len(index))
    }
    assert any(f"{tar.stat().st_size} of {index.num_bytes} bytes" in p.what for p in found)


def test_a_missing_shard_is_named(copy: Path):
    (copy / "val-00000.tar").unlink()
    (problem,) = problems_of(copy)
    assert (problem.shard, problem.what) == ("val-00000.tar", "the shard is missing")


@pytest.mark.parametrize(
    "change, what",
    [
        (
            lambda m: m["shards"][1].update(sha256="0" * 64),
            "different checksum for train-00001.tar",
        ),
        (lambda m: m["levels"]["p4"].update(total_variance=9.0), "total_variance of p4"),
        (lambda m: m["statistics"].update(sha256="0" * 64), "differs from the manifest"),
        (lambda m: m.update(image_size=64), "is 32x32, expected 64"),
    ],
)
def test_a_wrong_manifest_is_found(copy: Path, change, what: str):
    change_manifest(copy, change)
    found = problems_of(copy)
    assert found
    assert all(what in problem.what for problem in found), found


def test_a_manifest_whose_numbers_do_not_add_up_is_refused(copy: Path):
    change_manifest(copy, lambda m: m["shards"][0].update(num_samples=3))
    with pytest.raises(ManifestError, match="contradict its list"):
        open_dataset(copy)
    assert repair(copy)
    assert problems_of(copy) == []
    change_manifest(copy, lambda m: m.update(colour="red"))
    with pytest.raises(ManifestError, match="colour"):
        open_dataset(copy)


@pytest.mark.parametrize("change", ["offsets", "sums", "other", "missing", "rubbish"])
def test_a_wrong_index_is_found_and_rebuilt(copy: Path, change: str):
    path = copy / "train-00000.index.npz"
    before = path.read_bytes()
    index = load(path)
    if change == "missing":
        path.unlink()
    elif change == "rubbish":
        path.write_bytes(b"rubbish")
    elif change == "other":
        path.write_bytes((copy / "train-00001.index.npz").read_bytes())
    else:
        getattr(index, change)[2, 0] += 8
        save(index, path)
    found = problems_of(copy)
    assert [problem.shard for problem in found] == [path.name]
    assert rebuild_indexes(copy) == [f"{path.name}: rebuilt"]
    assert path.read_bytes() == before
    assert rebuild_indexes(copy) == []


def test_indexes_are_not_rebuilt_from_a_damaged_tar(copy: Path, flip: Flip):
    flip(copy / "train-00000.tar", 5000)
    with pytest.raises(IndexFileError, match=r"train-00000\.tar is missing or differs"):
        rebuild_indexes(copy)


def test_a_wrong_shape_is_found(copy: Path, samples: list[Sample]):
    """A tar written by somebody else over a packed one, with one array too narrow."""
    import webdataset

    tar = copy / "train-00000.tar"
    by_key = {sample.key: sample for sample in samples}
    index = load(copy / "train-00000.index.npz")
    keys = [index.key(row) for row in range(len(index))]
    with webdataset.TarWriter(str(tar)) as writer:
        for key in keys:
            members = encode(by_key[key])
            if key == keys[3]:
                narrow = Sample(key, b"", "jpg", {}, {"p4": np.zeros((16, 2), np.float16)})
                members["p4.npy"] = encode(narrow)["p4.npy"]
            writer.write({"__key__": key, **members})
    found = problems_of(copy)
    assert any(
        (p.shard, p.key, p.member) == (tar.name, keys[3], "p4.npy") and "(16, 2)" in p.what
        for p in found
    ), found


def test_strangers_are_named(copy: Path):
    shutil.copy(copy / "val-00000.tar", copy / "old.tar")
    (problem,) = problems_of(copy)
    assert (problem.shard, problem.what) == ("old.tar", "is not in manifest.json")


def test_an_image_that_was_broken_before_packing_is_found(tmp_path: Path, samples: list[Sample]):
    from dataclasses import replace

    jpg = next(s for s in samples if s.image_format == "jpg")
    cut = replace(jpg, key="cut", image=jpg.image[:-200] + b"\xff\xd9")
    with pytest.raises(PackError, match=r"cut\.jpg: truncated: .*premature end"):
        pack([jpg, cut], tmp_path / "x")
    # Others pack it all the same.
    folder = tmp_path / "y"
    folder.mkdir()
    with tarfile.open(folder / "train-0.tar", "w") as tar:
        for sample in (jpg, cut):
            info = tarfile.TarInfo(f"{sample.key}.jpg")
            info.size = len(sample.image)
            tar.addfile(info, io.BytesIO(sample.image))
    adopt(folder)
    (problem,) = problems_of(folder)
    assert (problem.key, problem.member) == ("cut", "jpg")


def test_command_verify(copy: Path, flip: Flip):
    run = CliRunner().invoke
    fine = run(app, ["verify", str(copy)])
    assert fine.exit_code == 0, fine.output
    assert "61 samples" in fine.output
    key, offset, _ = place(copy, "train-00000", 1, "p4.npy")
    flip(copy / "train-00000.tar", offset)
    bad = run(app, ["verify", str(copy)], env={"COLUMNS": "200"})
    assert bad.exit_code == 1
    assert "train-00000.tar" in bad.output
    assert key in bad.output
    refused = run(app, ["repair", str(copy)], input="n\n")
    assert refused.exit_code == 1
    assert run(app, ["verify", str(copy)]).exit_code == 1
    repaired = run(app, ["repair", str(copy), "--yes"])
    assert "7 samples, 1 lost" in repaired.output
    assert run(app, ["verify", str(copy)]).exit_code == 0


def test_command_ls_and_index(copy: Path):
    run = CliRunner().invoke
    listed = run(app, ["ls", str(copy)], env={"COLUMNS": "200"}).output
    for text in ("train-00000.tar", "p16", "16x16", "32x32", "name=noise, random=True"):
        assert text in listed
    assert "all indexes fit" in run(app, ["index", str(copy)]).output
    (copy / "val-00000.index.npz").unlink()
    assert "val-00000.index.npz: rebuilt" in run(app, ["index", str(copy)]).output
    missing = run(app, ["ls", str(copy / "nothing")])
    assert isinstance(missing.exception, ShardsError)
