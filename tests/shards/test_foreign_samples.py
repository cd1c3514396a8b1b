"""Samples that others made: what can be read is read, what cannot is that sample's fault."""

from __future__ import annotations

import io
import json
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image

from shards import Sample, open_dataset, pack
from shards.check.repair import rebuild_indexes
from shards.check.verify import examine, examine_plain
from shards.errors import CorruptSample
from shards.format.index import load, save
from shards.format.scan import scan, survey

from .conftest import jpeg
from .tars import npy
from .test_foreign_tars import make, photos, run

GOOD = b'{"label": 1}'
BAD_META = {
    "empty": (b"", "is empty, expected a JSON object"),
    "blank": (b" \n", "is empty, expected a JSON object"),
    "list": (b"[1]", "holds a list"),
    "number": (b"3", "holds a number, expected an object"),
    "broken": (b'{"label": ', "not JSON"),
    "not utf-8": (b'{"a": "\xe4"}', "not JSON"),
    "deep": (b"[" * 100_000, "not JSON"),
    "text": (b'{"label": "cat"}', "label 'cat' is not an integer"),
    "float": (b'{"label": 1.5}', "label 1.5 is not an integer"),
    "nan": (b'{"label": NaN}', "label nan is not an integer"),
    "bool": (b'{"label": true}', "label True is not an integer"),
    "labels": (b'{"label": [1, 2]}', "is not an integer"),
    "huge": (b'{"label": 99999999999999999999}', "does not fit into 64 bits"),
}


@pytest.mark.parametrize("kind", BAD_META)
def test_bad_metadata_are_that_samples_fault(tmp_path: Path, kind: str):
    data, words = BAD_META[kind]
    members = [m for i in range(4) for m in ((f"{i}.jpg", jpeg(i, 16)), (f"{i}.json", GOOD))]
    members[5] = ("2.json", data)
    make(tmp_path, members)
    status, said = run("verify", tmp_path)
    assert (status, "train-0.tar: 2.json: " in said, words in said) == (1, True, True), said
    status, said = run("index", tmp_path)
    assert (status, f"2.json: {words}" in said or words in said) == (0, True)
    dataset = open_dataset(tmp_path)
    # Read without labels, the image is usable; where labels are needed, it is an error or skipped.
    batch = dataset.read(range(4), image_size=16)
    assert batch["label"].tolist() == [1, 1, -1, 1]
    with pytest.raises(CorruptSample, match=r"2\.json: "):
        dataset.read(range(4), image_size=16, need_labels=True)
    skipped = dataset.read(range(4), image_size=16, need_labels=True, on_error="skip")
    assert skipped["key"] == ["0", "1", "3", "3"]
    status, said = run("repair", tmp_path)
    assert (status, "3 samples, 1 will be lost" in said) == (1, True)
    assert run("repair", tmp_path, "-y")[0] == 0
    assert (open_dataset(tmp_path).keys(), run("verify", tmp_path)[0]) == (["0", "1", "3"], 0)


def test_metadata_that_nobody_needs_cost_no_image(tmp_path: Path):
    members = [m for i in range(3) for m in ((f"{i}.jpg", jpeg(i, 16)), (f"{i}.json", b"{}"))]
    members[3] = ("1.json", b"")
    path = make(tmp_path, members)
    before = path.read_bytes()
    status, said = run("verify", tmp_path)
    assert (status, "1.json: is empty" in said, "1 problem\n" in said) == (1, True, True)
    assert run("repair", tmp_path)[0] == 0
    assert (path.read_bytes(), len(open_dataset(tmp_path).keys())) == (before, 3)
    assert not open_dataset(tmp_path).manifest.has_labels
    assert "1.json: is empty" in open_dataset(tmp_path).label_fault()


def test_cls_members_are_labels(tmp_path: Path):
    path = tmp_path / "a.tar"
    with webdataset.TarWriter(str(path)) as writer:
        for i in range(3):
            writer.write({"__key__": str(i), "jpg": jpeg(i, 16), "cls": i + 5})
    assert scan(path, with_sums=False).labels.tolist() == [5, 6, 7]
    assert open_dataset(tmp_path).sample(1).label == 6
    make(tmp_path, [("0.jpg", jpeg(0, 16)), ("0.cls", b"cat"), *photos(1)], "a.tar")
    status, said = run("verify", tmp_path)
    assert (status, "0.cls: 'cat' is not an integer" in said) == (1, True)


@pytest.mark.parametrize("dtype", ["<f8", ">f2", ">f4", ">f8", "<i4", "|u1", "|b1"])
@pytest.mark.parametrize("fortran", [False, True])
def test_arrays_of_other_kinds_are_read_as_numpy_reads_them(tmp_path: Path, dtype, fortran):
    rng = np.random.default_rng(3)
    arrays = [(rng.normal(size=(16, 5)) * 30 + 60).astype(dtype) for _ in range(5)]
    members = []
    for i, array in enumerate(arrays):
        file = io.BytesIO()
        np.save(file, np.asfortranarray(array) if fortran else array)
        members += [(f"{i}.jpg", jpeg(i, 16)), (f"{i}.p4.npy", file.getvalue())]
    make(tmp_path, members)
    for adopted in (False, True):
        if adopted:
            rebuild_indexes(tmp_path)
        assert not (examine if adopted else examine_plain)(
            open_dataset(tmp_path) if adopted else tmp_path
        ).problems
        dataset = open_dataset(tmp_path)
        batch = dataset.read([3, 0], levels=(4,), image_size=16)["pyramid"][4]
        wanted = np.stack([arrays[3], arrays[0]]).astype(np.float32)
        np.testing.assert_allclose(batch.numpy(), wanted, rtol=1e-3 if dtype[2] == "2" else 1e-7)
        np.testing.assert_allclose(dataset.sample(2).levels["p4"], arrays[2].astype(np.float32))
    mean = np.stack(arrays).astype(np.float64).mean(0)
    np.testing.assert_allclose(dataset.level_mean("p4"), mean, rtol=1e-3)
    with (tmp_path / "train-0.index.npz").open("rb") as file, np.load(file) as stored:
        assert json.loads(stored["header"].tobytes())["version"] == 2


def test_one_sample_of_another_kind_is_converted_to_what_most_are(tmp_path: Path):
    rng = np.random.default_rng(0)
    members = [
        m
        for i, kind in enumerate([">f8", "<f2", "<f2"])
        for m in ((f"{i}.jpg", jpeg(i, 16)), (f"{i}.p4.npy", npy(rng, kind)))
    ]
    path = make(tmp_path, members)
    index = scan(path, with_sums=True)
    assert ([column.dtype for column in index.columns], len(index.faults)) == ([None, "<f2"], 0)
    levels = open_dataset(tmp_path).read([0, 1, 2], levels=(4,))["pyramid"][4]
    wanted = np.load(io.BytesIO(members[1][1])).astype(np.float16)
    np.testing.assert_array_equal(levels[0].numpy(), wanted)


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e30])
def test_features_that_are_no_numbers_are_named(tmp_path: Path, value: float):
    members = []
    for i in range(4):
        file = io.BytesIO()
        np.save(file, np.full((16, 2), value if i == 2 else i, np.float32))
        members += [(f"{i}.jpg", jpeg(i, 16)), (f"{i}.p4.npy", file.getvalue())]
    make(tmp_path, members)
    for command in ("verify", "index", "repair"):
        status, said = run(command, tmp_path)
        assert "2.p4.npy: holds numbers" in said or "2: p4.npy: holds numbers" in said
        assert status == (command != "index")
    dataset = open_dataset(tmp_path)
    assert dataset.total_variance(4) == pytest.approx(np.var([0, 1, 3]))
    with pytest.raises(CorruptSample, match=r"2\.p4\.npy: holds numbers"):
        dataset.read([2], levels=(4,))
    assert dataset.read([2], image_size=16)["key"] == ["2"]


def test_arrays_that_are_no_level_are_named_by_verify_too(tmp_path: Path):
    file = io.BytesIO()
    np.save(file, np.zeros((4, 4, 3), np.float16))
    make(
        tmp_path,
        [
            m
            for i in range(3)
            for m in ((f"{i}.jpg", jpeg(i, 16)), (f"{i}.p4.npy", file.getvalue()))
        ],
    )
    needed = "0.p4.npy: has shape (4, 4, 3), expected (16, C)"
    for command in ("verify", "index", "verify"):
        status, said = run(command, tmp_path)
        assert status == 0
        assert needed in said, command


@pytest.mark.parametrize("suffix", ["webp", "JPG", "jpeg", "JPEG", "PNG"])
def test_images_by_any_of_their_suffixes(tmp_path: Path, suffix: str):
    kind = {"webp": "WEBP", "PNG": "PNG"}.get(suffix, "JPEG")
    make(tmp_path, [(f"a.{suffix}", jpeg(1, 16, kind))])
    assert run("verify", tmp_path)[0] == 0
    image = open_dataset(tmp_path).read([0], image_size=16)["image"][0].permute(1, 2, 0).numpy()
    wanted = np.asarray(Image.open(io.BytesIO(jpeg(1, 16, kind))).convert("RGB"), np.float32)
    np.testing.assert_allclose((image + 1) * 127.5, wanted, atol=1e-3)


def test_keys_of_any_length_share_a_small_index(tmp_path: Path):
    keys = [*(f"{i:05d}" for i in range(300)), "d/" * 4000 + "x", "nul"]
    samples = [Sample(key, jpeg(0, 16), "jpg", label=3) for key in keys]
    pack(samples, tmp_path / "data")
    assert run("verify", tmp_path / "data")[0] == 0
    dataset = open_dataset(tmp_path / "data")
    assert dataset.keys() == keys
    assert dataset.read([300], image_size=16)["key"] == [keys[300]]
    assert (tmp_path / "data" / "train-00000.index.npz").stat().st_size < 100_000
    read = list(webdataset.WebDataset(str(tmp_path / "data/train-00000.tar"), shardshuffle=False))
    assert [sample["__key__"] for sample in read] == keys


def test_members_apart_and_keys_twice_are_two_things(tmp_path: Path):
    images = photos(3)
    make(tmp_path / "apart", [*images, *((f"{i:03d}.txt", b"x") for i in range(3))])
    for command in ("verify", "index", "ls", "repair"):
        status, said = run(command, tmp_path / "apart")
        assert (status, "tar --sort=name" in said, "twice" in said) == (1, True, False)
        assert "members of sample 000 are not next to each other" in said
    # the damaged tar beside it is repaired all the same
    cut = make(tmp_path / "apart", images, "cut.tar")
    with tarfile.open(cut) as tar:
        end = tar.getmember("002.jpg").offset_data + 9
    os.truncate(cut, end)
    status, said = run("repair", "--yes", tmp_path / "apart")
    assert status == 1 and "1 tar NOT repaired" in said and "cut.tar: rewritten with" in said
    assert (tmp_path / "apart" / "cut.tar.before-repair").exists()
    make(tmp_path / "twice", [*images, *images])
    status, said = run("verify", tmp_path / "twice")
    assert (status, "000: the key occurs twice" in said, "--sort" in said) == (1, True, False)
    assert len(open_dataset(tmp_path / "twice").keys()) == 6
    make(tmp_path / "side", [("a.jpg", images[0][1]), ("a.jpg", images[1][1]), *images])
    status, said = run("verify", tmp_path / "side")
    assert (status, "a.jpg: the sample has this member twice" in said) == (1, True)
    assert open_dataset(tmp_path / "side").read([1, 2], image_size=16)["key"] == ["000", "001"]


@pytest.mark.parametrize(
    "names, words",
    [
        (
            ["0.00.png", "0.01.png"],
            "0.00.png is read as '00.png' of sample '0'; rename it to 0_00.png",
        ),
        (["s1.input.jpg", "s1.out.txt"], "rename it to s1_input.jpg"),
        (["a.bmp", "b.tiff"], "the suffixes of its members are: bmp, tiff"),
        (["README"], "holds no sample"),
    ],
)
def test_tars_without_one_image_are_said_when_indexed(tmp_path: Path, names, words: str):
    make(tmp_path, [(name, jpeg(0, 16)) for name in names])
    for command in ("index", "verify", "ls", "repair"):
        status, said = run(command, tmp_path)
        assert (status, words in said) == (1, True), said


def test_what_has_no_image_is_skipped_and_said(tmp_path: Path):
    path = make(tmp_path, [*photos(2), ("README.md", b"x"), ("009.json", b"{}")])
    assert survey(path, with_sums=False).without_image == ["README (md)", "009 (json)"]
    status, said = run("index", tmp_path)
    assert (status, "skipped, no image or features: README (md); 009 (json)" in said) == (
        0,
        True,
    )
    assert run("verify", tmp_path)[0] == 0


def test_sizes_of_images_are_known_before_they_are_decoded(tmp_path: Path):
    images = [*photos(3, 32), ("small.jpg", jpeg(8, 16))]
    make(tmp_path / "differ", images)
    wide = io.BytesIO()
    Image.new("RGB", (32, 16)).save(wide, "PNG")
    make(tmp_path / "wide", [*photos(3, 32), ("wide.png", wide.getvalue())])
    make(tmp_path / "alike", photos(3, 32))
    for folder in ("differ", "wide", "alike"):
        plain = open_dataset(tmp_path / folder)
        first = {"differ": "small of train-0.tar is 16x16", "wide": "wide of train-0.tar is 32x16"}
        wanted = (1, first[folder]) if folder in first else (0, "")
        assert plain.unfit_images(32) == wanted
        status, said = run("index", tmp_path / folder)
        assert (status, "images differ in size" in said) == (0, folder in first)
        adopted = open_dataset(tmp_path / folder)
        assert adopted.unfit_images(32) == wanted
        assert adopted.manifest.image_size == (None if folder in first else 32)
    assert open_dataset(tmp_path / "differ").unfit_images(16) == (0, "")
    # An index of an earlier version does not tell: the images' headers do.
    index = tmp_path / "differ" / "train-0.index.npz"
    save(type(found := load(index))(**{**vars(found), "pixels": None}), index)
    assert open_dataset(tmp_path / "differ").unfit_images(32)[0] == 1


def test_an_empty_split_is_said_when_packed(tmp_path: Path, caplog):
    samples = [Sample(f"{i}", jpeg(i, 16), "jpg") for i in range(3)]
    pack(samples, tmp_path / "a", val_fraction=0.1, test_fraction=0.05)
    (val, test) = [r.getMessage() for r in caplog.records if "EMPTY SPLIT" in r.getMessage()]
    assert "val_fraction 0.1 puts none of the 3 samples" in val
    enough = float(val.rpartition("val_fraction ")[2].split()[0])
    caplog.clear()
    manifest = pack(samples, tmp_path / "b", val_fraction=enough)
    assert (manifest.splits["val"].num_samples, caplog.records) == (1, [])
    enough = float(test.rpartition("test_fraction ")[2].split()[0])
    assert pack(samples, tmp_path / "c", test_fraction=enough).splits["test"].num_samples == 1


def test_a_sparse_image_is_read_with_its_holes(tmp_path: Path):
    content = jpeg(1, 16) + bytes(8192) + b"end"
    header = tarfile.TarInfo("a.jpg")
    header.type, header.size = tarfile.GNUTYPE_SPARSE, 1024
    block = bytearray(header.tobuf(tarfile.GNU_FORMAT))
    parts = [(0, 512), (8192, 512)]
    content = (
        content[:512].ljust(512, b"\0") + bytes(7680) + jpeg(1, 16)[512:1024].ljust(512, b"\0")
    )
    for number, pair in enumerate(parts):
        block[386 + number * 24 : 410 + number * 24] = b"%011o\0%011o\0" % pair
    block[483:495] = b"%011o\0" % len(content)
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    path = tmp_path / "a.tar"
    path.write_bytes(bytes(block) + content[:512] + content[8192:] + bytes(1024))
    (sample,) = webdataset.tariterators.tarfile_samples([{"url": str(path)}])
    assert sample["jpg"] == content
    assert open_dataset(tmp_path).sample(0).image == content
