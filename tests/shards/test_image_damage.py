"""Damage in coded data is an error; what stands beside them, and a missing end, do no harm."""

from __future__ import annotations

import io
import zlib

import numpy as np
import pytest
from PIL import Image, features

from shards.image.decode import BadImage, decode

from .odd_images import chunk, encode, photo, png

JPEGS = {
    "baseline": {},
    "progressive": {"progressive": True},
    "restarts": {"restart_marker_rows": 1},
    "optimized": {"optimize": True},
}
SOUND = photo(96, 80)


def reason(data: bytes) -> str:
    with pytest.raises(BadImage) as caught:
        decode(data)
    return caught.value.reason


def same(data: bytes, whole: bytes) -> bool:
    """Whether two files show the same."""
    return np.array_equal(decode(data).pixels, decode(whole).pixels)


@pytest.fixture(params=JPEGS, scope="module")
def jpeg(request: pytest.FixtureRequest) -> bytes:
    return encode(SOUND, "JPEG", **JPEGS[request.param])


@pytest.mark.parametrize("mode", ["L", "CMYK"])
def test_a_jpeg_without_its_end_marker_is_used(jpeg: bytes, mode: str):
    other = encode(SOUND.convert(mode), "JPEG")
    for whole in (jpeg, other):
        assert whole.endswith(b"\xff\xd9")
        assert same(whole[:-2], whole) and same(whole[:-1], whole)
        assert not decode(whole[:-2]).plain  # other programs refuse it


def test_a_jpeg_cut_anywhere_before_is_not(jpeg: bytes):
    lengths = {*range(2, len(jpeg), len(jpeg) // 60), *range(len(jpeg) - 12, len(jpeg) - 2)}
    for length in lengths - {len(jpeg) - 2, len(jpeg) - 1}:
        assert reason(jpeg[:length]) in ("truncated", "not_an_image"), length
        # As some downloads end: with a marker behind what has arrived.
        assert reason(jpeg[:length] + b"\xff\xd9") in ("truncated", "corrupt", "not_an_image")


def test_scans_that_never_come_are_missing():
    whole = encode(SOUND, "JPEG", progressive=True)
    starts = [i for i in range(len(whole)) if whole[i : i + 2] == b"\xff\xda"]
    assert len(starts) > 6
    for start in starts[1:]:
        # Pillow shows these without a word, blurred.
        assert np.asarray(Image.open(io.BytesIO(whole[:start] + b"\xff\xd9"))).shape == (80, 96, 3)
        assert reason(whole[:start] + b"\xff\xd9") == "truncated"
        assert reason(whole[:start]) == "truncated"


def test_zeros_inside_a_jpeg_are_damage(jpeg: bytes):
    size = len(jpeg)
    for start in range(size // 2, size - 300, 40):
        assert reason(jpeg[:start] + bytes(200) + jpeg[start + 200 :]) in ("truncated", "corrupt")
        assert reason(jpeg[:start] + bytes(size - start)) in ("truncated", "corrupt")


def test_what_lies_behind_the_end_does_no_harm(jpeg: bytes):
    film = b"\0\0\0\x18ftypmp42" + bytes(range(256)) * 9
    second = encode(photo(20, 20), "JPEG")
    for rest in (film, second, second[:99], bytes(5000)):
        assert same(jpeg + rest, jpeg) and decode(jpeg + rest).plain
    data = png(np.asarray(SOUND))
    assert same(data + film, data)


def test_odd_headers_of_jpegs_do_no_harm():
    whole = encode(SOUND, "JPEG")
    tables = whole.index(b"\xff\xdb")
    scan = whole.index(b"\xff\xda")
    end = scan + 2 + int.from_bytes(whole[scan + 2 : scan + 4], "big")
    for odd in (
        whole[:tables] + b"\0\1stray" + whole[tables:],
        whole[:tables] + b"\xff\xff\xff" + whole[tables:],
        whole.replace(b"JFIF\0\1", b"JFIF\0\7"),
        whole[: end - 3] + b"\0\0\0" + whole[end:],  # as some webcams write it
        whole[:2] + b"\xff\xee\0\x0eAdobe\0d\0\0\0\0\7" + whole[2:],
        whole[:2] + b"\xff\xe1\0\x0eExif\0\0broken" + whole[2:],
        whole[:2] + b"\xff\xe2\0\x14ICC_PROFILE\0\1\1broken"[:22] + whole[2:],
    ):
        assert same(odd, whole)
        # and damage behind such a header is found all the same
        assert reason(odd[:-200] + b"\xff\xd9") in ("truncated", "corrupt")


def test_bytes_too_many_in_coded_data_are_damage():
    whole = encode(SOUND, "JPEG")
    assert reason(whole[:-2] + bytes(40) + whole[-2:]) == "corrupt"
    middle = len(whole) * 2 // 3
    assert reason(whole[:middle] + whole[middle + 300 :]) == "truncated"


def test_a_jpeg_of_12_bits_is_named():
    whole = bytearray(encode(SOUND, "JPEG"))
    whole[whole.index(b"\xff\xc0") + 4] = 12
    assert reason(bytes(whole)) == "unsupported"


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "1", "RGBA"])
def test_a_png_without_its_end_is_used_if_all_rows_are_there(mode: str):
    whole = encode(SOUND.convert(mode), "PNG")
    for length in range(len(whole) - 16, len(whole)):  # the last chunk, and the sum before it
        assert same(whole[:length], whole)
    for length in (*range(len(whole) - 60, len(whole) - 24), *range(9, len(whole) - 24, 97)):
        assert reason(whole[:length]) == "truncated"


def test_a_wrong_checksum_counts_where_pixels_are():
    array = np.asarray(SOUND)
    whole = png(array)
    place = whole.index(b"IDAT") + 300
    changed = whole[:place] + bytes((whole[place] ^ 1,)) + whole[place + 1 :]
    assert reason(changed) == "corrupt"
    palette = encode(SOUND.quantize(16), "PNG", transparency=3)
    for name in (b"PLTE", b"tRNS", b"IHDR"):
        place = palette.index(name) + 4
        assert reason(palette[:place] + b"\xaa" + palette[place + 1 :]) == "corrupt", name
    for name in (b"tEXt", b"eXIf", b"gAMA", b"iCCP", b"sRGB", b"prVt"):
        odd = png(array, [chunk(name, b"a\0bc", checksum=1)])
        assert same(odd, whole) and not decode(odd).plain


def test_texts_of_any_size_do_no_harm():
    large = zlib.compress(bytes(70 << 20), 9)
    whole = png(np.asarray(SOUND))
    for odd in (
        chunk(b"zTXt", b"parameters\0\0" + large),
        chunk(b"iTXt", b"parameters\0\1\0\0\0" + large),
        chunk(b"iCCP", b"a profile\0\0" + large),
        chunk(b"zTXt", b"broken\0\0" + large[:50]),
        chunk(b"tEXt", b"x\0" + b"long " * 400_000),
        chunk(b"eXIf", b"garbage-garbage"),
        chunk(b"tEXt", b"Raw profile type exif\0\nexif\n 4\nzz"),
    ):
        assert same(png(np.asarray(SOUND), [odd]), whole)


def test_a_png_of_apple_is_named():
    with pytest.raises(BadImage, match="unsupported: a PNG in Apple's own format: convert it"):
        decode(
            png(np.asarray(SOUND), []).replace(
                b"\0\0\0\rIHDR", chunk(b"CgBI", b"1234") + b"\0\0\0\rIHDR"
            )
        )


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("WEBP", {}),
        ("WEBP", {"lossless": True}),
        ("TIFF", {}),
        ("TIFF", {"compression": "tiff_lzw"}),
        ("TIFF", {"compression": "jpeg"}),
        ("BMP", {}),
        ("GIF", {}),
        ("PPM", {}),
        ("JPEG2000", {}),
        ("AVIF", {}),
        ("HEIF", {}),
    ],
)
def test_other_kinds_cut_off_are_never_used_in_part(kind: str, options: dict):
    if kind == "HEIF":
        pytest.importorskip("pillow_heif", reason="HEIC is read by pillow-heif")
    elif kind == "AVIF" and not features.check("avif"):
        pytest.skip("this Pillow does not read AVIF")
    whole = encode(SOUND, kind, **options)
    used = 0
    for length in {*range(1, len(whole), len(whole) // 60), *range(len(whole) - 9, len(whole))}:
        try:
            pixels = decode(whole[:length]).pixels
        except BadImage as error:
            assert error.reason in ("truncated", "corrupt", "not_an_image")
        else:
            used += 1
            assert np.array_equal(pixels, decode(whole).pixels), length
    assert used <= 2
    if kind in ("AVIF", "HEIF", "JPEG2000"):  # as a download leaves it that broke off
        assert reason(whole[:-300] + bytes(300)) == "truncated"


def test_a_long_plain_wall_is_no_damage():
    wall = Image.new("RGB", (1500, 1000), (250, 250, 250))
    wall.paste(SOUND, (700, 0))
    for kind in ("WEBP", "JPEG2000", "AVIF"):
        if kind != "AVIF" or features.check("avif"):
            assert decode(encode(wall, kind)).pixels.shape == (1000, 1500, 3)
