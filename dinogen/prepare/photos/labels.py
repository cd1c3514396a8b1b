"""Labels of a photo: its caption in a text file beside it, and its class by its folder."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from dinogen.prepare.photos.read import PrepareError

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
