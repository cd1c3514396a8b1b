"""Encoded images to pixels: decoding, the one resize filter, and the scale of a batch."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import numpy.typing as npt
import simplejpeg
from PIL import Image

Pixels = npt.NDArray[np.uint8]
_HALF = np.float32(127.5)


def image_header(data: bytes, name: str) -> tuple[int, int]:
    """(width, height) of an encoded image, without decoding it.

    Raises:
        ValueError: if it cannot be read, or is neither RGB nor grey.
    """
    try:
        with Image.open(io.BytesIO(data), formats=("JPEG", "PNG", "WEBP")) as image:
            mode, size = image.mode, image.size
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{name}: not a readable JPEG, PNG or WebP: {error}") from error
    if mode not in ("RGB", "L"):
        raise ValueError(f"{name}: mode {mode}; convert it to RGB or grey (L) first")
    return size


def decode_image(data: bytes | memoryview, image_format: str) -> Pixels:
    """Pixels of an encoded image, uint8 (H, W, 3); the same numbers as Pillow's.

    Raises:
        ValueError: if the data are damaged.
    """
    return decode_rgbx(data, image_format)[:, :, :3]


def decode_rgbx(data: bytes | memoryview, image_format: str) -> Pixels:
    """Pixels as uint8 (H, W, 4) whose last channel means nothing.

    Four bytes a pixel are what both libjpeg-turbo and Pillow are fastest with.

    Raises:
        ValueError: if the data are damaged.
    """
    if image_format == "jpg":
        pixels: Pixels = simplejpeg.decode_jpeg(data, "RGBX")
        return pixels
    try:
        # No other plugin: that of EPS would hand the bytes to Ghostscript.
        with Image.open(io.BytesIO(data), formats=("PNG", "WEBP")) as image:
            return np.asarray(image.convert("RGB").convert("RGBX"))
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(str(error)) from error


def shrink(image: Pixels, size: int) -> Pixels:
    """A square image (S, S, C), C 3 or 4, as (size, size, C) by Pillow's box (area) filter.

    Raises:
        ValueError: if the image is not square or is smaller than `size`.
    """
    height, width, channels = image.shape
    if height != width:
        raise ValueError(f"the image is {width}x{height}; needed is a square one")
    if height < size:
        raise ValueError(f"the image is {width}x{height}, smaller than the {size}x{size} asked for")
    if height == size:
        return image
    if channels == 4:
        picture = Image.frombuffer("RGBX", (width, height), image, "raw", "RGBX", 0, 1)
    else:
        picture = Image.fromarray(np.ascontiguousarray(image))
    return np.asarray(picture.resize((size, size), Image.Resampling.BOX))


def scale_into(image: Pixels, out: npt.NDArray[Any]) -> None:
    """Write uint8 (H, W, 3 or 4) as (x - 127.5) / 127.5 into float32 `out` (3, H, W)."""
    for channel in range(3):
        plane = out[channel]
        np.subtract(image[:, :, channel], _HALF, out=plane, dtype=np.float32)
        np.divide(plane, _HALF, out=plane)
