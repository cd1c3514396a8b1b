"""Decodes a photo to upright RGB, or says why it cannot be used."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dinogen.errors import UserError
from shards.image.decode import BadImage, Decoded, decode, probe
from shards.image.kinds import IMAGE_SUFFIXES, UNREAD, kind_of

__all__ = [
    "IMAGE_SUFFIXES",
    "UNREAD",
    "PrepareError",
    "Unusable",
    "decode_photo",
    "kind_of",
    "probe_photo",
    "read_photo",
]

# Pillow's own guard refuses an image at a fixed size, and warns at half of it. Here the limit is
# the caller's max_pixels, checked from the header before anything is decoded.
Image.MAX_IMAGE_PIXELS = None

# The headers of most photos are shorter than this.
_PROBE_BYTES = 1 << 16
# Besides 16 bits in four channels a file may hold a video, previews or further pages.
_BYTES_PER_PIXEL = 8
_BYTES_BESIDE = 1 << 30


class PrepareError(UserError):
    """Photos cannot be prepared at all; the message names the folder or file and the remedy."""


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
    """Width and height in pixels of the upright photo, from the header alone.

    Raises:
        Unusable: not an image of a known kind, unreadable, or more than ``max_pixels``.
    """
    _check_file(path, max_pixels)
    try:
        with path.open("rb") as file:
            head = file.read(_PROBE_BYTES)
            try:
                return probe(head, max_pixels)
            except BadImage:
                return probe(head + file.read(), max_pixels)
    except OSError as error:
        raise Unusable("unreadable", str(error.strerror)) from None
    except BadImage as error:
        raise Unusable(error.reason, error.detail) from None


def read_photo(path: Path, max_pixels: int) -> NDArray[np.uint8]:
    """Decode a photo to upright RGB, ``(H, W, 3)`` uint8, as :func:`decode_photo`."""
    return decode_photo(path, max_pixels)[0].pixels


def decode_photo(path: Path, max_pixels: int) -> tuple[Decoded, bytes]:
    """Decode a photo with :func:`shards.image.decode.decode`.

    Args:
        path: a file of any kind that this machine can read, by its content.
        max_pixels: a photo with more pixels is refused before it is decoded.

    Returns:
        The photo, and the bytes of its file.

    Raises:
        Unusable: with the reason; an incomplete photo is never returned.
    """
    _check_file(path, max_pixels)
    try:
        data = path.read_bytes()
        return decode(data, max_pixels), data
    except OSError as error:
        raise Unusable("unreadable", str(error.strerror)) from None
    except BadImage as error:
        raise Unusable(error.reason, error.detail) from None


def _check_file(path: Path, max_pixels: int) -> None:
    """Raise Unusable for what cannot be a photo, without reading it."""
    try:
        info = path.stat()
        if stat.S_ISDIR(info.st_mode):
            os.scandir(path).close()
            raise Unusable("unreadable", "a folder, not a file")
        # Opening a pipe would block forever.
        if not stat.S_ISREG(info.st_mode):
            raise Unusable("unreadable", "not a regular file")
    except OSError as error:
        raise Unusable("unreadable", str(error.strerror)) from None
    most = _BYTES_PER_PIXEL * max_pixels + _BYTES_BESIDE
    if info.st_size > most:
        raise Unusable("too_large", f"{info.st_size} bytes, the limit is {most}")
