"""Tars that others made, whole and damaged: read as webdataset reads them, and nothing is lost."""

from __future__ import annotations

import gzip
import io
import logging
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset
from typer.testing import CliRunner

from launch.cli.shards import app
from shards import open_dataset
from shards.check.repair import plan_repair, repair
from shards.errors import ManifestError, ShardsError
from shards.format.index import load
from shards.format.scan import scan
from shards.format.tar import walk

from .conftest import jpeg
from .tar_fuzz import nothing_is_lost, same_as_webdataset
from .tars import by_webdataset, skip_without

Members = dict[str, bytes]


def put(tar: tarfile.TarFile, name: str, data: bytes, **facts: object) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for fact, value in facts.items():
        setattr(info, fact, value)
    tar.addfile(info, io.BytesIO(data))


def make(folder: Path, members: list[tuple[str, bytes]], name: str = "train-0.tar") -> Path:
    folder.mkdir(exist_ok=True)
    with tarfile.open(folder / name, "w") as tar:
        for member, data in members:
            put(tar, member, data)
    return folder / name


def photos(count: int, size: int = 16) -> list[tuple[str, bytes]]:
    return [(f"{i:03d}.jpg", jpeg(i, size)) for i in range(count)]


def run(*words: object) -> tuple[int, str]:
    """Exit status and all that a command prints; errors as the command line prints them."""
    result = CliRunner().invoke(app, [str(word) for word in words])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        assert isinstance(result.exception, ShardsError), result.exception
        return 1, result.output + str(result.exception)
    return result.exit_code, result.output


@pytest.mark.parametrize("program", ["gnu", "bsdtar", "tarfile", "webdataset"])
@pytest.mark.parametrize("seed", range(5))
def test_what_webdataset_yields_dinogen_yields(tmp_path: Path, program: str, seed: int):
    skip_without(program)
    same_as_webdataset(seed, tmp_path, program)


@pytest.mark.parametrize("seed", range(12))
def test_damage_loses_no_sample_in_silence(tmp_path: Path, seed: int):
    nothing_is_lost(seed, tmp_path)


@pytest.mark.parametrize("kind", [b"1", b"2", b"3", b"4", b"5", b"6", b"V", b"M", b"D", b"Z", b"N"])
def test_what_is_no_file_is_skipped(tmp_path: Path, kind: bytes):
    images = photos(4)
    path = tmp_path / "train-0.tar"
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar:
        for number, (name, data) in enumerate(images):
            put(tar, name, data)
            if number == 1:
                put(
                    tar,
                    "x.jpg",
                    b"y" * 700 if kind in b"DZ" else b"",
                    type=kind,
                    linkname="000.jpg",
                )
    assert [key for key, _ in by_webdataset(path)] == ["000", "001", "002", "003"]
    assert scan(path, with_sums=True).keys.tolist() == [b"000", b"001", b"002", b"003"]
    assert run("verify", tmp_path)[0] == 0
    before = path.read_bytes()
    assert run("repair", tmp_path, "-y")[0] == 0
    assert path.read_bytes() == before
    assert not list(tmp_path.glob("*.before-repair"))


def test_a_file_of_8_gib_takes_its_size_from_the_pax_header(tmp_path: Path):
    path, size = tmp_path / "a.tar", 9 << 30
    header = tarfile.TarInfo("big.bin")
    header.size = size
    after = tarfile.TarInfo("a.jpg")
    after.size = 3
    for form in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):
        with path.open("wb") as file:
            file.write(header.tobuf(form))
            file.seek(size, os.SEEK_CUR)  # a hole: the disk need not have the room
            file.write(after.tobuf() + b"jpg".ljust(512, b"\0") + bytes(1024))
        with path.open("rb") as file:
            found = [(member.name, member.size) for member in walk(file.fileno())]
        assert found == [("big.bin", size), ("a.jpg", 3)]


def test_a_global_header_names_all_files_behind_it(tmp_path: Path):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w", pax_headers={"path": "x/all.jpg"}) as tar:
        put(tar, "a.jpg", b"1")
    assert [m["fname"] for m in webdataset.tariterators.tar_file_iterator(path.open("rb"))] == [
        "x/all.jpg"
    ]
    with path.open("rb") as file:
        assert [member.name for member in walk(file.fileno())] == ["x/all.jpg"]


@pytest.mark.parametrize("damage", ["zeroed", "joined", "cut", "header"])
def test_what_lies_behind_damage_is_named_and_kept(tmp_path: Path, damage: str):
    path = make(tmp_path, photos(6))
    data = bytearray(path.read_bytes())
    with path.open("rb") as file:
        at = [member.offset - 512 for member in walk(file.fileno())]
    lost = 1
    if damage == "zeroed":
        data[at[2] : at[2] + 512] = bytes(512)
    elif damage == "header":
        data[at[2] + 3] ^= 1
    elif damage == "cut":
        del data[at[5] + 600 :]
    else:
        (tmp_path / "other").mkdir()
        data += make(tmp_path / "other", [("more.jpg", jpeg(9, 16))]).read_bytes()
        lost = 0
    path.write_bytes(data)
    status, said = run("verify", tmp_path)
    assert (status, "dinogen shards verify" in said) == (1, False)
    wanted = {
        "zeroed": "zeroed block", "header": "perhaps that of", "cut": "005.jpg is cut off",
        "joined": "joined by cat",
    }  # fmt: skip
    assert wanted[damage] in said
    for command in ("index", "ls"):
        assert run(command, tmp_path)[0] == 1
    before = {file.name: file.read_bytes() for file in tmp_path.glob("*.*")}
    if lost and damage != "cut":
        status, said = run("repair", tmp_path)
        assert status in (0, 1)
    plan = plan_repair(tmp_path)
    assert plan.rewrites
    assert {file.name: file.read_bytes() for file in tmp_path.glob("*.*")} == before
    status, said = run("repair", tmp_path, "--yes")
    assert (status, "shards repair" in said) == (0, False)
    assert (tmp_path / "train-0.tar.before-repair").read_bytes() == data
    assert len(open_dataset(tmp_path).keys()) == 6 - lost + (damage == "joined")
    assert run("verify", tmp_path)[0] == 0


def test_repair_loses_nothing_unless_told_and_never_overwrites_what_it_kept(tmp_path: Path):
    path = make(tmp_path, [*photos(3), ("bad.jpg", b"no image")])
    damaged = path.read_bytes()
    status, said = run("repair", tmp_path)
    assert status == 1
    assert "3 samples, 1 will be lost" in said
    assert "bad: jpg: " in said
    assert [file.name for file in tmp_path.iterdir()] == ["train-0.tar"]
    (tmp_path / "train-0.tar.before-repair").write_bytes(b"of an earlier repair")
    assert run("repair", tmp_path, "-y")[0] == 0
    assert (tmp_path / "train-0.tar.before-repair").read_bytes() == b"of an earlier repair"
    assert (tmp_path / "train-0.tar.before-repair-2").read_bytes() == damaged
    assert open_dataset(tmp_path).keys() == ["000", "001", "002"]


def test_a_tar_without_one_sound_sample_is_set_aside_beside_the_others(tmp_path: Path):
    make(tmp_path, photos(3))
    path = make(tmp_path, [("bad.jpg", b"no image")], "train-1.tar")
    damaged = path.read_bytes()
    assert run("repair", tmp_path)[0] == 1
    assert path.exists()
    assert run("repair", tmp_path, "-y")[0] == 0
    assert (tmp_path / "train-1.tar.before-repair").read_bytes() == damaged
    assert run("verify", tmp_path)[0] == 0
    (tmp_path / "train-0.tar").unlink()
    with pytest.raises(ManifestError, match="no sample of the train split is left"):
        repair(tmp_path, allow_loss=True)


def test_a_missing_shard_leaves_the_manifest_only_when_told(copy: Path):
    (copy / "train-00003.tar").unlink()
    before = (copy / "manifest.json").read_bytes()
    with pytest.raises(ManifestError, match="8 samples would be lost"):
        repair(copy)
    assert (copy / "manifest.json").read_bytes() == before
    repair(copy, allow_loss=True)
    assert (copy / "manifest.json.before-repair").read_bytes() == before
    assert (copy / "train-00003.index.npz.before-repair").exists()


WRONG = {
    "gz": (gzip.compress(b"x" * 2000), "compressed by gzip; unpack it: `mv train-0.tar"),
    "zip": (b"PK\x03\x04" + bytes(600), "a zip archive"),
    "html": (b"<!DOCTYPE html><html>" + b" " * 600, "web page"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
    "empty": (b"", "is empty"),
    "jpeg": (jpeg(0), "is a JPEG image"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_what_is_no_tar_is_said_and_left_alone(tmp_path: Path, kind: str):
    data, words = WRONG[kind]
    path = tmp_path / "train-0.tar"
    path.write_bytes(data)
    for command in ("verify", "index", "ls", "repair"):
        status, said = run(command, tmp_path, *(["-y"] if command == "repair" else []))
        assert (status, words in said, "dinogen shards" in said) == (1, True, False), said
    assert path.read_bytes() == data
    assert [file.name for file in tmp_path.iterdir()] == ["train-0.tar"]


@pytest.mark.parametrize(
    "names, words",
    [
        (["a.tar.gz", "b.tar.gz"], "`gunzip *.tar.gz`"),
        (["a.tgz"], "`gunzip *.tgz`"),
        (["a.tar.zst"], "`unzstd --rm *.tar.zst`"),
        (["sub/a.tar"], "its folder sub does"),
        (["A.TAR"], "rename A.TAR to A.tar"),
        (["._a.tar"], "neither manifest.json nor any .tar"),
    ],
)
def test_a_folder_without_plain_tars_says_what_it_holds(tmp_path: Path, names, words: str):
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    for command in ("verify", "index", "ls", "repair"):
        status, said = run(command, tmp_path)
        assert (status, words in said) == (1, True), said


def test_compressed_tars_beside_plain_ones_are_said(tmp_path: Path, caplog):
    make(tmp_path, photos(2))
    (tmp_path / "b.tar.gz").write_bytes(b"x")
    with caplog.at_level(logging.WARNING):
        assert open_dataset(tmp_path).num_samples() == 2
    assert "1 compressed tars are not read" in caplog.text


@pytest.mark.parametrize("place", [5, 9])
def test_a_sample_whose_only_header_is_damaged_counts_as_lost(tmp_path: Path, place: int) -> None:
    tar = make(tmp_path / "data", photos(10))
    with tarfile.open(tar) as archive:
        header = archive.getmembers()[place].offset
    data = bytearray(tar.read_bytes())
    data[header + 100] ^= 1
    tar.write_bytes(data)
    status, output = run("repair", tar.parent)
    assert status == 1 and "1 sample would be lost" in output, output
    assert tar.read_bytes() == data
    status, output = run("repair", tar.parent, "--yes")
    assert status == 0 and "rewritten with 9 samples, 1 lost" in output, output


def test_joined_tars_are_repaired_without_a_loss(tmp_path: Path) -> None:
    tar = make(tmp_path / "data", photos(3))
    other = make(tmp_path / "other", [(f"b{name}", data) for name, data in photos(3)])
    tar.write_bytes(tar.read_bytes() + other.read_bytes())
    plan = plan_repair(tar.parent)
    assert plan.num_lost == 0
    plan.run()
    assert open_dataset(tar.parent).num_samples("train") == 6


def test_members_that_the_writer_cannot_name_do_not_stop_a_repair(tmp_path: Path) -> None:
    odd = [("000.__key__", b"000"), ("001.", b"x"), ("002._x", b"y")]
    tar = make(tmp_path / "data", sorted(photos(8) + odd))
    data = bytearray(tar.read_bytes())
    data[data.index(b"007.jpg") + 100] ^= 1
    tar.write_bytes(data)
    repair(tar.parent, allow_loss=True)
    assert len(open_dataset(tar.parent).keys()) == 7


def test_a_lost_index_is_made_again_as_the_manifest_has_the_levels(tmp_path: Path) -> None:
    for number, dtype in enumerate(("<f2", "<f4")):
        file = io.BytesIO()
        np.save(file, np.ones((16, 8), dtype))
        members = [(f"{number}.jpg", jpeg(number, 16)), (f"{number}.p4.npy", file.getvalue())]
        tar = make(tmp_path / "data", members, f"train-{number}.tar")
        # A clock that was ahead: its index is older for good.
        os.utime(tar, (4e9, 4e9))
    assert run("index", tar.parent)[0] == 0
    index = tar.with_name("train-1.index.npz")
    assert load(index).sums is not None
    index.unlink()
    batch = open_dataset(tar.parent).read([0, 1], levels=["p4"])
    assert batch["key"] == ["0", "1"]
