"""Sharpness falls with blur; near-duplicates are found, in order."""

import imagehash
import numpy as np
import pytest
from PIL import Image, ImageFilter

from dinogen.prepare.faces.crop import Duplicates, laplacian_variance, perceptual_hash


def test_laplacian_variance_by_hand(noise):
    grey = np.asarray(Image.fromarray(noise).convert("L")).astype(float)
    padded = np.pad(grey, 1, mode="symmetric")
    around = padded[:-2, 1:-1] + padded[2:, 1:-1] + padded[1:-1, :-2] + padded[1:-1, 2:]
    assert laplacian_variance(noise) == pytest.approx((around - 4 * grey).var(), rel=1e-4)


def test_blur_lowers_it(astronaut):
    values = [
        laplacian_variance(
            np.asarray(Image.fromarray(astronaut).filter(ImageFilter.GaussianBlur(radius)))
        )
        for radius in (0, 1, 2, 4)
    ]
    assert values == sorted(values, reverse=True)
    assert values[0] > 20 * values[-1]
    assert laplacian_variance(np.full((32, 32, 3), 90, np.uint8)) == 0


def test_hash_is_that_of_imagehash(astronaut):
    expected = imagehash.phash(Image.fromarray(astronaut))
    value = perceptual_hash(astronaut)
    assert value == int("".join("1" if bit else "0" for bit in expected.hash.ravel()), 2)


def test_a_recompressed_photo_is_near_and_another_is_far(astronaut, tmp_path):
    Image.fromarray(astronaut).resize((300, 300)).save(tmp_path / "a.jpg", quality=40)
    again = np.asarray(Image.open(tmp_path / "a.jpg"))
    first, second = perceptual_hash(astronaut), perceptual_hash(again)
    other = perceptual_hash(np.ascontiguousarray(astronaut[::-1]))
    assert (first ^ second).bit_count() <= 4
    assert (first ^ other).bit_count() > 12


@pytest.mark.parametrize("max_distance", [0, 3, 64])
def test_duplicates_equal_a_plain_loop(max_distance):
    rng = np.random.default_rng(max_distance)
    base = rng.integers(0, 2**63, 3000, np.uint64)
    flips = rng.integers(0, 2**6, 3000, np.uint64)  # in the lowest six bits
    values = [int(v) for v in base[rng.integers(0, 1500, 3000)] ^ flips]
    duplicates, kept = Duplicates(max_distance), []
    for number, value in enumerate(values):
        distances = [(value ^ other).bit_count() for _, other in kept]
        nearest = min(distances, default=65)
        expected = (kept[distances.index(nearest)][0], nearest) if nearest <= max_distance else None
        assert duplicates.find(value) == expected
        if expected is None:
            duplicates.add(str(number), value)
            kept.append((str(number), value))
    assert kept


def test_all_64_bits_count():
    duplicates = Duplicates(63)
    duplicates.add("zeros", 0)
    assert duplicates.find(2**64 - 1) is None
    assert duplicates.find(2**63) == ("zeros", 1)
