"""Packing: plain webdataset tars, the same bytes every time, resumable, refusing what is wrong."""

from __future__ import annotations

import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image
from safetensors.numpy import load_file

import shards
from shards import FinishedError, Sample, ShardsError, ShardWriter, open_dataset, pack
from shards.errors import PackError
from shards.write.shard_writer import split_of

from .conftest import CHANNELS, files_of, jpeg, make_samples

SETTINGS = {"shard_size": 7, "val_fraction": 0.2, "test_fraction": 0.1, "guide": {"name": "g"}}


def test_plain_webdataset_reads_the_same_samples(packed: Path, samples: list[Sample]):
    by_key = {sample.key: sample for sample in samples}
    found = []
    for tar in sorted(packed.glob("*.tar")):
        for raw in webdataset.WebDataset(str(tar), shardshuffle=False):
            key = raw["__key__"]
            sample = by_key[key]
            found.append(key)
            pixels = np.asarray(Image.open(io.BytesIO(raw[sample.image_format])))
            expected = np.asarray(Image.open(io.BytesIO(sample.image)))
            np.testing.assert_array_equal(pixels, expected)
            assert json.loads(raw["json"]) == {**sample.meta, "label": sample.label}
            for name, values in sample.levels.items():
                array = np.load(io.BytesIO(raw[f"{name}.npy"]), allow_pickle=False)
                assert array.dtype == np.float16
                np.testing.assert_array_equal(array, values)
            extra = set(raw) - {"__key__", "__url__", "__local_path__"}
            assert extra == {sample.image_format, "json", "p4.npy", "p8.npy", "p16.npy"}
    assert sorted(found) == sorted(by_key)


def test_the_same_input_gives_the_same_bytes(tmp_path: Path):
    for name in ("a", "b"):
        pack(make_samples(30), tmp_path / name, **SETTINGS)
    a, b = files_of(tmp_path / "a"), files_of(tmp_path / "b")
    assert a == b
    assert {"manifest.json", "stats.safetensors", "train-00000.tar"} <= set(a)
    assert not [name for name in a if name.startswith(".") or name == "packing.json"]


def test_manifest_says_what_the_files_are(packed: Path, samples: list[Sample]):
    manifest = json.loads((packed / "manifest.json").read_bytes())
    assert sum(split["num_samples"] for split in manifest["splits"].values()) == len(samples)
    for shard in manifest["shards"]:
        data = (packed / shard["name"]).read_bytes()
        assert len(data) == shard["num_bytes"]
        assert hashlib.sha256(data).hexdigest() == shard["sha256"]
    assert (manifest["image_size"], manifest["resize_filter"]) == (32, "box")
    assert manifest["guide"] == {"name": "noise", "random": True}
    assert manifest["levels"]["p8"]["grid"] == 8
    statistics = (packed / manifest["statistics"]["file"]).read_bytes()
    assert hashlib.sha256(statistics).hexdigest() == manifest["statistics"]["sha256"]


def test_statistics_are_those_of_the_train_split(packed: Path, samples: list[Sample]):
    data = open_dataset(packed)
    train = [s for s in samples if split_of(s.key, 0.15, 0.1) == "train"]
    assert data.keys("train") == [s.key for s in train]
    stored = load_file(packed / "stats.safetensors")
    for name in ("p4", "p8", "p16"):
        stack = np.stack([s.levels[name] for s in train]).astype(np.float64)
        np.testing.assert_allclose(stored[f"{name}.mean"], stack.mean(0), rtol=1e-6)
        np.testing.assert_allclose(data.level_variance(name), stack.var(0), rtol=1e-6)
        np.testing.assert_allclose(data.total_variance(name), stack.var(0).mean(), rtol=1e-12)
        # What a generator that always answers with the mean would lose.
        constant = ((stack - stack.mean(0)) ** 2).mean()
        np.testing.assert_allclose(data.total_variance(name), constant, rtol=1e-12)
    assert set(stored) == {
        f"{name}.{kind}" for name in ("p4", "p8", "p16") for kind in ("mean", "var")
    }


def test_splits_depend_on_the_key_alone():
    keys = [f"k{i}" for i in range(4000)]
    splits = {key: split_of(key, 0.1, 0.05) for key in keys}
    counts = {name: list(splits.values()).count(name) for name in ("train", "val", "test")}
    # Binomial spread of the counts is 19 and 14.
    assert abs(counts["val"] - 400) < 80
    assert abs(counts["test"] - 200) < 60
    # A larger split keeps what it had.
    for key in keys:
        if splits[key] != "train":
            assert split_of(key, 0.2, 0.15) == splits[key]


@pytest.mark.parametrize("stop", [0, 1, 6, 7, 8, 20, 29])
def test_an_interrupted_packing_is_taken_up(tmp_path: Path, stop: int):
    pack(make_samples(30), tmp_path / "whole", **SETTINGS)
    with ShardWriter(tmp_path / "part", **SETTINGS) as writer:
        for sample in make_samples(stop):
            writer.add(sample)
    with pytest.raises(ShardsError, match="run the same command again"):
        open_dataset(tmp_path / "part")
    with ShardWriter(tmp_path / "part", **SETTINGS) as writer:
        done = writer.completed_keys()
        assert len(done) % 7 == 0
        for sample in make_samples(30):
            if sample.key not in done:
                writer.add(sample)
        writer.finish()
    assert files_of(tmp_path / "part") == files_of(tmp_path / "whole")


def test_a_killed_packing_is_taken_up(tmp_path: Path):
    pack(make_samples(30), tmp_path / "whole", **SETTINGS)
    script = textwrap.dedent(
        f"""
        import os, signal
        from pathlib import Path
        from shards import pack
        from tests.shards.conftest import make_samples
        def until_killed():
            for i, sample in enumerate(make_samples(30)):
                if i == 23:
                    os.kill(os.getpid(), signal.SIGKILL)
                yield sample
        pack(until_killed(), Path({str(tmp_path / "part")!r}), **{SETTINGS!r})
        """
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", script], cwd=root, env={**os.environ})
    assert done.returncode == -signal.SIGKILL
    assert list((tmp_path / "part").glob(".*.tmp"))
    pack(make_samples(30), tmp_path / "part", **SETTINGS)
    assert files_of(tmp_path / "part") == files_of(tmp_path / "whole")


def test_a_shard_put_in_place_but_not_recorded_is_made_again(tmp_path: Path):
    pack(make_samples(30), tmp_path / "whole", **SETTINGS)
    with ShardWriter(tmp_path / "part", **SETTINGS) as writer:
        for sample in make_samples(20):
            writer.add(sample)
    (tmp_path / "part" / "train-00009.tar").write_bytes(b"half")
    pack(make_samples(30), tmp_path / "part", **SETTINGS)
    assert files_of(tmp_path / "part") == files_of(tmp_path / "whole")


def test_the_old_name_of_the_writer_still_works():
    assert shards.ShardSink is shards.ShardWriter
    assert "ShardSink" in dir(shards)


def test_resuming_refuses_other_settings_and_other_samples(tmp_path: Path):
    with ShardWriter(tmp_path / "x", **SETTINGS) as writer:
        for sample in make_samples(20):
            writer.add(sample)
    with ShardWriter(tmp_path / "x", **SETTINGS) as writer:
        lost = min(writer.completed_keys())
    with pytest.raises(PackError, match=r"other settings.*shard_size"):
        pack(make_samples(30), tmp_path / "x", **{**SETTINGS, "shard_size": 8})
    with pytest.raises(PackError, match=f"'{lost}' .* no longer in the input"):
        pack((s for s in make_samples(30) if s.key != lost), tmp_path / "x", **SETTINGS)
    with pytest.raises(PackError, match="changed since"):
        tar = tmp_path / "x" / "train-00000.tar"
        tar.write_bytes(tar.read_bytes()[:-1] + b"x")
        pack(make_samples(30), tmp_path / "x", **SETTINGS)


def test_a_finished_dataset_and_foreign_tars_are_left_alone(packed: Path, tmp_path: Path):
    with pytest.raises(FinishedError, match="finished dataset") as caught:
        pack(make_samples(3), packed)
    assert isinstance(caught.value, PackError)
    assert caught.value.manifest == packed / "manifest.json"
    (tmp_path / "mine.tar").write_bytes(b"")
    with pytest.raises(PackError, match=r"mine\.tar, which is not part"):
        pack(make_samples(3), tmp_path)


def test_two_packings_cannot_share_a_folder(tmp_path: Path):
    with ShardWriter(tmp_path / "x"), pytest.raises(PackError, match="another process"):
        ShardWriter(tmp_path / "x")


def test_wrong_samples_are_named(tmp_path: Path):
    good, other = list(make_samples(2))
    cases = {
        r"'face-0000' occurs twice": [good, good],
        r"face-0001: the image is 16x16, but earlier ones are 32x32": [
            good, replace(other, image=jpeg(0, 16)),
        ],
        r"face-0001: has levels p4 \(16, 6\), but earlier samples have p16": [
            good, replace(other, levels={"p4": other.levels["p4"]}),
        ],
        r"face-0000\.jpg: not_an_image": [replace(good, image=b"no")],
        r"face-0000: level p4 is not finite": [
            replace(good, levels={"p4": np.full((16, CHANNELS), np.nan)}),
        ],
        r"no sample for the train split": [],
    }  # fmt: skip
    for i, (message, samples) in enumerate(cases.items()):
        with pytest.raises(PackError, match=message):
            pack(samples, tmp_path / str(i))
        assert not (tmp_path / str(i) / "manifest.json").exists()
        assert not list((tmp_path / str(i)).glob(".*.tmp"))


def test_packing_holds_one_sample_at_a_time(tmp_path: Path):
    import weakref

    alive: list[weakref.ref] = []

    def watched():
        for sample in make_samples(40):
            alive.append(weakref.ref(sample))
            yield sample
            assert sum(ref() is not None for ref in alive) <= 2

    pack(watched(), tmp_path / "x", shard_size=10)
    assert len(alive) == 40


def test_datasets_without_levels_or_labels(tmp_path: Path):
    plain = [replace(s, levels={}) for s in make_samples(5, labels=False)]
    manifest = pack(plain, tmp_path / "x")
    assert (manifest.levels, manifest.statistics, manifest.has_labels) == ({}, None, False)
    batch = open_dataset(tmp_path / "x").read(range(5), image_size=32)
    assert "label" not in batch
    assert batch["pyramid"] == {}
    with pytest.raises(ShardsError, match="no level p4; its levels are: none"):
        open_dataset(tmp_path / "x").level_variance(4)
