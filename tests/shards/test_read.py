"""Reading by number: a damaged sample stops it, or the next sound one takes its place."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch

from shards import CorruptSample, open_dataset

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
            line.startswith("SKIPPED a damaged sample, the next one takes its place: train-00001")
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
    with pytest.raises(ValueError, match="on_error is 'stop' or 'skip', not 'pass'"):
        open_dataset(packed).read([0], on_error="pass")
