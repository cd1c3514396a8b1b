"""Photos of every kind become the right upright RGB; files that are none are named."""

import io
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dinogen.prepare.photos.find import find_photos
from dinogen.prepare.photos.read import Unusable, probe_photo, read_photo

MAX_PIXELS = 10**8


def reason(path, max_pixels=MAX_PIXELS):
    with pytest.raises(Unusable) as caught:
        read_photo(path, max_pixels)
    return caught.value.reason


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("a.png", {}),
        ("a.bmp", {}),
        ("a.tif", {}),
        ("a.tiff", {"compression": "tiff_lzw"}),
        ("a.webp", {"lossless": True}),
    ],
)
def test_lossless_formats_come_back_exactly(tmp_path, noise, name, options):
    Image.fromarray(noise).save(tmp_path / name, **options)
    np.testing.assert_array_equal(read_photo(tmp_path / name, MAX_PIXELS), noise)
    assert probe_photo(tmp_path / name, MAX_PIXELS) == (64, 48)


def test_the_content_decides_not_the_suffix(tmp_path, noise):
    Image.fromarray(noise).save(tmp_path / "really.png")
    (tmp_path / "really.png").rename(tmp_path / "named.jpg")
    np.testing.assert_array_equal(read_photo(tmp_path / "named.jpg", MAX_PIXELS), noise)


# What each EXIF orientation says must be done to the stored rows to see the photo upright.
UPRIGHT = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: np.rot90(a, 2).transpose(1, 0, 2),
    8: lambda a: np.rot90(a, 1),
}


@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_exif_rotation_is_applied(tmp_path, noise, orientation, suffix):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(noise).save(tmp_path / f"a.{suffix}", exif=exif)
    expected = UPRIGHT[orientation](noise)
    np.testing.assert_array_equal(read_photo(tmp_path / f"a.{suffix}", MAX_PIXELS), expected)


def test_exif_rotation_of_a_jpeg(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying on its left side
    photo = np.zeros((40, 80, 3), np.uint8)
    photo[:, :40] = 255  # left half white: upper half once upright
    Image.fromarray(photo).save(tmp_path / "a.jpg", exif=exif, quality=95)
    upright = read_photo(tmp_path / "a.jpg", MAX_PIXELS)
    assert upright.shape == (80, 40, 3)
    assert upright[:35].min() > 240
    assert upright[45:].max() < 15


def test_damaged_exif_does_not_lose_the_photo(tmp_path, noise):
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, "JPEG", exif=b"Exif\0\0MM\x00*\xff\xff\xff\xff\x00")
    (tmp_path / "a.jpg").write_bytes(buffer.getvalue())
    assert read_photo(tmp_path / "a.jpg", MAX_PIXELS).shape == noise.shape


def test_alpha_lies_on_white(tmp_path):
    rgba = np.zeros((2, 3, 4), np.uint8)
    rgba[..., 0] = 200
    rgba[0, :, 3] = (0, 128, 255)
    Image.fromarray(rgba).save(tmp_path / "a.png")
    pixels = read_photo(tmp_path / "a.png", MAX_PIXELS)
    expected = 255 + (np.array([200, 0, 0]) - 255) * np.array([0, 128, 255])[:, None] / 255
    np.testing.assert_allclose(pixels[0], expected, atol=1)
    assert (pixels[1] == 255).all()


def test_grey_with_alpha_and_transparent_palette(tmp_path):
    Image.merge("LA", [Image.new("L", (2, 2), 10), Image.new("L", (2, 2), 0)]).save(
        tmp_path / "la.png"
    )
    assert (read_photo(tmp_path / "la.png", MAX_PIXELS) == 255).all()
    palette = Image.new("P", (2, 1))
    palette.putpalette([255, 0, 0, 0, 0, 255])
    palette.putpixel((1, 0), 1)
    palette.save(tmp_path / "p.png", transparency=0)
    pixels = read_photo(tmp_path / "p.png", MAX_PIXELS)
    assert pixels.tolist() == [[[255, 255, 255], [0, 0, 255]]]


def test_cmyk(tmp_path):
    Image.new("CMYK", (16, 16), (0, 255, 255, 0)).save(tmp_path / "red.jpg", quality=95)
    Image.new("CMYK", (16, 16), (0, 0, 0, 255)).save(tmp_path / "black.tif")
    red = read_photo(tmp_path / "red.jpg", MAX_PIXELS)
    np.testing.assert_allclose(red, np.broadcast_to([255, 0, 0], red.shape), atol=6)
    assert read_photo(tmp_path / "black.tif", MAX_PIXELS).max() == 0


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_16_bit_grey_is_scaled_not_clipped(tmp_path, suffix):
    ramp = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    Image.fromarray(ramp).save(tmp_path / f"a.{suffix}")
    pixels = read_photo(tmp_path / f"a.{suffix}", MAX_PIXELS)
    np.testing.assert_allclose(pixels[..., 0], ramp / 257, atol=0.51)
    assert (pixels[..., 0] == pixels[..., 2]).all()


def test_16_bit_colour(tmp_path, encode_png):
    """A PNG that Pillow can read but not write, so made by hand."""
    colour = np.array([0x1234, 0x8000, 0xFFFF], ">u2")
    rows = [b"\0" + colour.tobytes() * 4] * 2
    (tmp_path / "a.png").write_bytes(encode_png(4, 2, rows, bits=16, colours=2))
    pixels = read_photo(tmp_path / "a.png", MAX_PIXELS)
    assert pixels.shape == (2, 4, 3)
    np.testing.assert_allclose(pixels[1, 3], np.array([0x12, 0x80, 0xFF]), atol=1)


def test_two_photos_in_one_file_as_phones_write_them(tmp_path):
    first, second = (Image.new("RGB", (32, 16), colour) for colour in ("red", "blue"))
    first.save(tmp_path / "a.jpg", "MPO", save_all=True, append_images=[second])
    with Image.open(tmp_path / "a.jpg") as image:
        assert image.format == "MPO"
    pixels = read_photo(tmp_path / "a.jpg", MAX_PIXELS)
    np.testing.assert_allclose(pixels, np.broadcast_to([255, 0, 0], (16, 32, 3)), atol=3)


def test_grey_and_two_colours(tmp_path):
    Image.new("L", (3, 2), 77).save(tmp_path / "l.jpg")
    Image.new("1", (3, 2), 1).save(tmp_path / "b.png")
    assert (read_photo(tmp_path / "l.jpg", MAX_PIXELS) == 77).all()
    assert (read_photo(tmp_path / "b.png", MAX_PIXELS) == 255).all()


def test_values_without_a_range_are_refused(tmp_path):
    Image.fromarray(np.full((4, 4), 0.5, np.float32)).save(tmp_path / "float.tif")
    Image.fromarray(np.full((4, 4), 70000, np.int32)).save(tmp_path / "int.tif")
    assert reason(tmp_path / "float.tif") == "unsupported"
    assert reason(tmp_path / "int.tif") == "unsupported"


@pytest.mark.parametrize("suffix", ["png", "webp", "tif"])
def test_of_several_frames_the_first_is_taken(tmp_path, suffix):
    frames = [Image.new("RGB", (20, 10), colour) for colour in ("red", "lime", "blue")]
    options = {"lossless": True} if suffix == "webp" else {}
    path = tmp_path / f"a.{suffix}"
    frames[0].save(path, save_all=True, append_images=frames[1:], **options)
    with Image.open(path) as image:
        assert image.n_frames == 3
    assert (read_photo(path, MAX_PIXELS) == (255, 0, 0)).all()


@pytest.mark.parametrize(
    ("suffix", "options"),
    [
        ("jpg", {}),
        ("jpg", {"progressive": True}),
        ("png", {}),
        ("webp", {}),
        ("webp", {"lossless": True}),
        ("bmp", {}),
        ("tif", {}),
        ("tif", {"compression": "tiff_lzw"}),
    ],
)
def test_a_cut_off_file_is_never_used(tmp_path, noise, suffix, options):
    whole = tmp_path / f"whole.{suffix}"
    Image.fromarray(noise).save(whole, **options)
    data = whole.read_bytes()
    cut = tmp_path / f"cut.{suffix}"
    # Of an end marker, with the sum before it, nothing is lost: see tests/shards.
    end = {"jpg": 2, "png": 24}.get(suffix, 0)
    lengths = {*range(1, len(data), max(1, len(data) // 40)), *range(len(data) - 40, len(data))}
    for length in sorted(length for length in lengths if length < len(data) - end):
        cut.write_bytes(data[:length])
        assert reason(cut) in {"truncated", "corrupt", "not_an_image"}, length
    cut.write_bytes(data[: len(data) // 2])
    assert reason(cut) == ("corrupt" if options == {"compression": "tiff_lzw"} else "truncated")
    for length in (len(data) - end // 2, len(data)):
        cut.write_bytes(data[:length])
        assert read_photo(cut, MAX_PIXELS).shape == noise.shape


def test_damage_inside_is_not_passed_on_as_a_crash(tmp_path, noise):
    rng = np.random.default_rng(1)
    for suffix in ("jpg", "png", "webp", "tif", "bmp"):
        path = tmp_path / f"a.{suffix}"
        Image.fromarray(noise).save(path)
        data = bytearray(path.read_bytes())
        for _ in range(60):
            damaged = bytearray(data)
            for place in rng.integers(0, len(data), 8):
                damaged[place] = rng.integers(256)
            path.write_bytes(damaged)
            try:
                pixels = read_photo(path, MAX_PIXELS)
            except Unusable as error:
                assert error.reason
            else:
                assert pixels.dtype == np.uint8
                assert pixels.shape[2] == 3


def test_files_that_are_no_photos(tmp_path):
    (tmp_path / "text.jpg").write_text("a letter, not a photo")
    (tmp_path / "empty.png").touch()
    (tmp_path / "other.jpg").write_bytes(b"%PDF-1.7 and so on")
    assert reason(tmp_path / "text.jpg") == "not_an_image"
    assert reason(tmp_path / "empty.png") == "empty"
    assert reason(tmp_path / "other.jpg") == "not_an_image"


def test_a_bomb_is_refused_before_it_is_decoded(tmp_path, monkeypatch, write_bomb):
    write_bomb(tmp_path / "bomb.png")
    assert (tmp_path / "bomb.png").stat().st_size < 1_000_000
    with monkeypatch.context() as patch:
        patch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
        assert reason(tmp_path / "bomb.png") == "too_large"
    write_bomb(tmp_path / "small.png", 64)
    assert reason(tmp_path / "small.png", 64 * 64 - 1) == "too_large"
    assert read_photo(tmp_path / "small.png", 64 * 64).shape == (64, 64, 3)


def test_what_cannot_be_opened(tmp_path, monkeypatch, noise):
    (tmp_path / "folder.jpg").mkdir()
    (tmp_path / "link.jpg").symlink_to(tmp_path / "nowhere.jpg")
    os.mkfifo(tmp_path / "pipe.jpg")
    for name in ("folder.jpg", "link.jpg", "pipe.jpg", "absent.jpg"):
        assert reason(tmp_path / name) == "unreadable"
    Image.fromarray(noise).save(tmp_path / "secret.png")

    def refuse(self, *arguments, **options):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "open", refuse)
    assert reason(tmp_path / "secret.png") == "unreadable"


def test_a_name_that_is_not_utf8(tmp_path):
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.jpg")).write_bytes(b"?")
    (photo,) = find_photos(tmp_path).photos
    assert photo.source == "\\xff.jpg"
    photo.source.encode()
    assert reason(photo.path) == "not_an_image"
