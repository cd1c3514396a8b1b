"""Captions of pictures: beside each a text file of the same name, but for the suffix."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from dinogen.prepare.read import PrepareError

MAX_BYTES = 4096


def caption_path(picture: Path) -> Path:
    """Where the caption of a picture lies, if it has one: ``a/b.jpg`` -> ``a/b.txt``."""
    return picture.with_suffix(".txt")


def has_captions(pictures: Iterable[Path]) -> bool:
    """Whether any of these pictures has a caption."""
    return any(caption_path(picture).exists() for picture in pictures)


def read_caption(picture: Path) -> str | None:
    """The caption of a picture, stripped; None if it has none.

    Raises:
        PrepareError: there is one, but it cannot be read, is longer than ``MAX_BYTES``, empty or
            not UTF-8; naming the file.
    """
    path = caption_path(picture)
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise PrepareError(f"{path}: the caption cannot be read ({error.strerror})") from None
    if len(data) > MAX_BYTES:
        raise PrepareError(f"{path}: a caption has at most {MAX_BYTES} bytes: shorten it")
    try:
        text = data.decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise PrepareError(
            f"{path}: the caption is not UTF-8 (byte {error.start}): save it as UTF-8"
        ) from None
    if not text:
        raise PrepareError(f"{path}: the caption is empty: write one, or delete the file")
    return text
