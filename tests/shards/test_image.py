"""Pixels are Pillow's, to the last bit; what decides them is the content, in shards too."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from shards import open_dataset
from shards.image.decode import (
    BadImage,
    check_image,
    decode,
    decode_image,
    decode_rgbx,
    image_header,
    shrink,
    write_into,
)

from .conftest import jpeg
from .odd_images import encode, photo, png


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("kind, name", [("JPEG", "jpg"), ("PNG", "png"), ("WEBP", "webp")])
def test_decoding_equals_pillow(mode: str, kind: str, name: str):
    data = encode(photo(67, 67).convert(mode), kind, quality=80)
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    np.testing.assert_array_equal(decode_image(data, name), expected)
    # The second of two equal headers takes a shorter way.
    for _ in range(2):
        np.testing.assert_array_equal(decode_rgbx(memoryview(data), name)[..., :3], expected)


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("subsampling", [0, 1, 2, "4:1:1"])
@pytest.mark.parametrize("rows", [0, 1])
def test_jpegs_of_all_layouts_equal_pillow(mode, progressive, subsampling, rows):
    data = encode(
        photo(83, 61).convert(mode),
        "JPEG",
        subsampling=subsampling,
        progressive=progressive,
        restart_marker_rows=rows,
    )
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    np.testing.assert_array_equal(decode(data).pixels, expected)
    np.testing.assert_array_equal(decode_image(data, "jpg"), expected)


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
    with pytest.raises(ValueError, match="32x32, smaller than the requested 64x64"):
        shrink(np.zeros((32, 32, 3), np.uint8), 64)
    with pytest.raises(ValueError, match="20x32, expected a square"):
        shrink(np.zeros((32, 20, 3), np.uint8), 4)


def test_scale_covers_exactly_minus_one_to_one():
    image = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, 2)
    image[:, :, 1] = 255 - image[:, :, 0]
    out = np.empty((3, 16, 16), np.float32)
    write_into(image, out)
    expected = (image.astype(np.float64) - 127.5) / 127.5
    np.testing.assert_array_equal(out, expected.transpose(2, 0, 1).astype(np.float32))
    assert (out.min(), out.max()) == (-1.0, 1.0)


@pytest.mark.parametrize("data", [b"", b"not an image", jpeg(0)[:100]])
def test_broken_headers_are_named(data: bytes):
    for check in (image_header, check_image):
        with pytest.raises(ValueError, match=r"k\.jpg: (empty|not_an_image|truncated)"):
            check(data, "k.jpg")


def test_a_header_says_the_size_of_the_upright_image():
    exif = Image.Exif()
    exif[0x0112] = 6
    for kind in ("JPEG", "PNG", "WEBP", "TIFF"):
        options = {} if kind == "TIFF" else {"exif": exif}
        expected = (40, 20) if kind == "TIFF" else (20, 40)
        assert image_header(encode(photo(40, 20), kind, **options)) == expected
    xmp = b'<x:xmpmeta><rdf:Description tiff:Orientation="8"/></x:xmpmeta>'
    data = encode(photo(40, 20), "JPEG", xmp=xmp)
    assert image_header(data) == (20, 40) == decode(data).pixels.shape[1::-1]


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "I;16"])
def test_modes_that_would_lose_something_are_not_packed(mode: str):
    with pytest.raises(ValueError, match=f"k.png: mode {mode}; convert"):
        check_image(encode(photo(8, 8).convert(mode), "PNG"), "k.png")
    with pytest.raises(ValueError, match="mode CMYK"):
        check_image(encode(photo(8, 8).convert("CMYK"), "JPEG"), "k.jpg")
    with pytest.raises(ValueError, match="mode RGB;16"):
        check_image(png(np.zeros((4, 4, 3), np.uint16)), "k.png")


def test_what_is_packed_is_what_its_name_says():
    assert check_image(jpeg(0), "k.jpg") == (32, 32)
    with pytest.raises(ValueError, match=r"k\.png: holds JPEG; set the format"):
        check_image(jpeg(0), "k.png")


@pytest.mark.parametrize("kind, name", [("JPEG", "jpg"), ("PNG", "png"), ("WEBP", "webp")])
def test_cut_off_images_raise(kind: str, name: str):
    data = jpeg(0, 64, kind)
    with pytest.raises(ValueError, match="truncated"):
        decode_image(data[: len(data) // 2], name)


def test_the_content_decides_and_not_the_name():
    for kind in ("JPEG", "PNG", "BMP", "GIF", "WEBP"):
        data = encode(photo(20, 10), kind)
        expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
        for name in ("jpg", "png", "webp"):
            np.testing.assert_array_equal(decode_image(data, name), expected)
    # Pillow would start Ghostscript for it.
    with pytest.raises(ValueError, match="unsupported: a vector drawing: render it to PNG"):
        decode_image(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "png")


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF", "JPEG2000"])
def test_too_many_pixels_are_refused_before_they_are_decoded(kind, monkeypatch):
    data = encode(photo(32, 32), kind)
    assert decode(data, 32 * 32).pixels.shape == (32, 32, 3)
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    monkeypatch.setattr("simplejpeg.decode_jpeg", lambda *_: pytest.fail("decoded"))
    with pytest.raises(BadImage, match="too_large: 32x32 = 1024 pixels, the limit is 1023"):
        decode(data, 32 * 32 - 1)
    monkeypatch.setattr("shards.image.decode.MAX_PIXELS", 32 * 32 - 1)
    monkeypatch.setattr("shards.image.decode._last_plain", b"")
    with pytest.raises(ValueError, match="too_large"):
        decode_image(data, "jpg" if kind == "JPEG" else "png")


def test_damage_anywhere_is_told_by_one_error():
    rng = np.random.default_rng(1)
    for kind in ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF", "PPM", "JPEG2000"):
        whole = encode(photo(40, 30), kind)
        for _ in range(150):
            data = bytearray(whole)
            for place in rng.integers(0, len(data), rng.integers(1, 9)):
                data[place] = rng.integers(256)
            del data[rng.integers(len(data), 2 * len(data)) :]
            for read in (lambda data: decode(data).pixels, lambda data: decode_rgbx(data, "jpg")):
                try:
                    pixels = read(bytes(data))
                except BadImage as error:
                    assert error.reason and error.detail
                else:
                    assert pixels.dtype == np.uint8 and pixels.shape[2] in (3, 4)


def test_members_of_foreign_tars_are_read_by_the_same_rule(tmp_path: Path):
    upright = photo(48, 48)
    exif = Image.Exif()
    exif[0x0112] = 3
    clear = upright.convert("RGBA")
    clear.putalpha(0)
    members = {
        "a.jpg": (encode(upright.rotate(180), "JPEG", exif=exif, quality=95), 6.0),
        "b.png": (encode(upright.rotate(180), "PNG", exif=exif), 0.0),
        "c.png": (png(np.asarray(upright).astype(np.uint16) * 257), 0.0),
        "d.jpg": (encode(upright, "JPEG", quality=95)[:-2], 6.0),
        "e.jpg": (encode(upright.convert("CMYK"), "JPEG", quality=95), 9.0),
        "f.png": (encode(upright.convert("P", palette=Image.Palette.ADAPTIVE), "PNG"), 6.0),
        "g.png": (png(np.asarray(upright.convert("L")).astype(np.uint16) * 257), None),
        "h.png": (encode(clear, "PNG"), None),
    }
    with tarfile.open(tmp_path / "train-000000.tar", "w") as tar:
        for name, (data, _) in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    batch = open_dataset(tmp_path).read(list(range(len(members))), image_size=48)
    pixels = (batch["image"].numpy() * 127.5 + 127.5).transpose(0, 2, 3, 1)
    for found, (name, (_, most)) in zip(pixels, members.items(), strict=True):
        if most is not None:
            assert np.abs(found - np.asarray(upright)).mean() <= most, name
    np.testing.assert_allclose(pixels[6, ..., 1], np.asarray(upright.convert("L")), atol=1e-3)
    assert (pixels[7] == 255).all()
