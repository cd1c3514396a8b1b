"""A repair says what it costs, loses nothing without a word, and one bad tar stops no other."""

from __future__ import annotations

import json
import shutil
import tarfile
from pathlib import Path

import pytest

from shards import Sample, open_dataset
from shards.check.repair import plan_repair, rebuild_indexes
from shards.check.verify import verify
from shards.files import KEPT
from shards.format.index import load

from .conftest import files_of, jpeg
from .tars import by_webdataset
from .test_foreign_tars import make, photos, run
from .test_index import write_plain

PLACES = ["header", "data", "padding", "between samples", "end blocks"]


def cut(path: Path, place: str, number: int) -> int:
    """Cut a tar at a member; returns how many of its members are whole."""
    with tarfile.open(path) as tar:
        member = tar.getmembers()[number]
    data, end = member.offset_data, member.offset_data + member.size
    at = {
        "header": data - 300,
        "data": data + member.size // 2,
        "padding": end + (-end % 512) // 2,
        "between samples": member.offset,
        "end blocks": path.stat().st_size - 300,
    }[place]
    path.write_bytes(path.read_bytes()[:at])
    return number + (place == "padding")


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("with_json", [False, True])
def test_a_cut_plain_tar_names_the_sample_that_is_cut(tmp_path: Path, place: str, with_json: bool):
    members = []
    for name, image in photos(6):
        members += [(name, image), (name.replace("jpg", "json"), b'{"label": 1}')][: 1 + with_json]
    path = make(tmp_path, members)
    # The second member of sample 4 where there is one: its image is whole.
    num_whole = cut(path, place, 9 if with_json else 4) if place != "end blocks" else len(members)
    if place == "end blocks":
        cut(path, place, 0)
    num_left = num_whole // (1 + with_json)
    loses = place in ("header", "data") or (with_json and place == "between samples")
    status, said = run("verify", tmp_path)
    assert (status == 1) == (place != "end blocks" or "cut off" in said)
    before = files_of(tmp_path)
    status, said = run("repair", tmp_path)
    if loses:
        assert status == 1 and "1 sample would be lost; add --yes" in said
        assert files_of(tmp_path) == before
    else:
        assert "would be lost" not in said
    status, said = run("repair", tmp_path, "-y")
    assert status == 0, said
    assert len(by_webdataset(path)) == num_left == len(open_dataset(tmp_path).keys())
    assert verify(open_dataset(tmp_path)) == []


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("with_index", [False, True])
def test_a_cut_tar_of_ours_counts_all_that_is_gone(copy: Path, place: str, with_index: bool):
    path = copy / "train-00001.tar"
    keys = [key for key, _ in by_webdataset(path)]
    if place == "end blocks":
        with tarfile.open(path) as tar:
            last = tar.getmembers()[-1]
        end = last.offset_data + last.size
        path.write_bytes(path.read_bytes()[: end + -end % 512 + 300])
        num_lost = 0
    else:
        # jpg, json, p16, p4, p8 of each of the 8: the last one of sample 5.
        cut(path, place, 29)
        num_lost = 2 if place == "padding" else 3
    if not with_index:
        path.with_name("train-00001.index.npz").unlink()
    before = files_of(copy)
    status, said = run("repair", copy)
    if num_lost:
        assert status == 1 and f"{num_lost} samples would be lost; add --yes" in said
        assert files_of(copy) == before
        assert with_index == all(key in said for key in keys[8 - num_lost :])
    assert plan_repair(copy).num_lost == num_lost
    assert run("repair", copy, "-y")[0] == 0
    assert [key for key, _ in by_webdataset(path)] == keys[: 8 - num_lost]
    assert verify(open_dataset(copy)) == []


def test_an_older_index_of_a_plain_tar_knows_what_was_cut_off(tmp_path: Path):
    path = make(tmp_path, photos(6))
    open_dataset(tmp_path)
    cut(path, "between samples", 2)
    status, said = run("repair", tmp_path)
    assert status == 1 and "4 samples would be lost" in said
    assert all(f"00{i}: was in the part that is cut off" in said for i in range(2, 6))


def test_a_tar_that_cannot_be_repaired_stops_no_other(tmp_path: Path):
    pairs = [m for name, image in photos(4) for m in ((name, image), (name[:-3] + "json", b"{}"))]
    apart = make(tmp_path, pairs[::2] + pairs[1::2], "a.tar")
    (tmp_path / "b.tar").symlink_to("b.tar")
    damaged = make(tmp_path, photos(4), "c.tar")
    cut(damaged, "padding", 3)
    sound = make(tmp_path, photos(4), "d.tar")
    before = files_of_tars(apart, sound)
    status, said = run("repair", tmp_path, "-y")
    assert status == 1
    assert "a.tar: cannot be repaired and is left as it is: 000: members of sample 000 are" in said
    assert "make the tar again with `tar --sort=name`" in said
    assert "b.tar: cannot be repaired and is left as it is: cannot be read" in said
    assert "check its permissions and the disk" in said
    assert "c.tar: rewritten with 4 samples, 0 lost" in said
    assert "2 tars NOT repaired" in said and "no manifest.json until these are fixed" in said
    assert files_of_tars(apart, sound) == before
    assert len(by_webdataset(damaged)) == 4 and (tmp_path / f"c.tar{KEPT}").exists()
    apart.unlink()
    (tmp_path / "b.tar").unlink()
    assert run("repair", tmp_path)[0] == 0
    assert len(open_dataset(tmp_path).keys()) == 8


def files_of_tars(*tars: Path) -> list[bytes]:
    return [tar.read_bytes() for tar in tars]


def test_a_shard_of_ours_that_cannot_be_read_stops_no_other(copy: Path):
    (copy / "train-00001.tar").rename(copy / "elsewhere")
    (copy / "train-00001.tar").symlink_to("train-00001.tar")
    (copy / "train-00002.index.npz").unlink()
    damaged = copy / "train-00000.tar"
    first = by_webdataset(damaged)
    cut(damaged, "header", 5)
    status, said = run("repair", copy, "-y")
    assert status == 1
    assert "train-00001.tar: cannot be repaired and is left as it is: cannot be read" in said
    assert "train-00000.tar: rewritten with 1 samples, 7 lost" in said
    assert "1 tar NOT repaired, see above; statistics stay as they were until" in said
    assert by_webdataset(damaged) == first[:1]
    (copy / "train-00001.tar").unlink()
    (copy / "elsewhere").rename(copy / "train-00001.tar")
    status, said = run("repair", copy)
    assert status == 0, said
    assert verify(open_dataset(copy)) == []


def test_a_step_that_fails_is_named_and_the_others_are_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    for name in ("a.tar", "b.tar"):
        cut(make(tmp_path, photos(4), name), "header", 3)
    import shards.check.repair as module

    write_shard = module.write_shard

    def full(path: Path, *rest: object) -> object:
        if path.name == "a.tar":
            raise OSError(28, "No space left on device")
        return write_shard(path, *rest)

    monkeypatch.setattr(module, "write_shard", full)
    before = (tmp_path / "a.tar").read_bytes()
    status, said = run("repair", tmp_path, "-y")
    assert status == 1
    assert "a.tar: [Errno 28] No space left on device; it is left as it is" in said
    assert "b.tar: rewritten with 3 samples, 1 lost" in said
    assert (tmp_path / "a.tar").read_bytes() == before
    assert len(by_webdataset(tmp_path / "b.tar")) == 3


def test_what_a_rewritten_tar_has_no_more_is_named(tmp_path: Path):
    members = [("README", b"words"), ("license.txt", b"x"), *photos(4)]
    members += [("003.clip.npy", b"x"), ("003.p4.npy.bak", b"x"), ("003.txt", b"1")]
    members += [("003.txt", b"2"), ("004.jpg", jpeg(4, 16))]
    path = make(tmp_path, members)
    cut(path, "data", len(members) - 1)
    plan = plan_repair(tmp_path)
    wanted = (
        "3 not needed by any sample (003.txt (the sample has this member twice); README; "
        "license.txt)"
    )
    assert any(
        line == f"train-0.tar: entries that will be left out: {wanted}" for line in plan.lines
    )
    assert plan.num_lost == 1
    assert any(line.endswith(f"; entries left out: {wanted}") for line in plan.run())
    with tarfile.open(path) as tar:
        assert "003.p4.npy.bak" in tar.getnames()


def test_many_left_out_entries_are_counted(tmp_path: Path, samples: list[Sample]):
    path = tmp_path / "data" / "a.tar"
    path.parent.mkdir()
    write_plain(path, samples[:4])
    with tarfile.open(path, "a") as tar:
        for number in range(30):
            tar.addfile(tarfile.TarInfo(f"notes-{number}"))
        link = tarfile.TarInfo("link.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "x"
        tar.addfile(link)
    rebuild_indexes(path.parent)
    index = load(path.parent / "a.index.npz")
    data = bytearray(path.read_bytes())
    data[int(index.offsets[1, 0]) + 20] ^= 1
    path.write_bytes(data)
    shutil.copytree(path.parent, tmp_path / "plain")
    for name in ("manifest.json", "a.index.npz", "stats.safetensors"):
        (tmp_path / "plain" / name).unlink()
    left_out = "30 not needed by any sample (notes-0; notes-1; notes-2; and 27 more)"
    for folder in (path.parent, tmp_path / "plain"):
        if folder.name == "plain":
            cut(folder / "a.tar", "header", 8)
        _, said = run("repair", folder, "-y")
        if folder.name == "data":
            assert f"{left_out} and 1 symbolic link" in said
    manifest = json.loads((path.parent / "manifest.json").read_text())
    assert manifest["shards"][0]["num_samples"] == 3
