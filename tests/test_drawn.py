"""Drawn faces are what they are said to be, and the feature extractor of text control can tell."""

from __future__ import annotations

import itertools

import numpy as np
import torch

from tests import drawn, drawn_extractor


def test_every_pair_of_values_is_seen_and_no_held_out_combination_is():
    rows = drawn.combinations()
    out = drawn.held_out(rows)
    assert (len(rows), out.sum()) == (192, 48)
    for a, b in itertools.combinations(range(5), 2):
        pairs = {tuple(pair) for pair in rows[:, [a, b]]}
        assert {tuple(pair) for pair in rows[~out][:, [a, b]]} == pairs
    for unseen in (False, True):
        assert (drawn.held_out(drawn.some_attributes(300, 0, unseen)) == unseen).all()


def test_a_image_follows_from_its_attributes_seed_and_row():
    rows = drawn.combinations()[::5]
    images = drawn.draw(rows, 3)
    assert images.shape == (len(rows), 32, 32, 3) and images.dtype == np.uint8
    assert np.array_equal(drawn.draw(rows[:5], 3), images[:5])
    assert (drawn.draw(rows, 4) != images).any((1, 2, 3)).all()
    for column in range(5):
        others = rows.copy()
        others[:, column] = (others[:, column] + 1) % len(drawn.VALUES[drawn.NAMES[column]])
        changed = np.abs(drawn.draw(others, 3).astype(int) - images).max((1, 2, 3))
        assert changed.min() > 25


def test_larger_images_show_the_same():
    rows = drawn.combinations()[::7]
    small, large = drawn.draw(rows, 3), drawn.draw(rows, 3, 64)
    shrunk = large.reshape(len(rows), 32, 2, 32, 2, 3).mean((2, 4))
    assert np.abs(shrunk - small).mean() < 3


def test_captions_say_what_they_name():
    rows = drawn.some_attributes(200, 0)
    captions, named = drawn.some_captions(rows, 0, share=0.5)
    assert named.any(1).all() and not named.all()
    assert len(set(captions)) > 150
    for row, text, names in zip(rows, captions, named, strict=True):
        for column, name in enumerate(drawn.NAMES):
            said = [
                value
                for value in range(len(drawn.VALUES[name]))
                for wording in (0, 1)
                if drawn.phrase(name, value, wording) in text.split(", ")
            ]
            assert set(said) == ({row[column]} if names[column] else set())
    plain = drawn.caption(np.array([2, 1, 1, 1, 0]))
    assert plain == "a face, red hair, tan skin, glasses, smiling, on a blue background"
    assert drawn.caption(np.array([2, 1, 0, 1, 0]), ("smile",)) == "a face, frowning"


def test_the_extractor_knows_unseen_combinations_blurred_ones_and_larger_ones(tmp_path_factory):
    extractor = drawn_extractor.shared_extractor(tmp_path_factory)
    rows = drawn.some_attributes(400, 200, unseen=True)
    images = drawn.as_tensor(drawn.draw(rows, 201))
    accuracy = drawn_extractor.accuracy(extractor.attributes(images), rows)
    assert min(accuracy.values()) >= 0.98, accuracy
    blurred = torch.nn.functional.avg_pool2d(images, 3, 1, 1, count_include_pad=False)
    accuracy = drawn_extractor.accuracy(extractor.attributes(blurred), rows)
    assert min(accuracy.values()) >= 0.95, accuracy
    large = drawn.as_tensor(drawn.draw(rows[:100], 201, 64))
    accuracy = drawn_extractor.accuracy(extractor.attributes(large), rows[:100])
    assert min(accuracy.values()) >= 0.98, accuracy
