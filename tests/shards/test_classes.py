"""Names of classes: in the manifest, back after its loss, and never at odds with the labels."""

from __future__ import annotations

import json

import pytest

from shards import Sample, ShardWriter, open_dataset, pack
from shards.check.repair import rebuild_indexes
from shards.errors import ManifestError, PackError
from shards.read.mixture import MixedDataset

from .conftest import files_of, make_samples

NAMES = ("ant", "böse", "cat", "dog", "emu")


@pytest.fixture
def named(tmp_path):
    pack(make_samples(20), tmp_path / "data", shard_size=6, classes=NAMES)
    return tmp_path / "data"


def without_levels(count, labels):
    for sample, label in zip(make_samples(count), labels, strict=True):
        yield Sample(sample.key, sample.image, sample.image_format, label=label)


def test_the_manifest_has_the_names(named):
    data = open_dataset(named)
    assert data.manifest.classes == NAMES
    assert data.manifest.has_labels
    assert json.loads((named / "manifest.json").read_text())["classes"] == list(NAMES)
    batch = data.read([3])
    assert batch["label"].tolist() == [data.sample(3).label]


def test_a_manifest_without_names_is_the_one_of_before(packed):
    found = json.loads((packed / "manifest.json").read_text())
    assert "classes" not in found
    assert open_dataset(packed).manifest.classes == ()


def test_the_names_come_back_with_the_statistics(named):
    before = files_of(named)
    (named / "manifest.json").unlink()
    rebuild_indexes(named)
    assert open_dataset(named).manifest.classes == NAMES
    again = files_of(named)
    assert again["stats.safetensors"] == before["stats.safetensors"]


@pytest.mark.parametrize("label", [None, -1, 5])
def test_a_label_that_is_no_class_is_refused(tmp_path, label):
    with pytest.raises(PackError, match=rf"face-0002: label {label} is not one of the 5 classes"):
        pack(without_levels(3, [0, 4, label]), tmp_path / "data", classes=NAMES)


def test_a_packing_goes_on_with_the_same_classes_alone(tmp_path):
    samples = list(make_samples(10))
    out = tmp_path / "data"
    with ShardWriter(out, shard_size=4, classes=NAMES) as writer:
        for sample in samples[:6]:
            writer.add(sample)
    for other in ((), NAMES[::-1]):
        with pytest.raises(PackError, match=r"other settings \(classes\)"):
            ShardWriter(out, shard_size=4, classes=other)
    manifest = pack(samples, out, shard_size=4, classes=NAMES)
    assert manifest.classes == NAMES
    pack(samples, tmp_path / "at once", shard_size=4, classes=NAMES)
    assert files_of(out) == files_of(tmp_path / "at once")


def test_a_mix_numbers_the_same_classes_alike(named, tmp_path):
    pack(make_samples(8), tmp_path / "same", classes=NAMES)
    pack(make_samples(8), tmp_path / "other", classes=("a", *NAMES[1:]))
    one = open_dataset(named)
    assert MixedDataset([one, open_dataset(tmp_path / "same")], [1, 1]).manifest.classes == NAMES
    with pytest.raises(ManifestError, match=r"other: its classes are a, böse.*number the same"):
        MixedDataset([one, open_dataset(tmp_path / "other")], [1, 1])
