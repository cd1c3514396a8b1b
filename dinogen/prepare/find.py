"""Find the photos below a folder, and give each a key made from its path."""

from __future__ import annotations

import hashlib
import os
import re
import unicodedata
from dataclasses import dataclass
from pathlib import Path

from dinogen.prepare.read import IMAGE_SUFFIXES, PrepareError

_PLAIN_STEM = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,99}")
# What a stem must not look like, because keys of other photos, of further faces of a photo, and
# the files that stand beside the crops look like this.
_TAKEN_STEM = re.compile(r"(?i).*-[0-9a-f]{16}|.*_[1-9][0-9]*|settings|summary|rejected")


@dataclass(frozen=True)
class Photo:
    """A file that may be a photo, by its suffix.

    Attributes:
        path: where it lies.
        source: its path relative to the folder searched, with ``/``; bytes of the name that are
            not UTF-8 are written as ``\\xNN``.
        key: unique name for its crops; see :func:`photo_key`.
    """

    path: Path
    source: str
    key: str


@dataclass(frozen=True)
class Photos:
    """What lies below a folder.

    Attributes:
        photos: files with an image suffix, and folders that cannot be used, sorted by path.
        num_ignored: number of files with another suffix.
    """

    photos: tuple[Photo, ...]
    num_ignored: int


def find_photos(src: Path) -> Photos:
    """List every file with an image suffix below ``src``, sorted by the bytes of its path.

    Links are followed; a folder reached twice is searched once. What has an image suffix but is
    no file, and a folder that may not be listed, are in the list too, so that reading them
    reports them.

    Raises:
        PrepareError: ``src`` is missing, is no folder, or has no file with an image suffix.
    """
    if not src.is_dir():
        what = "is not a folder" if src.exists() else "does not exist"
        raise PrepareError(f"{src}: {what}: give the folder that holds the photos")
    paths: list[Path] = []
    visited: set[str] = set()
    num_ignored = 0

    def unlistable(error: OSError) -> None:
        paths.append(Path(error.filename))

    for folder, folders, files in os.walk(src, onerror=unlistable, followlinks=True):
        real = os.path.realpath(folder)
        if real in visited:
            folders.clear()
            continue
        visited.add(real)
        folders.sort(key=os.fsencode)
        names = files + folders
        chosen = [name for name in names if Path(name).suffix.lower() in IMAGE_SUFFIXES]
        paths += [Path(folder, name) for name in chosen]
        num_ignored += len(set(files).difference(chosen))
    if not paths:
        others = f" ({num_ignored} files have another suffix)" if num_ignored else ""
        raise PrepareError(
            f"{src}: no photo below this folder{others}: give a folder with JPEG, PNG, WebP, TIFF "
            "or BMP files"
        )
    paths.sort(key=lambda path: os.fsencode(path.relative_to(src).as_posix()))
    return Photos(tuple(_photo(path, src) for path in paths), num_ignored)


def _photo(path: Path, src: Path) -> Photo:
    relative = path.relative_to(src).as_posix()
    source = os.fsencode(relative).decode("utf-8", "backslashreplace")
    return Photo(path, source, photo_key(relative))


def photo_key(relative: str) -> str:
    """The key of a photo from its relative path alone, whatever other photos there are.

    ``name.jpg`` directly in the folder searched keeps ``name`` if that is letters, digits, ``_``
    and ``-``. Every other path becomes such a name followed by ``-`` and 16 hex digits of the
    path's SHA-256, so ``a/x.jpg``, ``b/x.jpg`` and ``x.png`` differ.

    Args:
        relative: path relative to the folder searched, with ``/`` between its parts.

    Returns:
        ASCII letters, digits, ``_`` and ``-``; at most 100 characters.
    """
    stem, _, suffix = relative.rpartition(".")
    if suffix == "jpg" and _PLAIN_STEM.fullmatch(stem) and not _TAKEN_STEM.fullmatch(stem):
        return stem
    ascii_stem = unicodedata.normalize("NFKD", stem).encode("ascii", "ignore").decode()
    slug = re.sub(r"[^A-Za-z0-9_]+", "-", ascii_stem).strip("-_")[-80:].strip("-_") or "photo"
    return f"{slug}-{hashlib.sha256(os.fsencode(relative)).hexdigest()[:16]}"
