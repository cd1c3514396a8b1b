"""Captions of photos: beside each a text file of the same name, but for the suffix."""

from __future__ import annotations

from pathlib import Path

MAX_BYTES = 4096
BAD_CAPTION = "bad_caption"


class CaptionError(Exception):
    """One caption cannot be used; the message names the file, and what to do."""


def caption_path(photo: Path) -> Path:
    """Where the caption of a photo lies, if it has one: ``a/b.jpg`` -> ``a/b.txt``."""
    return photo.with_suffix(".txt")


def read_caption(photo: Path) -> str | None:
    """The caption of a photo, stripped; None if it has none.

    Raises:
        CaptionError: there is one, but it cannot be read, is longer than ``MAX_BYTES``, empty or
            not UTF-8.
    """
    path = caption_path(photo)
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
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


def try_caption(photo: Path) -> tuple[str | None, str]:
    """A photo's caption, None if it has none that can be used; and then the reason, or ``""``."""
    try:
        return read_caption(photo), ""
    except CaptionError as error:
        return None, str(error)
