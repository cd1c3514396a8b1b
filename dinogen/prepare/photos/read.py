"""Reads a photo: its pixels upright, its caption from the file beside it, its class by folder."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Sequence
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


MAX_BYTES = 4096
_SUFFIX = ".txt"
BAD_CAPTION = "bad_caption"


class CaptionError(Exception):
    """One caption cannot be used; the message names the file, and what to do."""


def caption_path(photo: Path) -> Path:
    """Where the caption of a photo is written: ``a/b.jpg`` -> ``a/b.txt``."""
    return photo.with_suffix(".txt")


def caption_files(names: Iterable[str]) -> dict[str, str]:
    """The caption files in a folder, by their names without the suffix."""
    texts = [name for name in names if name[-len(_SUFFIX) :].lower() == _SUFFIX]
    texts.sort(key=lambda name: (not name.endswith(_SUFFIX), os.fsencode(name)))
    found: dict[str, str] = {}
    for name in texts:
        found.setdefault(name[: -len(_SUFFIX)], name)
    return found


def read_caption(path: Path | None) -> str | None:
    """The caption in a file, stripped; None if there is none.

    Raises:
        CaptionError: there is one, but it cannot be read, is longer than ``MAX_BYTES``, empty or
            not UTF-8.
    """
    if path is None:
        return None
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        if path.is_symlink():
            raise CaptionError(f"{path.name}: the caption is a broken link: repair it") from None
        return None
    except OSError as error:
        raise CaptionError(f"{path.name}: the caption cannot be read ({error.strerror})") from None
    if data[:2] in (b"\xff\xfe", b"\xfe\xff") or b"\0" in data:
        raise CaptionError(f"{path.name}: the caption is UTF-16 or no text: save it as UTF-8")
    if len(data) > MAX_BYTES:
        raise CaptionError(f"{path.name}: the caption is longer than {MAX_BYTES} bytes: shorten it")
    try:
        text = data.decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise CaptionError(
            f"{path.name}: the caption is not UTF-8 (byte {error.start}): save it as UTF-8"
        ) from None
    if not text:
        raise CaptionError(f"{path.name}: the caption is empty: write one, or delete the file")
    return text


def try_caption(path: Path | None) -> tuple[str | None, str]:
    """The caption in a file, or None if it cannot be used; and the reason, or ``""``."""
    try:
        return read_caption(path), ""
    except CaptionError as error:
        return None, str(error)


NO_CLASS = "no_class"
NO_CLASS_REMEDY = "is outside the folders of the classes: move it into one of them"


def class_names(src: Path, sources: Iterable[str]) -> tuple[str, ...]:
    """Names of the classes, sorted; a class's label is its position among them, from 0.

    Photos outside the folders have no class (:func:`has_class`), and are rejected one by one.

    Args:
        src: folder of the photos, named in errors.
        sources: the photos' paths relative to it.

    Raises:
        PrepareError: there are fewer than two folders.
    """
    names = {source.partition("/")[0] for source in sources if has_class(source)}
    if len(names) < 2:
        raise PrepareError(
            f"{src}: {'only one class, ' + names.pop() if names else 'no class'}: make a folder "
            "per class in it, or leave out prepare.faces.classes=folders"
        )
    return tuple(sorted(names))


def has_class(source: str) -> bool:
    """Whether a photo lies in one of the folders below the one searched."""
    return "/" in source


def label_of(source: str, classes: Sequence[str]) -> int | None:
    """Number of a photo's class; None if there are no classes.

    Args:
        source: the photo's path relative to the folder searched.
        classes: from :func:`class_names`.
    """
    return classes.index(source.partition("/")[0]) if classes else None
