"""Captions of photos: beside each a text file of the same name, but for the suffix.

Upper and lower case of the suffix do not matter. Where there are several, such as ``x.txt`` and
``x.TXT``, ``x.txt`` is the caption, else the first by the bytes of its name.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

MAX_BYTES = 4096
_SUFFIX = ".txt"
BAD_CAPTION = "bad_caption"


class CaptionError(Exception):
    """One caption cannot be used; the message names the file, and what to do."""


def caption_path(photo: Path) -> Path:
    """Where the caption of a photo is written: ``a/b.jpg`` -> ``a/b.txt``."""
    return photo.with_suffix(".txt")


def caption_files(names: Iterable[str]) -> dict[str, str]:
    """Which of the files in a folder are captions, by their names without the suffix."""
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
        raise CaptionError(f"{path.name}: a caption has at most {MAX_BYTES} bytes: shorten it")
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
    """The caption in a file, None if there is none that can be used; and why, or ``""``."""
    try:
        return read_caption(path), ""
    except CaptionError as error:
        return None, str(error)
