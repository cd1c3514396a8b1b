"""Strange names in tars: read as webdataset reads them, and shown on one safe line."""

from __future__ import annotations

import logging
import os
import subprocess
import tarfile
from pathlib import Path

import pytest

from shards import open_dataset
from shards.check.repair import repair
from shards.errors import CorruptSample, show_name

from .tars import by_webdataset, skip_without
from .test_foreign_tars import make, photos, put, run

STRANGE = {
    "escape": "a\x1b[2J\x1b]0;title\x07b",
    "newline": "a\nOK: all sound\r\nb",
    "zero": "a\0b",
    "zero at the end": "a\0",
    "right to left": "a\u202egpj_exe\u2066",
    "markup": "a[red]b[/red][/]",
    "long": "n" * 5000,
    "no utf-8": "a\udce4\udcf6",
    "invisible": "a\u200b\u00a0\u2028b",
}


def make_pax(folder: Path, members: list[tuple[str, bytes]], name: str = "train-0.tar") -> Path:
    """Every name in a PAX header, which has room for zero bytes."""
    folder.mkdir(exist_ok=True)
    with tarfile.open(folder / name, "w", format=tarfile.PAX_FORMAT) as tar:
        for member, data in members:
            put(tar, "x", data, pax_headers={"path": member})
    return folder / name


def safe(text: str) -> bool:
    return all(line.isprintable() and len(line) < 1000 for line in text.split("\n"))


@pytest.mark.parametrize("kind", STRANGE)
def test_a_strange_key_is_read_and_kept_by_a_repair(tmp_path: Path, kind: str):
    key = STRANGE[kind]
    (_, first), (_, second), (_, third) = photos(3)
    members = [(f"{key}.jpg", first), ("b.jpg", second), ("c.jpg", third)]
    path = make_pax(tmp_path / "data", members)
    assert [found for found, _ in by_webdataset(path)] == [key, "b", "c"]
    status, said = run("verify", path.parent)
    assert (status, safe(said)) == (0, True)
    assert run("index", path.parent)[0] == 0
    data = open_dataset(path.parent)
    assert [data.sample(number).key for number in range(3)] == [key, "b", "c"]
    assert data.sample(0).image == first
    assert data.stream(batch_size=3, image_size=16, levels=()).__next__()["key"].count(key) == 1
    # Another sample of the tar is damaged: it is written again.
    with tarfile.open(path) as tar:
        place = tar.getmembers()[2].offset_data
    with path.open("r+b") as file:
        file.seek(place)
        file.write(bytes(300))
    status, said = run("repair", path.parent, "-y")
    assert (status, safe(said)) == (0, True), said
    assert by_webdataset(path) == [(key, {"jpg": first}), ("b", {"jpg": second})]


@pytest.mark.parametrize("kind", STRANGE)
def test_faults_of_strange_names_are_one_safe_line_each(
    tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture
):
    key = STRANGE[kind]
    bad = [(f"{key}.jpg", b"no image"), (f"{key}.json", b"["), ("b.jpg", photos(1)[0][1])]
    bad += [(f"{key}.{key}x", b"1"), ("README " + key + ".md", b"x"), (key, b"no suffix")]
    folder = make_pax(tmp_path / "data", bad).parent
    status, said = run("verify", folder)
    assert status == 1 and safe(said), said
    # Image, metadata, and the line with the count; no name makes a line of its own.
    assert said.count("train-0.tar: ") == len(said.strip().splitlines()) - 1
    for command in (["index"], ["ls"], ["repair"], ["repair", "-y"]):
        _, said = run(*command[:1], folder, *command[1:])
        assert safe(said), said
    assert all(safe(record.getMessage()) for record in caplog.records)


def test_names_are_escaped_and_shortened_in_the_middle():
    assert show_name("dir/ä 中 (1).jpg") == "dir/ä 中 (1).jpg"
    assert show_name("a\n\x1b\0\u202e\udce4.jpg") == "a\\n\\x1b\\x00\\u202e\\udce4.jpg"
    shown = show_name("a" * 300 + "\n" * 100 + "z" * 300)
    assert shown == f"{'a' * 100}...{'z' * 40} (700 characters)"
    error = CorruptSample("x.tar", "a\n" * 500, "jpg", "is empty")
    assert safe(str(error)) and error.key == "a\n" * 500


def test_names_of_tars_with_markup_are_listed(tmp_path: Path):
    make(tmp_path / "[red]data[bold]", photos(2), "[bold]a[red].tar")
    status, said = run("ls", tmp_path / "[red]data[bold]")
    assert status == 0 and "[bold]a[red].tar" in said


def test_a_sample_with_a_member_twice_is_no_sound_one(tmp_path: Path):
    (name, image), *others = photos(3)
    members = [(name, image), ("000.txt", b"one"), ("000.txt", b"two"), ("000.xyz", b"1")]
    path = make(tmp_path, [*members, ("000.xyz", b"2"), *others])
    with pytest.raises(ValueError, match="duplicate"):
        by_webdataset(path)
    status, said = run("verify", tmp_path)
    assert (status, "000.txt: the sample has this member twice" in said) == (1, True)


def make_sparse(path: Path, members: list[tuple[str, bytes, int]]) -> None:
    """A tar by GNU tar -S: (name, first bytes, size of the file) of each."""
    names = []
    for name, data, size in members:
        file = path.parent / name
        file.write_bytes(data)
        os.truncate(file, size or len(data))
        names.append(name)
    subprocess.run(["tar", "-S", "-C", path.parent, "-cf", path, *names], check=True)
    for name in names:
        (path.parent / name).unlink()


@pytest.mark.parametrize("suffix", ["jpg", "json", "p4.npy", "clip.npy", "bin"])
def test_a_huge_sparse_member_is_that_samples_fault(
    tmp_path: Path, suffix: str, caplog: pytest.LogCaptureFixture
):
    skip_without("gnu")
    path = tmp_path / "train-0.tar"
    image = photos(1)[0][1]
    members = [("a.jpg", image, 0), ("c.jpg", image, 0)]
    huge = (f"b.{suffix}", image, 5 << 30)
    if suffix != "jpg":
        members.append(("b.jpg", image, 0))
    make_sparse(path, [*members, huge])
    assert path.stat().st_size < 100_000
    caplog.set_level(logging.ERROR)
    status, said = run("verify", tmp_path)
    assert "is a sparse file of 5,368,709,120 bytes" in said
    assert status == (1 if suffix in ("jpg", "json") else 0)
    assert run("index", tmp_path)[0] == 0
    data = open_dataset(tmp_path)
    batch = data.read([0, 1, 2], image_size=16, levels=(), on_error="skip")
    assert sorted(set(batch["key"])) == (["a", "c"] if suffix == "jpg" else ["a", "b", "c"])
    if suffix == "jpg":
        repair(tmp_path, allow_loss=True)
        assert open_dataset(tmp_path).keys() == ["a", "c"]
