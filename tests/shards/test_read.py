"""Reading by number: a damaged sample stops it, or the next sound one takes its place."""

from __future__ import annotations

import io
import logging
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset
from PIL import Image

import shards.read.dataset
from shards import CorruptSample, open_dataset
from shards.check.repair import rebuild_indexes
from shards.check.verify import verify
from shards.format.sample import encode
from shards.format.table import OpenFile

from .conftest import jpeg, make_samples
from .test_stream import damage


def test_skipping_takes_the_next_sound_one_in_packed_order(copy, flip, caplog):
    keys = open_dataset(copy).keys()
    lost = [damage(copy, flip, "p4.npy", row) for row in (1, 2)]
    first = keys.index(lost[0])
    data = open_dataset(copy)
    numbers = [first + 1, first - 1, first, first]
    with caplog.at_level(logging.ERROR):
        batch = data.read(numbers, levels=(4,), on_error="skip")
    assert batch["key"] == [keys[first + 2], keys[first - 1], keys[first + 2], keys[first + 2]]
    assert batch["position"].tolist() == numbers
    for row, key in enumerate(batch["key"]):
        sample = data.sample(keys.index(key))
        np.testing.assert_array_equal(batch["pyramid"][4][row], sample.levels["p4"])
        assert batch["label"][row] == sample.label
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == len(lost)
    for key in lost:
        assert any(
            line.startswith("SKIPPED a damaged sample, the next one replaces it: train-00001")
            and key in line
            for line in said
        )
    with pytest.raises(CorruptSample, match=f"{lost[1]}.*checksum"):
        data.read(numbers, levels=(4,))


def test_behind_the_last_sample_comes_the_first(copy):
    keys = open_dataset(copy).keys()
    sorted(copy.glob("train-*.tar"))[-1].unlink()
    data = open_dataset(copy)
    batch = data.read([len(keys) - 1], image_size=8, on_error="skip")
    assert batch["key"] == [keys[0]]
    assert torch.equal(batch["image"], data.read([0], image_size=8)["image"])


def test_when_nothing_is_left_reading_says_so(copy):
    for tar in copy.glob("val-*.tar"):
        tar.unlink()
    with pytest.raises(CorruptSample, match="missing"):
        open_dataset(copy).read([0], split="val", levels=(4,), on_error="skip")


def test_other_words_are_refused(packed):
    with pytest.raises(ValueError, match="on_error must be 'stop' or 'skip', not 'pass'"):
        open_dataset(packed).read([0], on_error="pass")


def test_a_image_too_large_to_be_honest_is_skipped(packed, samples, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    data = open_dataset(packed)
    png = {sample.key for sample in samples if sample.image_format == "png"}
    assert png & set(data.keys())
    batch = data.read(range(data.num_samples()), image_size=8, on_error="skip")
    assert not png & set(batch["key"])


def test_a_sample_with_two_images_is_checked_by_the_one_that_is_read(tmp_path: Path):
    first, second, third = make_samples(3)
    with webdataset.TarWriter(str(tmp_path / "a.tar")) as writer:
        both = {"png": jpeg(7, image_format="PNG"), **encode(first)}
        writer.write({"__key__": first.key, **both})
        writer.write({"__key__": second.key, **encode(second)})
        only = {**encode(third), "png": jpeg(2, image_format="PNG")}
        del only["jpg"]
        writer.write({"__key__": third.key, **only})
    rebuild_indexes(tmp_path)
    data = open_dataset(tmp_path)
    batch = data.read(range(3), image_size=32)
    for row, encoded in enumerate((first.image, second.image, only["png"])):
        pixels = np.asarray(Image.open(io.BytesIO(encoded)), np.float32).transpose(2, 0, 1)
        np.testing.assert_allclose(batch["image"][row], (pixels - 127.5) / 127.5, atol=1e-6)
    # One sample at a time and the whole batch choose alike.
    assert data.sample(0).image == first.image
    assert verify(data) == []


def test_a_file_is_not_closed_while_a_sample_is_read_from_it(packed, monkeypatch):
    data = open_dataset(packed)
    original = shards.read.dataset.read_sample

    def evicted_meanwhile(*args):
        data.table("train")._files.clear()
        return original(*args)

    monkeypatch.setattr(shards.read.dataset, "read_sample", evicted_meanwhile)
    assert data.sample(0).key == data.keys()[0]


@pytest.mark.parametrize("suffix", [".tar", ".index.npz"])
def test_a_slow_fetch_stalls_nobody_else(copy, suffix):
    data = open_dataset(copy)
    folder, asked, go_on = data.source, threading.Event(), threading.Event()

    class Slow:
        num_open = folder.num_open

        def path(self, name: str) -> Path:
            self.wait(name)
            return folder.path(name)

        def open(self, name: str) -> OpenFile:
            self.wait(name)
            return folder.open(name)

        def wait(self, name: str) -> None:
            if name == f"train-00000{suffix}":
                asked.set()
                assert go_on.wait(120)

    data.source = Slow()
    slow = threading.Thread(target=data.read, args=([0],), kwargs={"levels": (4,)})
    other = threading.Thread(target=data.read, args=([16],), kwargs={"levels": (4,)})
    slow.start()
    assert asked.wait(120)
    other.start()
    other.join(5)
    stalled = other.is_alive()
    go_on.set()
    slow.join(120)
    other.join(120)
    assert not stalled


def test_the_error_names_the_way_out_in_python_and_in_the_config():
    error = CorruptSample("a.tar", "key", "jpg", "is damaged")
    assert "data.on_error=skip (in Python on_error='skip')" in str(error)
