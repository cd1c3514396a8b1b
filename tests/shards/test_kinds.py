"""Kinds of files are told by their content, and what is not read has a remedy."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from PIL import Image, features

from shards.image.decode import BadImage, decode
from shards.image.kinds import IMAGE_SUFFIXES, KINDS, PLUGINS, UNREAD, UNREAD_IMAGES, kind_of

from .odd_images import encode, photo

HEADS = {
    b"\x00\x00\x00\x20ftypheic\0\0\0\0mif1heic": "HEIC",
    b"\x00\x00\x00\x1cftypmif1\0\0\0\0mif1heix": "HEIC",
    b"\x00\x00\x00\x1cftypmif1\0\0\0\0mif1avif": "AVIF",
    b"\x00\x00\x00\x18ftypqt  \0\0\0\0qt  ": "a video",
    b"\x00\x00\x00\x18ftypcrx \0\0\0\1crx isom": "a camera raw file",
    b"II*\0\x10\0\0\0CR\2\0": "a camera raw file",
    b"\xff\x0a\xfa\x7f": "JPEG XL",
    b"8BPS\0\1": "a file of a drawing program",
    b"%PDF-1.4": "a PDF",
    b"PK\3\4\x14\0": "an archive",
    b"<?xml version='1.0'?>\n<!-- made by hand -->\n<svg width='9'>": "a vector drawing",
    b"\n<!DOCTYPE HTML><html>": "a page of text",
    b"version https://git-lfs.github.com/spec/v1\n": "a Git LFS pointer",
    b"\0\5\x16\7\0\2\0\0Mac OS X": "a macOS metadata file",
}


@pytest.mark.parametrize(("head", "name"), HEADS.items(), ids=HEADS.values())
def test_what_else_is_found_where_an_image_should_be(head: bytes, name: str):
    kind = kind_of(head.ljust(64, b"\0"))
    assert kind is not None and kind.name == name
    if not kind.plugin:
        with pytest.raises(BadImage) as caught:
            decode(head.ljust(64, b"\0"))
        assert caught.value.reason in ("not_an_image", "unsupported")
        assert caught.value.detail == f"{kind.name}: {kind.remedy}"


def test_every_kind_that_is_read_is_known_by_its_content():
    image = photo(24, 16)
    for kind in KINDS:
        if not kind.plugin:
            assert kind.remedy and not IMAGE_SUFFIXES.intersection(kind.suffixes)
            continue
        data = encode(image, kind.plugin)
        assert kind_of(data[:64]) is kind
        assert decode(data).kind is kind
        assert np.abs(decode(data).pixels.astype(int) - np.asarray(image)).mean() < 12, kind.name
        assert IMAGE_SUFFIXES.issuperset(kind.suffixes)
    assert kind_of(b"") is kind_of(b"BM is no image") is kind_of(bytes(64)) is None


def test_suffixes_are_read_or_have_a_remedy_but_not_both():
    assert not IMAGE_SUFFIXES & UNREAD.keys()
    assert {".jpg", ".jpeg", ".png", ".webp", ".tif", ".bmp", ".gif", ".pgm"} <= IMAGE_SUFFIXES
    assert {".psd", ".svg", ".pdf", ".mp4", ".mov", ".zip", ".7z", ".cr2", ".dng"} <= UNREAD.keys()
    assert {".heic", ".heif", ".avif", ".jp2", ".jxl"} <= IMAGE_SUFFIXES | UNREAD.keys()
    assert ".jxl" in UNREAD_IMAGES and ".zip" not in UNREAD_IMAGES
    assert "EPS" not in PLUGINS


def test_without_pillow_heif_a_heic_file_is_named_with_its_remedy():
    program = """
import sys
sys.modules["pillow_heif"] = None  # as if it were not installed
from shards.image.kinds import IMAGE_SUFFIXES, UNREAD
from shards.image.decode import BadImage, decode
assert ".heic" not in IMAGE_SUFFIXES and "pip install pillow-heif" in UNREAD[".heic"]
try:
    decode(b"\\0\\0\\0\\x20ftypheic\\0\\0\\0\\0mif1heic" + bytes(99))
except BadImage as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("unsupported: HEIC: install pillow-heif")


@pytest.mark.parametrize("kind", ["HEIF", "AVIF"])
def test_photos_of_phones(kind: str):
    if kind == "HEIF":
        pytest.importorskip("pillow_heif", reason="HEIC is read by pillow-heif")
    elif not features.check("avif"):
        pytest.skip("this Pillow does not read AVIF")
    upright = photo(64, 48)
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = upright.transpose(Image.Transpose.ROTATE_90)
    found = decode(encode(turned, kind, quality=95, exif=exif.tobytes())).pixels
    assert found.shape == (48, 64, 3)
    assert np.abs(found.astype(int) - np.asarray(upright)).mean() < 6
    from shards.image import colour

    wide = decode(encode(upright, kind, quality=95, icc_profile=colour.adobe_rgb())).pixels
    assert np.abs(wide.astype(int) - np.asarray(upright)).mean() > 4
    clear = upright.convert("RGBA")
    clear.putalpha(0)
    assert (decode(encode(clear, kind)).pixels > 250).all()
