"""Decodes images; the only place that decides what an image is, and what is damaged.

Every command reads photos and members of shards with it. The content decides, not the name; pixels
are upright and in sRGB with 8 bits; damaged metadata do no harm; damage in the coded data is an
error, except for a missing end marker.
"""

from __future__ import annotations

import io
import re
import warnings
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import simplejpeg
from PIL import ExifTags, Image, UnidentifiedImageError

from shards.image import colour, containers
from shards.image.kinds import AVIF, HEIC, JPEG, NO_IMAGES, PNG, RAW, WEBP, Kind, kind_of

Pixels = npt.NDArray[np.uint8]
Bytes = bytes | memoryview

# More than a sample of a dataset can have: a side of 10,000 pixels.
MAX_PIXELS = 100_000_000
_HALF = np.float32(127.5)
_HEAD = 512

# Damaged tags say nothing about the pixels.
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.TiffImagePlugin")

# https://www.cipa.jp/std/documents/e/DC-X008-Translation-2019-E.pdf, tag 0x0112
_TURN_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_ON_SIDE = (5, 6, 7, 8)
# The tag in either byte order, with what follows it: its type, the number of values, the first.
_EXIF_ORIENTATION = re.compile(rb"\x01\x12\x00[\x01-\x0c].{8}|\x12\x01[\x01-\x0c]\x00.{8}", re.S)
_UPRIGHT = {
    b"\x01\x12\x00\x03\x00\x00\x00\x01\x00\x01\x00\x00",
    b"\x12\x01\x03\x00\x01\x00\x00\x00\x01\x00\x00\x00",
}
_XMP_ORIENTATION = re.compile(rb'tiff:Orientation(?:="|>)([1-8])')
# libjpeg's warnings about unusual headers that change nothing. It reports only its first warning.
_HARMLESS = ("Invalid SOS parameters", "Unknown Adobe", "Warning: unknown JFIF", "unknown JFIF")
_TIFF_BITS, _TIFF_MEANING, _TIFF_SUBFILE, _TIFF_SUBFILES, _DNG = 258, 262, 254, 330, 50706


class BadImage(ValueError):
    """An image that cannot be used.

    Attributes:
        reason: ``empty``, ``not_an_image``, ``truncated``, ``corrupt``, ``too_large`` or
            ``unsupported``.
        detail: what was found, for a person.
    """

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


@dataclass(frozen=True)
class Decoded:
    """An image, and how its file holds it.

    Attributes:
        pixels: (H, W, 3) uint8, upright, sRGB.
        kind: of the file, by its content.
        mode: of the pixels as stored, in Pillow's words, with ";16" for more than 8 bits.
        plain: whether every program shows exactly these pixels: they are RGB with 8 bits, and
            nothing has to be rotated, converted or repaired.
    """

    pixels: Pixels
    kind: Kind
    mode: str
    plain: bool


def image_header(data: Bytes, name: str = "image") -> tuple[int, int]:
    """(width, height) of an encoded image once it is upright, without decoding it.

    Raises:
        ValueError: naming it, if it is not an image that can be read.
    """
    try:
        return probe(data)
    except BadImage as error:
        raise ValueError(f"{name}: {error}") from error


def check_image(data: Bytes, name: str) -> tuple[int, int]:
    """(width, height) of an image before it is packed, decoded to make sure that it is sound.

    Args:
        data: the encoded image.
        name: of the member that it becomes; its suffix says JPEG or PNG.

    Raises:
        ValueError: naming it, if it is damaged, is neither RGB nor grey with 8 bits, or is of
            another kind than its name says.
    """
    try:
        found = decode(data)
    except BadImage as error:
        raise ValueError(f"{name}: {error}") from error
    if found.mode not in ("RGB", "L"):
        raise ValueError(f"{name}: mode {found.mode}; convert it to RGB or grey (L) first")
    if not name.lower().endswith(found.kind.suffixes):
        raise ValueError(f"{name}: holds {found.kind.name}; set the format to that of its content")
    return found.pixels.shape[1], found.pixels.shape[0]


def decode_image(data: Bytes, image_format: str) -> Pixels:
    """Pixels of an encoded image, uint8 (H, W, 3), upright and in sRGB.

    For plain JPEG and PNG files they are Pillow's, to the last bit.

    Args:
        data: the encoded image.
        image_format: what it should be: "jpg", "png" or "webp". The content decides.

    Raises:
        ValueError: if the data are damaged, or no image that can be read.
    """
    return decode_rgbx(data, image_format)[:, :, :3]


def decode_rgbx(data: Bytes, image_format: str) -> Pixels:
    """Pixels as `decode_image`, but uint8 (H, W, 4) whose last channel means nothing.

    libjpeg-turbo and Pillow are both fastest with four bytes per pixel.

    Raises:
        ValueError: if the data are damaged, or no image that can be read.
    """
    if image_format == "jpg" and _is_plain_jpeg(data):
        try:
            pixels: Pixels = simplejpeg.decode_jpeg(data, "RGBX")
            return pixels
        except ValueError:
            pass  # damaged, or merely unusual
    found = _decode(data, MAX_PIXELS).image
    image = found if isinstance(found, Image.Image) else Image.fromarray(found)
    return np.asarray(image.convert("RGBX"))


def decode(data: Bytes, max_pixels: int = MAX_PIXELS) -> Decoded:
    """Decode an image of any kind that this machine can read; the first if it has several frames.

    The EXIF rotation is applied, colours become sRGB, alpha is composited on white, and values of
    16 bits are scaled, not clipped.

    Args:
        data: the whole file.
        max_pixels: an image with more is refused before it is decoded.

    Raises:
        BadImage: with the reason.
    """
    found = _decode(data, max_pixels)
    return Decoded(np.asarray(found.image), found.kind, found.mode, found.plain)


class _Found(NamedTuple):
    """An upright RGB image in sRGB, as Pillow or numpy holds it, and the rest of `Decoded`."""

    image: Image.Image | Pixels
    kind: Kind
    mode: str
    plain: bool


def _decode(data: Bytes, max_pixels: int) -> _Found:
    kind = _readable_kind(data)
    try:
        if kind is JPEG:
            return _decode_jpeg(data, max_pixels)
        if kind is PNG:
            return _decode_png(data, max_pixels)
        return _decode_other(data, kind, max_pixels)
    except (BadImage, MemoryError):
        raise
    except Exception as error:  # Pillow's decoders raise nearly any type on damaged data
        raise _damage(error, data) from error


def probe(data: Bytes, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """(width, height) of an image once it is upright, without decoding it.

    Raises:
        BadImage: as `decode`, as far as the header shows it.
    """
    kind = _readable_kind(data)
    try:
        if kind is JPEG:
            header = _jpeg_header(data, max_pixels)
            size, turn = (header.width, header.height), _of_exif(header.exif, header.xmp)[0]
        elif kind is PNG:
            chunks = _png_chunks(data)
            size, turn = _open(chunks.pixels, PNG, max_pixels).size, _turn_of(chunks)
        else:
            image = _open(data, kind, max_pixels)
            size, turn = image.size, _of_image(image)
    except (BadImage, MemoryError):
        raise
    except Exception as error:  # as in `decode`
        raise _damage(error, data) from error
    return (size[1], size[0]) if turn in _ON_SIDE else size


def _readable_kind(data: Bytes) -> Kind:
    if not data:
        raise BadImage("empty", "0 bytes")
    head = bytes(data[:_HEAD])
    kind = kind_of(head)
    if kind is None:
        raise BadImage("not_an_image", f"not a known kind of image: begins with {head[:8]!r}")
    if not kind.plugin:
        reason = "not_an_image" if kind in NO_IMAGES else "unsupported"
        raise BadImage(reason, f"{kind.name}: {kind.remedy}")
    return kind


def _check_size(width: int, height: int, max_pixels: int) -> None:
    if width * height > max_pixels:
        raise BadImage(
            "too_large", f"{width}x{height} = {width * height} pixels, the limit is {max_pixels}"
        )


def _damage(error: Exception, data: Bytes) -> BadImage:
    """What is wrong, from the exception of a decoder."""
    text = str(error) or type(error).__name__
    if isinstance(error, Image.DecompressionBombError):
        return BadImage("too_large", text)
    if isinstance(error, UnidentifiedImageError):
        text = "its header is damaged or of a rare kind: convert it to PNG"
    # The WebP plugin decodes while it opens the file, and names no cause.
    short = data[:4] == b"RIFF" and int.from_bytes(data[4:8], "little") + 8 > len(data)
    words = ("truncated", "unexpected end", "end of file", "not enough", "premature end")
    if short or isinstance(error, EOFError) or any(word in text.lower() for word in words):
        return BadImage("truncated", text)
    return BadImage("corrupt", text)


# The header of the last plain JPEG: those of a dataset tend to be the same, byte for byte. Threads
# may overwrite each other's value: each value is correct by itself.
_last_plain = b""
_LONGEST_HEADER = 4096


def _is_plain_jpeg(data: Bytes) -> bool:
    """Whether a JPEG can simply be decoded, with nothing to rotate or convert."""
    global _last_plain
    known = _last_plain
    if known and bytes(data[: len(known)]) == known:
        return True
    if bytes(data[:3]) != b"\xff\xd8\xff":
        return False
    try:
        header = containers.read_header(data)
    except (EOFError, ValueError):
        return False
    if not header.simple or header.width * header.height > MAX_PIXELS:
        return False
    if _of_exif(header.exif, header.xmp) != (1, False):
        return False
    if header.coded <= _LONGEST_HEADER:
        _last_plain = bytes(data[: header.coded])
    return True


def _jpeg_header(data: Bytes, max_pixels: int) -> containers.Header:
    header = containers.read_header(data)
    _check_size(header.width, header.height, max_pixels)
    if header.precision != 8 or len(header.components) not in (1, 3, 4):
        what = f"{header.precision} bits in {len(header.components)} channels"
        raise BadImage("unsupported", f"a JPEG of {what}: convert it to a standard JPEG or to PNG")
    return header


def _decode_jpeg(data: Bytes, max_pixels: int) -> _Found:
    header = _jpeg_header(data, max_pixels)
    if containers.lacks_scans(data, header):
        raise BadImage("truncated", "its last scans are missing")
    mode = {1: "L", 3: "RGB", 4: "CMYK"}[len(header.components)]
    pixels, sound = _jpeg_pixels(data, header, mode)
    turn, adobe_rgb = _of_exif(header.exif, header.xmp)
    profile = header.profile
    if profile is None and adobe_rgb and mode == "RGB":
        profile = colour.adobe_rgb()
    if mode == "RGB" and profile is None and turn == 1:
        return _Found(pixels, JPEG, mode, sound and header.exif is None)
    stored = Image.frombuffer(mode, pixels.shape[1::-1], pixels, "raw", mode, 0, 1)
    image = _in_srgb(stored, profile)
    plain = sound and mode == "RGB" and image is stored and header.exif is None and turn == 1
    return _Found(_rgb(_upright(image, turn)), JPEG, mode, plain)


def _jpeg_pixels(data: Bytes, header: containers.Header, mode: str) -> tuple[Pixels, bool]:
    """(H, W, channels of the mode) as stored, and whether the file is as a JPEG should be.

    Raises:
        BadImage: libjpeg warns; a warning about coded data means that the pixels are wrong.
    """
    space = "GRAY" if mode == "L" else mode
    cleaned, ended = header.stray, False
    source = containers.with_clean_header(data, header) if cleaned else data
    while True:
        try:
            pixels = simplejpeg.decode_jpeg(source, space)
            break
        except ValueError as error:
            what = str(error)
        if what.startswith("Premature end of JPEG file") and not ended:
            # With an end marker there is still a warning if coded data are missing.
            source, ended = containers.ended(source), True
        elif what.startswith(_HARMLESS) and not cleaned:
            source, cleaned = containers.with_clean_header(source, header), True
        elif "subsampling" in what:  # unknown to TurboJPEG, but not to libjpeg
            with Image.open(io.BytesIO(data), formats=("JPEG",)) as image:
                return np.asarray(image), True
        else:
            raise _damage(ValueError(what), data)
    # All programs write CMYK into JPEGs inverted, as Adobe's do.
    return (255 - pixels if mode == "CMYK" else pixels), not (cleaned or ended)


def _png_chunks(data: Bytes) -> containers.Chunks:
    try:
        return containers.read_chunks(data)
    except NotImplementedError as error:
        raise BadImage("unsupported", str(error)) from error


def _turn_of(chunks: containers.Chunks) -> int:
    return _of_exif(chunks.exif, chunks.xmp)[0]


def _decode_png(data: Bytes, max_pixels: int) -> _Found:
    chunks = _png_chunks(data)
    stored = _open(chunks.pixels, PNG, max_pixels)
    stored.load()
    grey = chunks.kind in (0, 4)
    try:
        profile = colour.png_profile(chunks.colours, chunks.profile, grey)
    except colour.HighDynamicRange as error:
        raise BadImage("unsupported", f"{error}: save it with 8 bits in sRGB") from error
    image, turn = _opaque(stored, profile), _turn_of(chunks)
    plain = (
        chunks.whole
        and chunks.exif is None
        and turn == 1
        and chunks.bits == 8
        and stored.mode == "RGB"
        and image is stored
    )
    mode = stored.mode if chunks.bits <= 8 or stored.mode[0] == "I" else f"{stored.mode};16"
    return _Found(_rgb(_upright(image, turn)), PNG, mode, plain)


def _open(data: Bytes, kind: Kind, max_pixels: int) -> Image.Image:
    """The header of a file; its pixels are decoded when they are used."""
    if kind is WEBP and (size := containers.webp_size(data)):
        _check_size(*size, max_pixels)  # its plugin allocates all pixels at once
    # No other plugin: the EPS plugin would pass the bytes to Ghostscript.
    image = Image.open(io.BytesIO(data), formats=(kind.plugin,))
    _check_size(*image.size, max_pixels)
    return image


def _decode_other(data: Bytes, kind: Kind, max_pixels: int) -> _Found:
    stored = _open(data, kind, max_pixels)
    tags = getattr(stored, "tag_v2", {})
    if _DNG in tags or (tags.get(_TIFF_SUBFILE) == 1 and _TIFF_SUBFILES in tags):
        raise BadImage("unsupported", f"{RAW.name}: {RAW.remedy}")
    if containers.lacks_data(data):
        raise BadImage("truncated", "some of its coded data are missing")
    stored.load()
    profile = stored.info.get("icc_profile")
    if profile is None and kind in (HEIC, AVIF):
        profile = _coded_profile(data)
    image = _opaque(stored, profile)
    return _Found(_rgb(_upright(image, _of_image(stored))), kind, stored.mode, False)


def _coded_profile(data: Bytes) -> bytes | None:
    """The profile that a HEIC or AVIF file specifies by code points."""
    code = containers.colour_code(data)
    try:
        return None if code is None else colour.coded_profile(*code)
    except colour.HighDynamicRange as error:
        raise BadImage("unsupported", f"{error}: save it with 8 bits in sRGB") from error


def _of_image(image: Image.Image) -> int:
    """The EXIF orientation of an image that Pillow opened, 1 to 8."""
    try:
        return _orientation(image.getexif())
    except Exception:  # damaged EXIF says nothing about rotation, and the pixels are whole
        return 1


def _of_exif(data: bytes | None, xmp: bytes | None) -> tuple[int, bool]:
    """The orientation, 1 to 8, and whether the colours are what cameras call Adobe RGB."""
    turn, adobe_rgb = 0, False
    if data is not None:
        # Reading all tags takes as long as decoding a small image; usually these bytes are enough.
        turns = set(_EXIF_ORIENTATION.findall(data))
        if not turns - _UPRIGHT and b"R03" not in data:
            turn, data = int(bool(turns)), None
    if data is not None:
        exif = Image.Exif()
        try:
            exif.load(data)
            turn = exif.get(ExifTags.Base.Orientation) or 0
            space = exif.get_ifd(ExifTags.IFD.Exif).get(ExifTags.Base.ColorSpace)
            index = exif.get_ifd(ExifTags.IFD.Interop).get(ExifTags.Interop.InteropIndex)
            adobe_rgb = space == 0xFFFF and str(index).startswith("R03")
        except Exception:  # as in `_of_image`
            pass
    if not turn and xmp and (found := _XMP_ORIENTATION.search(xmp)):
        turn = int(found[1])
    return (turn if turn in _TURN_UPRIGHT else 1), adobe_rgb


def _orientation(exif: Any) -> int:
    turn = exif.get(ExifTags.Base.Orientation)
    return turn if turn in _TURN_UPRIGHT else 1


def _upright(image: Image.Image, turn: int) -> Image.Image:
    return image if turn == 1 else image.transpose(_TURN_UPRIGHT[turn])


def _rgb(image: Image.Image) -> Image.Image:
    return image if image.mode == "RGB" else image.convert("RGB")


def _in_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    return image if profile is None else colour.to_srgb(image, profile)


def _opaque(image: Image.Image, profile: bytes | None) -> Image.Image:
    """An image of any mode as L or RGB in sRGB, composited on white.

    Raises:
        BadImage: the range of its values is unknown.
    """
    if image.mode.startswith("I"):
        image = _eight_bits(image)
    mode, clear = image.mode, image.info.get("transparency")
    if mode in ("RGBA", "RGBa", "LA", "La", "PA") or clear is not None:
        if mode == "RGB" and isinstance(clear, tuple) and max(clear) > 255:
            image.info["transparency"] = tuple(value >> 8 for value in clear)
        rgba = image.convert("RGBA")
        colours = rgba.convert("RGB")
        if mode in ("LA", "La", "L", "1"):
            colours = colours.getchannel("R")
        layer = _in_srgb(colours, profile).convert("RGBA")
        layer.putalpha(rgba.getchannel("A"))
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, layer).convert("RGB")
    if mode in ("P", "YCbCr", "RGBX"):
        image = image.convert("RGB")
    elif mode == "1":
        image = image.convert("L")
    elif mode == "LAB":
        return _in_srgb(image, profile or colour.lab())
    elif mode not in ("L", "RGB", "CMYK"):
        raise BadImage("unsupported", f"pixels of mode {mode} have no defined range")
    return _in_srgb(image, profile)


def _eight_bits(image: Image.Image) -> Image.Image:
    """Greys of up to 16 bits, scaled to 8; Pillow's own conversion would clip at 255."""
    values = np.asarray(image).astype(np.int64)
    tags = getattr(image, "tag_v2", {})
    highest = 4095 if tags.get(_TIFF_BITS) == (12,) else 65535
    if values.min() < 0 or values.max() > highest:
        raise BadImage("unsupported", f"grey values {values.min()} to {values.max()}")
    if tags.get(_TIFF_MEANING) == 0 and image.mode != "I":  # 0 is white, which Pillow overlooks
        values = highest - values
    clear = image.info.get("transparency")
    grey = Image.fromarray(((values * 255 + highest // 2) // highest).astype(np.uint8))
    if isinstance(clear, int):
        grey.putalpha(Image.fromarray(np.where(values == clear, 0, 255).astype(np.uint8)))
    return grey


def shrink(image: Pixels, size: int) -> Pixels:
    """A square image (S, S, C), C 3 or 4, as (size, size, C) by Pillow's box (area) filter.

    Raises:
        ValueError: if the image is not square or is smaller than `size`.
    """
    height, width, channels = image.shape
    if height != width:
        raise ValueError(f"the image is {width}x{height}, expected a square one")
    if height < size:
        raise ValueError(f"the image is {width}x{height}, smaller than the requested {size}x{size}")
    if height == size:
        return image
    if channels == 4:
        pil = Image.frombuffer("RGBX", (width, height), image, "raw", "RGBX", 0, 1)
    else:
        pil = Image.fromarray(np.ascontiguousarray(image))
    return np.asarray(pil.resize((size, size), Image.Resampling.BOX))


def write_into(image: Pixels, out: npt.NDArray[Any]) -> None:
    """Write uint8 (H, W, 3 or 4) into `out` (3, H, W): as it is, or as (x - 127.5) / 127.5.

    Args:
        image: pixels of three channels; a fourth means nothing.
        out: uint8 for the bytes, float32 for values in [-1, 1].
    """
    if out.dtype == np.uint8:
        out[...] = image[:, :, :3].transpose(2, 0, 1)
        return
    for channel in range(3):
        plane = out[channel]
        np.subtract(image[:, :, channel], _HALF, out=plane, dtype=np.float32)
        np.divide(plane, _HALF, out=plane)
