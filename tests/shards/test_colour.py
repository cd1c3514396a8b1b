"""Colours of every profile become sRGB; sRGB itself stays as it is, to the last bit."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms

from shards.image import colour
from shards.image.decode import BadImage, decode

from .odd_images import chunk, encode, photo, png

SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
# Of sRGB, linear, by the standards' own matrices: IEC 61966-2-1, Adobe RGB (1998), SMPTE EG 432-1.
TO_XYZ = np.array(
    [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]], np.float64
)
ADOBE = np.array(
    [[0.57667, 0.18556, 0.18823], [0.29734, 0.62736, 0.07529], [0.02703, 0.07069, 0.99134]]
)
P3 = np.array([[0.48657, 0.26567, 0.19822], [0.22897, 0.69174, 0.07929], [0.0, 0.04511, 1.04394]])
# Muted colours, which lie in every gamut.
MUTED = Image.fromarray((80 + np.asarray(photo(64, 64)) * 0.4).astype(np.uint8))


def linear(values):
    values = np.asarray(values, np.float64) / 255
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def coded(light):
    light = light.clip(0, 1)
    return 255 * np.where(light <= 0.0031308, light * 12.92, 1.055 * light ** (1 / 2.4) - 0.055)


def in_adobe_rgb(image: Image.Image) -> Image.Image:
    light = linear(image) @ (np.linalg.inv(ADOBE) @ TO_XYZ).T
    return Image.fromarray((255 * light.clip(0, 1) ** (256 / 563)).round().astype(np.uint8))


def in_p3(image: Image.Image) -> Image.Image:
    light = linear(image) @ (np.linalg.inv(P3) @ TO_XYZ).T
    return Image.fromarray(coded(light).round().astype(np.uint8))


def off(data: bytes, image: Image.Image = MUTED) -> float:
    """The largest difference of the means of blocks, of 255; noise of a JPEG is far below 1."""
    difference = decode(data).pixels.astype(float) - np.asarray(image.convert("RGB"))
    blocks = difference.reshape(8, 8, 8, 8, 3).mean((1, 3))
    return float(np.abs(blocks).max())


def cameras_exif(space: int = 0xFFFF, index: str = "R03") -> Image.Exif:
    exif = Image.Exif()
    exif[0x8769] = {0xA001: space, 0xA005: {1: index}}
    return exif


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_profiles_are_applied_in_every_kind_of_file(kind: str):
    options = {"quality": 97} if kind in ("JPEG", "WEBP") else {}
    wide = encode(in_p3(MUTED), kind, icc_profile=colour.coded_profile(12, 13), **options)
    bare = encode(in_p3(MUTED), kind, **options)
    assert off(wide) < 2 < 4 < off(bare)
    assert not decode(wide).plain
    adobe = encode(in_adobe_rgb(MUTED), kind, icc_profile=colour.adobe_rgb(), **options)
    assert off(adobe) < 2 < 4 < off(encode(in_adobe_rgb(MUTED), kind, **options))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_srgb_profiles_change_nothing(kind: str, mode: str):
    image = photo(61, 47).convert(mode)
    grey = colour._grey_profile(colour._SRGB_CURVE)
    for profile in (
        SRGB,
        colour.coded_profile(1, 13) or SRGB,
        grey,
        b"no profile at all",
        SRGB[:200],
    ):
        with_profile = decode(encode(image, kind, icc_profile=profile))
        without = decode(encode(image, kind))
        np.testing.assert_array_equal(with_profile.pixels, without.pixels)
        assert with_profile.plain == without.plain


def test_a_profile_gives_what_littlecms_gives():
    profile = colour.adobe_rgb()
    image = photo(64, 48)
    expected = ImageCms.profileToProfile(
        image,
        ImageCms.ImageCmsProfile(io.BytesIO(profile)),
        ImageCms.createProfile("sRGB"),
        renderingIntent=ImageCms.Intent.RELATIVE_COLORIMETRIC,
        flags=ImageCms.Flags.BLACKPOINTCOMPENSATION,
    )
    found = decode(png(np.asarray(image), [_iccp(profile)]))
    np.testing.assert_array_equal(found.pixels, np.asarray(expected))


def _iccp(profile: bytes) -> bytes:
    return chunk(b"iCCP", b"profile\0\0" + zlib.compress(profile))


def test_greys_stay_grey():
    ramp = np.tile(np.arange(256, dtype=np.uint8), (4, 1))
    mac = colour._grey_profile((1.8,))
    expected = coded((np.arange(256) / 255) ** 1.8)
    for data in (
        encode(Image.fromarray(ramp), "PNG", icc_profile=mac),
        encode(Image.fromarray(np.stack((ramp, ramp * 0 + 255), -1)), "PNG", icc_profile=mac),
        png(ramp.astype(np.uint16) * 257, [_iccp(mac)]),
    ):
        pixels = decode(data).pixels
        assert (pixels == pixels[..., :1]).all()
        np.testing.assert_allclose(pixels[0, :, 0], expected, atol=1.6)
    # A profile for colours in a grey image has the same curve.
    for_colours = colour._rgb_profile(colour._SRGB, colour._D65, (1.8,))
    pixels = decode(encode(Image.fromarray(ramp), "PNG", icc_profile=for_colours)).pixels
    np.testing.assert_allclose(pixels[0, :, 0], expected, atol=1.6)


def test_colours_below_alpha_are_converted_and_lie_on_white():
    clear = in_p3(MUTED).convert("RGBA")
    clear.putalpha(Image.new("L", clear.size, 128))
    data = encode(clear, "PNG", icc_profile=colour.coded_profile(12, 13))
    expected = 255 + (np.asarray(MUTED, np.float64) - 255) * 128 / 255
    assert np.abs(decode(data).pixels - expected).max() < 4


def test_cmyk_and_lab_have_profiles_too():
    lab = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB"))
    srgb = ImageCms.createProfile("sRGB")
    values = ImageCms.profileToProfile(MUTED, srgb, lab, outputMode="LAB")
    assert off(encode(values, "TIFF")) < 3
    # An RGB profile cannot be about four inks.
    inks = MUTED.convert("CMYK")
    with_wrong = decode(encode(inks, "JPEG", icc_profile=colour.adobe_rgb())).pixels
    np.testing.assert_array_equal(with_wrong, decode(encode(inks, "JPEG")).pixels)


def test_adobe_rgb_of_cameras_stands_in_their_exif():
    image = in_adobe_rgb(MUTED)
    assert off(encode(image, "JPEG", quality=97, exif=cameras_exif())) < 2
    assert off(encode(image, "JPEG", quality=97, exif=cameras_exif(1, "R98"))) > 4
    # Another profile counts more.
    data = encode(MUTED, "JPEG", quality=97, exif=cameras_exif(), icc_profile=SRGB)
    assert off(data) < 2


def test_the_chunks_of_a_png_count_in_the_standards_order():
    wide, plain = np.asarray(in_p3(MUTED)), np.asarray(MUTED)
    code = chunk(b"cICP", bytes((12, 13, 0, 1)))
    srgb, gamma = chunk(b"sRGB", b"\0"), chunk(b"gAMA", struct.pack(">I", 45455))
    places = (0.3127, 0.329, 0.68, 0.32, 0.265, 0.69, 0.15, 0.06)
    chroma = chunk(b"cHRM", struct.pack(">8I", *(round(100_000 * x) for x in places)))
    wrong = _iccp(colour.adobe_rgb())
    assert off(png(wide, [code])) < 2
    assert off(png(wide, [code, wrong])) < 2
    assert off(png(plain, [srgb, chroma])) == 0
    assert off(png(wide, [chroma, gamma])) < 2
    assert off(png(wide, [chroma])) < 2
    for nothing in ([gamma], [srgb], [srgb, gamma], [chunk(b"cICP", bytes((1, 13, 0, 1)))]):
        assert decode(png(plain, nothing)).plain and off(png(plain, nothing)) == 0
    for broken in (b"gAMA", b"cHRM", b"cICP"):
        assert off(png(plain, [chunk(broken, b"\0" * 4)])) == 0
    assert off(png(plain, [chunk(b"cHRM", bytes(32))])) == 0


def test_the_gamma_of_a_png_is_applied():
    light = linear(MUTED)
    data = png(
        (light * 65535).round().astype(np.uint16), [chunk(b"gAMA", struct.pack(">I", 100_000))]
    )
    assert off(data) < 3
    grey = np.asarray(MUTED.convert("L"))
    data = png(
        (255 * linear(grey)).round().astype(np.uint8), [chunk(b"gAMA", struct.pack(">I", 100_000))]
    )
    assert off(data, MUTED.convert("L")) < 3


@pytest.mark.parametrize(("transfer", "name"), [(16, "PQ"), (18, "HLG")])
def test_high_dynamic_range_is_refused_by_name(transfer: int, name: str):
    code = chunk(b"cICP", bytes((9, transfer, 0, 1)))
    with pytest.raises(BadImage, match=rf"unsupported: .*\({name}\): save it with 8 bits in sRGB"):
        decode(png(np.asarray(MUTED), [code]))


def test_without_littlecms_it_is_said_once(monkeypatch, caplog):
    monkeypatch.setattr(colour, "ImageCms", None)
    colour._warned.clear()
    data = encode(MUTED, "PNG", icc_profile=colour.adobe_rgb())
    for _ in range(2):
        assert off(data) == 0
    assert caplog.text.count("colour profiles of images are NOT applied") == 1


def four_inks() -> bytes:
    """A profile of CMYK by a table of its 16 corners: cyan alone tells how dark it is."""
    lightness = [
        round(255 * (1 - 0.5 * bool(i & 8))) for i in range(16)
    ]  # the first ink is slowest
    table = b"".join(bytes((value, 128, 128)) for value in lightness)
    unit = struct.pack(">9i", *(65536 * (i % 4 == 0) for i in range(9)))
    line = bytes(range(256))
    lut = b"mft1" + bytes(4) + bytes((4, 3, 2, 0)) + unit + line * 4 + table + line * 3
    lut += bytes(-len(lut) % 4)
    start = 128 + 4 + 12
    head = struct.pack(
        ">I4sI4s4s4s", start + len(lut), bytes(4), 0x02400000, b"prtr", b"CMYK", b"Lab "
    )
    head += bytes(12) + b"acsp" + bytes(28) + struct.pack(">3i", 63190, 65536, 54061)
    tag = struct.pack(">I4sII", 1, b"A2B0", start, len(lut))
    return head.ljust(128, b"\0") + tag + lut


@pytest.mark.parametrize("kind", ["JPEG", "TIFF"])
def test_a_profile_of_inks_is_applied(kind: str):
    """Of what the inks look like the profile alone knows: here cyan is a grey of L* 50."""
    inks = Image.new("CMYK", (32, 32), (255, 0, 0, 0))
    found = decode(encode(inks, kind, icc_profile=four_inks())).pixels
    np.testing.assert_allclose(found, 119, atol=3)  # L* 50 is a light of 0.184
    assert decode(encode(inks, kind)).pixels[0, 0].tolist()[0] < 10
    paper = Image.new("CMYK", (32, 32), (0, 0, 0, 0))
    assert decode(encode(paper, kind, icc_profile=four_inks())).pixels.min() > 250


def test_a_profile_in_many_segments_of_a_jpeg_is_put_together():
    profile = colour.adobe_rgb()
    large = profile[:4] + profile[4:] + bytes(150_000)
    data = encode(in_adobe_rgb(MUTED), "JPEG", quality=97, icc_profile=large)
    assert data.count(b"ICC_PROFILE\0") == 3
    assert off(data) < 2
