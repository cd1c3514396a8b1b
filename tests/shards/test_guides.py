"""Levels of further guides, vectors and captions: written, read, mixed, checked and repaired."""

from __future__ import annotations

import io
import json
import tarfile
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset
from safetensors.numpy import load_file
from typer.testing import CliRunner

from launch.cli.shards import app
from shards import ShardWriter, open_dataset, pack
from shards.check.repair import rebuild_indexes, repair
from shards.check.verify import verify
from shards.errors import CorruptSample, ManifestError, PackError
from shards.format.sample import decode, encode, level_grid, level_guide, level_name
from shards.read.mixture import MixedDataset

from .conftest import files_of, make_samples

EMBEDDED = 5
IDENTITY = {
    "guide": {"name": "noise", "weights_sha256": "a", "layer": 1},
    "guides": {
        "pixels": {"name": "pixels", "weights_sha256": "b", "layer": -1},
        "in_2": {"name": "inception", "weights_sha256": "c", "layer": ["pool1", "pool2"]},
    },
    "clip": {"name": "clip", "weights_sha256": "d"},
    "prepare": {"pyramids": {"grids": [4, 8], "kinds": ["native"], "base_grid": 8}},
}
SETTINGS = {"shard_size": 5, "val_fraction": 0.2, **IDENTITY}
FURTHER = {"pixels.p8": (64, 3), "in_2.n4": (16, 7), "clip": (1, EMBEDDED), "text": (1, EMBEDDED)}


def samples(count=24):
    """Samples with levels of three guides and both vectors; every third has no caption."""
    for number, sample in enumerate(make_samples(count)):
        rng = np.random.default_rng(number)
        more = {name: rng.normal(number, 1, s).astype(np.float16) for name, s in FURTHER.items()}
        caption = None if number % 3 == 0 else f"Nr. {number}: größer"
        if caption is None:
            more["text"] = np.zeros_like(more["text"])
        yield replace(sample, levels=sample.levels | more, caption=caption)


@pytest.fixture(scope="module")
def guided(tmp_path_factory):
    folder = tmp_path_factory.mktemp("guided") / "data"
    pack(samples(), folder, **SETTINGS)
    return folder


@pytest.fixture
def data(guided, tmp_path):
    """A copy that a test may damage."""
    import shutil

    return Path(shutil.copytree(guided, tmp_path / "data"))


@pytest.fixture(scope="module")
def expected():
    return {sample.key: sample for sample in samples()}


def test_other_tools_read_the_members(guided, expected):
    seen = set()
    for tar in sorted(guided.glob("*.tar")):
        for raw in webdataset.WebDataset(str(tar), shardshuffle=False):
            sample = expected[raw["__key__"]]
            seen.add(sample.key)
            for name, values in sample.levels.items():
                found = np.load(io.BytesIO(raw[f"{name}.npy"]), allow_pickle=False)
                np.testing.assert_array_equal(found, values)
            assert raw.get("txt") == (sample.caption.encode() if sample.caption else None)
    assert seen == set(expected)


def test_samples_survive_the_round_trip(expected):
    for sample in expected.values():
        back = decode(sample.key, encode(sample))
        assert back.caption == sample.caption
        assert set(back.levels) == set(sample.levels)
        for name, values in sample.levels.items():
            np.testing.assert_array_equal(back.levels[name], values)


@pytest.mark.parametrize("threads", [0, 2])
def test_a_batch_sorts_levels_by_guide_and_grid(guided, expected, threads):
    levels = ["p8", "p4", "pixels.p8", "in_2.n4", "text", "clip"]
    with open_dataset(guided).stream(7, levels=levels, num_threads=threads) as stream:
        batches = [next(stream) for _ in range(5)]
    read = open_dataset(guided).read([3, 0], levels=levels)
    for batch in [*batches, read]:
        assert set(batch["pyramid"]) == {8, 4}
        assert {name: set(grids) for name, grids in batch["guides"].items()} == {
            "pixels": {8},
            "in_2": {4},
        }
        for row, key in enumerate(batch["key"]):
            wanted = {n: torch.from_numpy(v) for n, v in expected[key].levels.items()}
            assert torch.equal(batch["pyramid"][8][row], wanted["p8"])
            assert torch.equal(batch["pyramid"][4][row], wanted["p4"])
            assert torch.equal(batch["guides"]["pixels"][8][row], wanted["pixels.p8"])
            assert torch.equal(batch["guides"]["in_2"][4][row], wanted["in_2.n4"])
            assert torch.equal(batch["clip"][row], wanted["clip"][0])
            assert torch.equal(batch["text"][row], wanted["text"][0])
    assert open_dataset(guided).sample(1).caption == expected[read_key(guided, 1)].caption


def read_key(folder, number):
    return open_dataset(folder).keys()[number]


def test_without_them_a_batch_is_what_it_was(guided):
    batch = open_dataset(guided).read([0], levels=["p4"])
    assert set(batch) == {"key", "position", "pyramid", "label"}


def test_one_level_per_guide_and_grid(guided):
    data = open_dataset(guided)
    data.level_shapes(["p8", "pixels.p8"])
    with pytest.raises(ValueError, match=r"one level per grid and guide; requested: .*pixels.n8"):
        data.manifest.levels["pixels.n8"] = data.manifest.levels["pixels.p8"]
        data.level_shapes(["pixels.p8", "pixels.n8"])
    with pytest.raises(ManifestError, match=r"no level dino\.p8; its levels are: .*pixels\.p8"):
        data.read([0], levels=["dino.p8"])


def test_names_of_levels():
    assert [level_grid(n) for n in ("p4", "pixels.n16", "clip", "text")] == [4, 16, 1, 1]
    assert [level_guide(n) for n in ("p4", "a_1.n16", "clip", "text")] == ["", "a_1", *["clip"] * 2]
    for wrong in ("A.p4", "1a.p4", "clip.p4", "text.n8", "a.b.p4", "a.p4.npy", "Clip", ".p4"):
        with pytest.raises(ValueError, match="is not the name of a level"):
            level_name(wrong)


def test_statistics_and_manifest_know_all_of_them(guided, expected):
    data = open_dataset(guided)
    manifest = data.manifest
    told = {name: getattr(manifest, name) for name in IDENTITY}
    assert told == IDENTITY
    assert {n: (i.grid**2, i.channels) for n, i in manifest.levels.items() if n in FURTHER} == (
        FURTHER
    )
    train = [expected[key] for key in data.keys("train")]
    for name in FURTHER:
        stack = np.stack([s.levels[name] for s in train]).astype(np.float64)
        np.testing.assert_allclose(data.level_mean(name), stack.mean(0), rtol=1e-5)
        np.testing.assert_allclose(data.level_variance(name), stack.var(0), rtol=1e-5)
        np.testing.assert_allclose(data.total_variance(name), stack.var(0).mean(), rtol=1e-9)
    assert verify(data) == []
    said = CliRunner().invoke(app, ["ls", str(guided)], env={"COLUMNS": "200"}).output
    for words in ("pixels.p8", "guide pixels: name=pixels", "clip: name=clip", "base_grid"):
        assert words in said


def test_a_manifest_without_them_says_nothing_of_them(packed):
    told = json.loads((packed / "manifest.json").read_bytes())
    assert list(told) == [
        "format", "version", "image_size", "resize_filter", "has_labels", "splits", "levels",
        "guide", "prepare", "statistics", "shards",
    ]  # fmt: skip


@pytest.mark.parametrize("stop", [3, 13])
def test_interrupted_and_resumed_gives_the_same_bytes(guided, tmp_path, stop):
    with ShardWriter(tmp_path / "part", **SETTINGS) as writer:
        for sample in samples(stop):
            writer.add(sample)
    pack(samples(), tmp_path / "part", **SETTINGS)
    assert files_of(tmp_path / "part") == files_of(guided)


def test_a_lost_manifest_and_index_come_back(data):
    before = files_of(data)
    (data / "manifest.json").unlink()
    (data / "train-00001.index.npz").unlink()
    plain = open_dataset(data)
    assert set(plain.manifest.levels) == set(open_dataset_levels(before))
    batch = plain.read([1], levels=["pixels.p8"])
    np.testing.assert_array_equal(
        batch["guides"]["pixels"][8][0], plain.sample(1).levels["pixels.p8"]
    )
    rebuild_indexes(data)
    manifest = open_dataset(data).manifest
    assert {name: getattr(manifest, name) for name in IDENTITY} == IDENTITY
    again = files_of(data)
    assert again["stats.safetensors"] == before["stats.safetensors"]
    assert again["train-00001.index.npz"] == before["train-00001.index.npz"]


def open_dataset_levels(files):
    return json.loads(files["manifest.json"])["levels"]


@pytest.mark.parametrize("member", ["pixels.p8.npy", "clip.npy", "txt"])
def test_damage_is_named_and_repaired_at_the_price_of_that_sample(data, flip, member):
    with tarfile.open(data / "train-00000.tar") as tar:
        info = next(m for m in tar.getmembers() if m.name.endswith(f".{member}"))
    key = info.name.partition(".")[0]
    flip(data / "train-00000.tar", info.offset_data + info.size - 3)
    (problem,) = verify(open_dataset(data))
    assert (problem.key, problem.member) == (key, member)
    if member != "txt":
        with pytest.raises(CorruptSample, match=member):
            open_dataset(data).read(range(5), levels=[member.removesuffix(".npy")])
    keys = open_dataset(data).keys()
    repair(data, allow_loss=True)
    repaired = open_dataset(data)
    assert verify(repaired) == []
    assert repaired.keys() == [other for other in keys if other != key]
    assert repaired.manifest.guides == IDENTITY["guides"]
    captions = {s.key: s.caption for s in samples()}
    assert all(repaired.sample(i).caption == captions[k] for i, k in enumerate(repaired.keys()))


def test_a_level_that_a_sample_lacks_is_refused(tmp_path):
    one, two = list(samples(2))
    lacking = {name: values for name, values in two.levels.items() if name != "clip"}
    with pytest.raises(PackError, match=r"has levels .*, but earlier samples have clip \(1, 5\)"):
        pack([one, replace(two, levels=lacking)], tmp_path / "x")


def mixed(*folders):
    return MixedDataset([open_dataset(folder) for folder in folders], [Fraction(1)] * len(folders))


def test_a_mix_has_what_all_have_if_the_same_networks_made_it(guided, tmp_path, expected):
    fewer = {**IDENTITY, "guides": {"pixels": IDENTITY["guides"]["pixels"] | {"path": "else"}}}
    kept = {n: v for n, v in FURTHER.items() if not n.startswith("in_2")}
    pack(
        (replace(s, key=f"x{s.key}", levels={n: s.levels[n] for n in kept}) for s in samples(9)),
        tmp_path / "b",
        **fewer,
    )
    mix = mixed(guided, tmp_path / "b")
    assert set(mix.manifest.levels) == set(kept)
    assert set(mix.manifest.guides) == {"pixels"} and mix.manifest.clip == IDENTITY["clip"]
    assert mix.manifest.prepare["pyramids"]["base_grid"] == 8
    with mix.stream(8, levels=["pixels.p8", "clip"]) as stream:
        batch = next(stream)
    for row, key in enumerate(batch["key"]):
        levels = expected[key.removeprefix("x")].levels
        assert torch.equal(batch["guides"]["pixels"][8][row], torch.from_numpy(levels["pixels.p8"]))
        assert torch.equal(batch["clip"][row], torch.from_numpy(levels["clip"][0]))
    parts = [
        np.stack([s.levels["clip"] for s in map(one.sample, range(one.num_samples()))])
        for one in mix.sets
    ]
    wide = [part.astype(np.float64) for part in parts]
    mean = sum(part.mean(0) for part in wide) / 2
    variance = sum(((part - mean) ** 2).mean(0) for part in wide) / 2
    np.testing.assert_allclose(mix.level_variance("clip"), variance, rtol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"guides": {"pixels": {"name": "dinov2"}}}, "its guide pixels .* differs"),
        ({"clip": {"name": "clip", "weights_sha256": "e"}}, "its guide clip .* differs"),
        ({"prepare": {"pyramids": {}}}, r"averaged from another grid .*base_grid"),
    ],
)
def test_what_contradicts_each_other_is_not_mixed(guided, tmp_path, change, message):
    pack(samples(3), tmp_path / "b", **{**IDENTITY, **change})
    with pytest.raises(ManifestError, match=message):
        mixed(guided, tmp_path / "b")


def test_tars_from_elsewhere_may_call_anything_clip_or_text(tmp_path):
    """A vector without its axis is one; what is none is left alone, as it was before."""
    vectors = {}
    with tarfile.open(tmp_path / "t.tar", "w") as tar:
        for sample in make_samples(3):
            vectors[sample.key] = np.random.default_rng(len(vectors)).normal(size=4)
            members = encode(sample) | {
                "clip.npy": npy(vectors[sample.key].astype("<f4")),
                "text.npy": npy(np.array(["words"])),
                "txt": "größer".encode("latin-1"),
            }
            for suffix, content in members.items():
                info = tarfile.TarInfo(f"{sample.key}.{suffix}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    for _ in range(2):
        data = open_dataset(tmp_path)
        batch = data.read([2, 0], levels=["clip", "p4"])
        for row, key in enumerate(batch["key"]):
            np.testing.assert_allclose(batch["clip"][row], vectors[key], rtol=1e-6)
        assert "text" not in data.manifest.levels and "text" not in data.sample(0).levels
        rebuild_indexes(tmp_path)
    assert verify(open_dataset(tmp_path)) == []
    assert "clip.var" in load_file(tmp_path / "stats.safetensors")


def npy(array):
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()
