"""Indexes: made from any WebDataset tar, fit it, are noticed when they do not."""

from __future__ import annotations

import gc
import io
import os
import tarfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import webdataset

from shards import Sample, open_dataset
from shards.errors import CorruptSample, IndexFileError, ManifestError
from shards.files import sum64
from shards.format.index import load, save
from shards.format.sample import encode
from shards.format.scan import scan
from shards.format.tar import TarError, walk

from .conftest import CHANNELS, make_samples


def write_plain(path: Path, samples: list[Sample]) -> None:
    with webdataset.TarWriter(str(path)) as writer:
        for sample in samples:
            writer.write({"__key__": sample.key, **encode(sample)})


def test_offsets_are_those_of_tarfile(packed: Path):
    for path in packed.glob("*.tar"):
        index = load(path.with_name(path.stem + ".index.npz"))
        data = path.read_bytes()
        assert index.num_bytes == len(data)
        with tarfile.open(path) as tar:
            members = {m.name: m for m in tar.getmembers()}
        seen = 0
        for row in range(len(index)):
            for number, column in enumerate(index.columns):
                offset, size = index.offsets[row, number], index.sizes[row, number]
                member = members.get(f"{index.key(row)}.{column.suffix}")
                assert (member is None) == (offset < 0)
                if member is None:
                    continue
                seen += 1
                header = 128 if column.suffix.endswith(".npy") else 0
                assert (offset, size) == (member.offset_data + header, member.size - header)
                payload = data[offset : offset + size]
                padded = payload + b"\0" * (-size % 8)
                words = np.frombuffer(padded, "<u8").astype(object).sum()
                assert int(index.sums[row, number]) == words % 2**64
        assert seen == len(members)


def test_sum64_notices_every_flipped_bit():
    data = bytearray(np.random.default_rng(0).bytes(37))
    before = sum64(data)
    for bit in range(len(data) * 8):
        data[bit // 8] ^= 1 << bit % 8
        assert sum64(data) != before
        data[bit // 8] ^= 1 << bit % 8
    assert sum64(data) == before
    assert sum64(b"") == 0


def test_plain_tars_of_webdataset_are_indexed_on_first_use(tmp_path: Path):
    samples = list(make_samples(20, png_every=3))
    write_plain(tmp_path / "train-0000.tar", samples[:9])
    write_plain(tmp_path / "train-0001.tar", samples[9:14])
    write_plain(tmp_path / "val-0000.tar", samples[14:])
    data = open_dataset(tmp_path)
    assert {k: v.num_samples for k, v in data.manifest.splits.items()} == {"train": 14, "val": 6}
    assert data.keys("train") == [s.key for s in samples[:14]]
    batch = data.read(range(14), image_size=32, levels=(4, 16))
    for row, sample in enumerate(samples[:14]):
        np.testing.assert_array_equal(batch["pyramid"][16][row], sample.levels["p16"])
    assert batch["label"].tolist() == [s.label for s in samples[:14]]
    assert {p.name for p in tmp_path.glob("*.npz")} == {
        "train-0000.index.npz", "train-0001.index.npz", "val-0000.index.npz",
    }  # fmt: skip
    with pytest.raises(ManifestError, match="no statistics"):
        data.total_variance(4)


def test_a_folder_without_split_names_is_all_train(tmp_path: Path):
    write_plain(tmp_path / "part_a.tar", list(make_samples(3)))
    assert open_dataset(tmp_path).num_samples("train") == 3


def test_a_read_only_folder_is_indexed_in_memory(tmp_path: Path, monkeypatch):
    write_plain(tmp_path / "a.tar", list(make_samples(3)))

    def refuse(*_: object) -> None:
        raise PermissionError("read-only")

    monkeypatch.setattr("shards.format.index.atomic_write", refuse)
    assert open_dataset(tmp_path).read([2], levels=(4,))["key"] == ["face-0002"]
    assert not list(tmp_path.glob("*.npz"))


def test_a_plain_tar_written_again_gets_a_new_index(tmp_path: Path):
    one, two = list(make_samples(8))[:4], list(make_samples(8))[4:]
    path = tmp_path / "a.tar"
    write_plain(path, one)
    assert open_dataset(tmp_path).keys() == [s.key for s in one]
    size = path.stat().st_size
    write_plain(path, two)
    later = time.time() + 5
    os.utime(path, (later, later))
    # Of the same size, so that its time alone can tell.
    assert path.stat().st_size == size
    assert open_dataset(tmp_path).keys() == [s.key for s in two]
    write_plain(path, two[:2])
    os.utime(path, (1, 1))
    assert open_dataset(tmp_path).keys() == [s.key for s in two[:2]]


def test_an_index_of_another_tar_is_made_again(copy: Path, caplog):
    wrong = copy / "train-00000.index.npz"
    before = wrong.read_bytes()
    wrong.write_bytes((copy / "val-00000.index.npz").read_bytes())
    data = open_dataset(copy)
    assert data.keys() == open_dataset(copy).keys()
    assert "does not fit train-00000.tar" in caplog.text
    assert wrong.read_bytes() == before
    wrong.write_bytes(b"rubbish")
    assert open_dataset(copy).read([0], levels=(4,))["key"] == data.keys()[:1]
    assert wrong.read_bytes() == before
    wrong.unlink()
    assert open_dataset(copy).read([0], levels=(4,))["key"] == data.keys()[:1]
    assert wrong.read_bytes() == before


def test_no_index_is_made_of_a_tar_that_the_manifest_does_not_know(copy: Path, flip):
    (copy / "train-00000.index.npz").unlink()
    flip(copy / "train-00000.tar", 700)
    with pytest.raises(IndexFileError, match=r"train-00000\.tar differs from what manifest"):
        open_dataset(copy).keys()


def test_the_same_index_gives_the_same_bytes_and_survives(packed: Path, tmp_path: Path):
    index = load(packed / "train-00000.index.npz")
    save(index, tmp_path / "a.npz")
    assert (tmp_path / "a.npz").read_bytes() == (packed / "train-00000.index.npz").read_bytes()
    assert load(tmp_path / "a.npz").same_as(index)
    moved = replace(index, offsets=index.offsets + 1)
    assert not moved.same_as(index)


@pytest.mark.parametrize("change", ["offsets", "keys", "pickle"])
def test_indexes_that_contradict_themselves_are_refused(packed: Path, tmp_path: Path, change: str):
    index = load(packed / "train-00000.index.npz")
    path = tmp_path / "x.npz"
    if change == "offsets":
        save(replace(index, offsets=index.offsets + index.num_bytes), path)
    elif change == "keys":
        save(replace(index, keys=index.keys[:-1]), path)
    else:
        np.savez(path, header=np.array([{}], object), allow_pickle=True)
    with pytest.raises(IndexFileError, match=r"x\.npz: not a usable index"):
        load(path)


def test_threads_may_read_indexes_at_once(packed: Path):
    """CPython 3.11's `ast`, which numpy reads headers with, does not stand two threads."""

    def let_others_in(phase: str, info: dict[str, int]) -> None:
        time.sleep(0)

    before = gc.get_threshold()
    gc.callbacks.append(let_others_in)
    gc.set_threshold(5)
    try:
        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(load, [packed / "train-00000.index.npz"] * 120))
    finally:
        gc.set_threshold(*before)
        gc.callbacks.remove(let_others_in)
    assert {len(index) for index in found} == {8}


def npy(shape: tuple[int, ...], dtype: str = "<f2") -> bytes:
    file = io.BytesIO()
    np.save(file, np.zeros(shape, dtype))
    return file.getvalue()


def test_arrays_of_the_wrong_kind_are_named(tmp_path: Path):
    samples = list(make_samples(4))
    cases = {
        "holds <U3, expected numbers": npy((16, CHANNELS), "<U3"),
        "is float16 (16, 5), expected <f2 (16, 6)": npy((16, 5)),
        "has shape (15, 6), expected (16, C)": npy((15, 6)),
        "not a .npy file": b"x" * 200,
        "bytes do not fit": npy((16, CHANNELS)) + b"x",
        "do not fit (16, 99999999999999999999)": npy((16, CHANNELS)).replace(
            b"(16, 6), }                    ", b"(16, 99999999999999999999), } "
        ),
        "not a .npy file: ": npy((16, CHANNELS)).replace(b"'descr'", b"('(('d("),
    }
    for i, (message, data) in enumerate(cases.items()):
        path = tmp_path / str(i) / "a.tar"
        path.parent.mkdir()
        with webdataset.TarWriter(str(path)) as writer:
            writer.write({"__key__": "bad", **encode(samples[0]), "p4.npy": data})
            for sample in samples[1:]:
                writer.write({"__key__": sample.key, **encode(sample)})
        (fault,) = scan(path, with_sums=False).faults
        assert (fault.row, fault.suffix) == (0, "p4.npy")
        assert message in fault.what
        data_set = open_dataset(path.parent)
        assert data_set.read([1, 2, 3], levels=(4,))["key"] == [s.key for s in samples[1:]]
        assert data_set.read([0], levels=(8,), image_size=16)["key"] == ["bad"]
        with pytest.raises(CorruptSample, match=r"a\.tar: bad\.p4\.npy: "):
            data_set.read([0], levels=(4,))
        assert data_set.read([0], levels=(4,), on_error="skip")["key"] == [samples[1].key]


def test_tars_of_other_programs_are_read(tmp_path: Path):
    """PAX and GNU headers, folders, long names, strangers between the samples."""
    samples = list(make_samples(2))
    for kind in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT):
        path = tmp_path / f"{kind}.tar"
        long = "f" * (60 if kind == tarfile.USTAR_FORMAT else 200)
        with tarfile.open(path, "w", format=kind) as tar:
            folder = tarfile.TarInfo(long)
            folder.type = tarfile.DIRTYPE
            tar.addfile(folder)
            tar.addfile(tarfile.TarInfo("README"))
            for sample in samples:
                for suffix, data in encode(sample).items():
                    member = tarfile.TarInfo(f"{long}/ä{sample.key}.{suffix}")
                    member.size = len(data)
                    member.mtime = 1.5 if kind == tarfile.PAX_FORMAT else 1
                    tar.addfile(member, io.BytesIO(data))
        index = scan(path, with_sums=False)
        assert [index.key(r) for r in (0, 1)] == [f"{long}/ä{s.key}" for s in samples]
        number = index.column("p4.npy")
        for row, sample in enumerate(samples):
            start = int(index.offsets[row, number])
            payload = path.read_bytes()[start : start + int(index.sizes[row, number])]
            assert payload == sample.levels["p4"].tobytes()


def test_cut_off_tars_are_refused(tmp_path: Path):
    path = tmp_path / "x.tar"
    write_plain(path, list(make_samples(2)))
    data = path.read_bytes()
    for length in (0, 100, 512, 700, len(data) - 10240):
        path.write_bytes(data[:length])
        with path.open("rb") as file, pytest.raises(TarError, match="cut off"):
            list(walk(file.fileno()))
