"""Pixels are Pillow's, to the last bit."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from shards.image import decode_image, image_header, scale_into, shrink

from .conftest import jpeg


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("kind, name", [("JPEG", "jpg"), ("PNG", "png")])
def test_decoding_equals_pillow(mode: str, kind: str, name: str):
    file = io.BytesIO()
    Image.open(io.BytesIO(jpeg(3, 67))).convert(mode).save(file, kind, quality=80)
    expected = np.asarray(Image.open(file).convert("RGB"))
    np.testing.assert_array_equal(decode_image(file.getvalue(), name), expected)


@pytest.mark.parametrize("size", [1, 4, 7, 16, 31, 32])
def test_shrinking_equals_pillows_box_filter(size: int):
    image = decode_image(jpeg(1), "jpg")
    expected = Image.open(io.BytesIO(jpeg(1))).resize((size, size), Image.Resampling.BOX)
    np.testing.assert_array_equal(shrink(image, size), np.asarray(expected))


def test_shrinking_by_a_whole_factor_is_the_mean():
    image = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    mean = image.reshape(8, 4, 8, 4, 3).mean((1, 3))
    assert np.abs(shrink(image, 8) - mean).max() <= 1.0


def test_shrink_refuses_to_enlarge_or_to_distort():
    with pytest.raises(ValueError, match="32x32, smaller than the 64x64 asked for"):
        shrink(np.zeros((32, 32, 3), np.uint8), 64)
    with pytest.raises(ValueError, match="20x32; needed is a square"):
        shrink(np.zeros((32, 20, 3), np.uint8), 4)


def test_scale_covers_exactly_minus_one_to_one():
    image = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, 2)
    image[:, :, 1] = 255 - image[:, :, 0]
    out = np.empty((3, 16, 16), np.float32)
    scale_into(image, out)
    expected = (image.astype(np.float64) - 127.5) / 127.5
    np.testing.assert_array_equal(out, expected.transpose(2, 0, 1).astype(np.float32))
    assert (out.min(), out.max()) == (-1.0, 1.0)


@pytest.mark.parametrize("data", [b"", b"not an image", jpeg(0)[:100]])
def test_broken_headers_are_named(data: bytes):
    with pytest.raises(ValueError, match=r"k\.jpg: not a readable"):
        image_header(data, "k.jpg")


def test_modes_that_would_lose_something_are_refused():
    file = io.BytesIO()
    Image.new("RGBA", (8, 8)).save(file, "PNG")
    with pytest.raises(ValueError, match="RGBA; convert"):
        image_header(file.getvalue(), "k.png")


@pytest.mark.parametrize("kind, name", [("JPEG", "jpg"), ("PNG", "png")])
def test_cut_off_images_raise(kind: str, name: str):
    data = jpeg(0, 64, kind)
    with pytest.raises(ValueError):
        decode_image(data[: len(data) // 2], name)


@pytest.mark.parametrize("kind", ["BMP", "JPEG"])
def test_only_png_is_read_as_png(kind: str):
    with pytest.raises(ValueError, match="cannot identify"):
        decode_image(jpeg(0, 8, kind), "png")


def test_a_picture_too_large_to_be_honest_is_damage(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ValueError, match="decompression bomb"):
        decode_image(jpeg(0, 32, "PNG"), "png")
