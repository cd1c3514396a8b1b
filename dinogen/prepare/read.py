"""Decode a photo to upright RGB, or say why it cannot be used."""

from __future__ import annotations

import os
import stat
import warnings
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, UnidentifiedImageError

from dinogen.errors import UserError
from shards.kinds import IMAGE_SUFFIXES, PLUGINS, UNREAD, kind_of

__all__ = [
    "IMAGE_SUFFIXES",
    "UNREAD",
    "PrepareError",
    "Unusable",
    "kind_of",
    "probe_photo",
    "read_photo",
]

_PNG_END = b"IEND\xaeB`\x82"
_MAGIC = (b"\xff\xd8\xff", b"\x89PNG", b"RIFF", b"II*\x00", b"MM\x00*", b"BM")

# Pillow's own guard refuses a picture at a fixed size, and warns at half of it. Here the limit is
# the caller's max_pixels, checked from the header before anything is decoded.
Image.MAX_IMAGE_PIXELS = None

# It also warns of damaged tags, which say nothing about the pixels.
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


class PrepareError(UserError):
    """Photos cannot be prepared at all; the message names the folder or file and the mend."""


class Unusable(Exception):
    """One photo cannot be used.

    Attributes:
        reason: short code, one of ``unreadable``, ``empty``, ``not_an_image``, ``truncated``,
            ``corrupt``, ``too_large``, ``unsupported``.
        detail: what was found, for a person.
    """

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


def probe_photo(path: Path, max_pixels: int) -> tuple[int, int]:
    """Width and height in pixels as stored, from the header alone.

    Raises:
        Unusable: not a picture of a known format, unreadable, or more than ``max_pixels``.
    """
    with _open(path, max_pixels) as image:
        return image.size


def read_photo(path: Path, max_pixels: int) -> NDArray[np.uint8]:
    """Decode a photo to upright RGB.

    The EXIF rotation is applied, alpha is composited on white, 16-bit grey is scaled (not
    clipped), and of several frames the first is taken.

    Args:
        path: JPEG, PNG, WebP, TIFF or BMP, by its content.
        max_pixels: a photo with more pixels is refused before it is decoded.

    Returns:
        ``(H, W, 3)`` uint8.

    Raises:
        Unusable: with the reason; a photo whose data end early is never returned in part.
    """
    with _open(path, max_pixels) as image:
        try:
            image.load()
        except MemoryError:
            raise
        except Exception as error:  # Pillow's decoders raise nearly any type on damaged data
            reason = "truncated" if _says_truncated(error) else "corrupt"
            raise Unusable(reason, str(error) or type(error).__name__) from None
        # Pillow accepts a PNG that ends before its last chunk once every row is there.
        if image.format == "PNG" and _PNG_END not in path.read_bytes():
            raise Unusable("truncated", "no end marker")
        return _to_rgb(_upright(image))


def _open(path: Path, max_pixels: int) -> Image.Image:
    """Read the header; the pixels are read when they are asked for."""
    try:
        info = path.stat()
        if stat.S_ISDIR(info.st_mode):
            os.scandir(path).close()
            raise Unusable("unreadable", "a folder, not a file")
        # Opening a pipe would wait for ever.
        if not stat.S_ISREG(info.st_mode):
            raise Unusable("unreadable", "not a regular file")
        if info.st_size == 0:
            raise Unusable("empty", "0 bytes")
        with path.open("rb") as file:
            head = file.read(16)
    except OSError as error:
        raise Unusable("unreadable", str(error.strerror)) from None
    try:
        image = Image.open(path, formats=PLUGINS)
    except UnidentifiedImageError:
        if head.startswith(_MAGIC):
            raise Unusable("corrupt", "begins like a picture but has no usable header") from None
        raise Unusable(
            "not_an_image", f"no JPEG, PNG, WebP, TIFF or BMP: begins with {head[:8]!r}"
        ) from None
    except Exception as error:  # as in read_photo; headers too are decoded by the plugins
        # The WebP plugin decodes while it opens, and names no cause.
        cut_off = head[:4] == b"RIFF" and int.from_bytes(head[4:8], "little") + 8 > info.st_size
        reason = "truncated" if cut_off or _says_truncated(error) else "corrupt"
        raise Unusable(reason, str(error) or type(error).__name__) from None
    width, height = image.size
    if width * height > max_pixels:
        image.close()
        raise Unusable(
            "too_large", f"{width}x{height} = {width * height} pixels, allowed are {max_pixels}"
        )
    return image


def _says_truncated(error: Exception) -> bool:
    text = str(error).lower()
    return isinstance(error, EOFError) or any(
        word in text for word in ("truncated", "unexpected end", "end of file", "not enough")
    )


def _upright(image: Image.Image) -> Image.Image:
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # damaged EXIF says nothing about rotation, and the pixels are whole
        return image
    turn = _TURN_UPRIGHT.get(orientation) if isinstance(orientation, int) else None
    return image if turn is None else image.transpose(turn)


def _to_rgb(image: Image.Image) -> NDArray[np.uint8]:
    if image.mode.startswith("I"):  # Pillow's own conversion would clip at 255
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise Unusable("unsupported", f"grey values {values.min()} to {values.max()}")
        grey = ((values * 255 + 32767) // 65535).astype(np.uint8)
        return np.repeat(grey[:, :, None], 3, axis=2)
    if image.mode in ("RGBA", "RGBa", "LA", "La", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image)
    elif image.mode not in ("1", "L", "P", "RGB", "RGBX", "CMYK", "YCbCr"):
        raise Unusable("unsupported", f"pixels of mode {image.mode} have no defined range")
    return np.asarray(image.convert("RGB"))
