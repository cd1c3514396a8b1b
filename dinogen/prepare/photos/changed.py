"""What has changed below a folder of photos since crops or a dataset were made of it."""

from __future__ import annotations

import csv
import hashlib
import io
import stat
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dinogen.files import write_text
from dinogen.prepare.photos.find import Photo, Photos, named
from dinogen.prepare.photos.labels import try_caption

PHOTOS = "photos.csv"
_COLUMNS = ("source", "crops", "bytes", "mtime_ns", "sha256", "caption_sha256")
_WORDS = {"recaptioned": "with another caption"}
# Of fewer photos so many may well be withdrawn by hand.
_MANY = 10

FileRecord = dict[str, Any]
# The record of no file that there can be.
NO_FILE: FileRecord = {"bytes": -1, "mtime_ns": 0, "sha256": ""}


def record_of(path: Path) -> FileRecord | None:
    """What tells a file from its replacement; None if it cannot be read.

    Returns:
        ``bytes``, ``mtime_ns`` and ``sha256``; JSON values.
    """
    digest = hashlib.sha256()
    try:
        info = path.stat()
        if not stat.S_ISREG(info.st_mode):
            return None
        with path.open("rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
    except OSError:
        return None
    return {
        "bytes": info.st_size,
        "mtime_ns": info.st_mtime_ns,
        "sha256": digest.hexdigest(),
    }


def same_file(path: Path, record: Mapping[str, Any]) -> bool:
    """Whether a file is what its record says: by size and time, or else by its bytes.

    One that was only touched or copied is the same. One that cannot be read now is not held to be
    another.
    """
    try:
        info = path.stat()
    except OSError:
        return True
    if info.st_size != record["bytes"]:
        return False
    if info.st_mtime_ns == record["mtime_ns"]:
        return True
    found = record_of(path)
    return found is None or bool(found["sha256"] == record["sha256"])


@dataclass(frozen=True)
class Changes:
    """How photos differ from those of an earlier run, by their sources.

    Attributes:
        withdrawn: were there, and are gone.
        replaced: are there, with other content.
        added: were not there.
        recaptioned: have another caption, or one where there was none, or none any more.
    """

    withdrawn: tuple[str, ...] = ()
    replaced: tuple[str, ...] = ()
    added: tuple[str, ...] = ()
    recaptioned: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return any(vars(self).values())

    def __str__(self) -> str:
        parts = [
            f"{len(names)} {_WORDS.get(what, what)} ({named(names)})"
            for what, names in vars(self).items()
            if names
        ]
        return ", ".join(parts)


def gone(before: Iterable[str], photos: Photos) -> list[str]:
    """Sources of an earlier run that are not among the photos any more.

    What lies in a folder that cannot be listed now is not held to be gone.
    """
    there = {photo.source for photo in photos.photos}
    unseen = tuple(f"{folder}/" for folder in photos.unlistable if folder != ".")
    if "." in photos.unlistable:
        return []
    return [s for s in before if s not in there and not s.startswith(unseen)]


def looks_like_an_accident(num_gone: int, num_before: int) -> bool:
    """Whether so many photos are gone that the folder may be another one, or not mounted."""
    return num_gone > 0 and (
        num_gone == num_before or (num_gone > _MANY and 2 * num_gone > num_before)
    )


def emptied(src: Path, before: Collection[str], missing: Collection[str]) -> list[str]:
    """Folders below ``src`` that have lost many photos, all they had, and are empty now.

    That is how the place of a disk looks that is not mounted.
    """
    had, lost = (
        Counter(source.partition("/")[0] for source in sources if "/" in source)
        for sources in (before, missing)
    )
    return [
        name
        for name, count in lost.items()
        if count == had[name] > _MANY and (src / name).is_dir() and not any((src / name).iterdir())
    ]


def caption_record(caption: str | None) -> str:
    """What tells a caption from another one: its SHA-256 as hex, ``none`` of no caption."""
    return "none" if caption is None else hashlib.sha256(caption.encode()).hexdigest()


def write_photos(
    path: Path, photos: Iterable[tuple[str, int, FileRecord | None, str | None]]
) -> None:
    """Write down of which photos a dataset was made.

    Args:
        path: of the file.
        photos: source, number of crops, and records of each and of its caption; None where
            these are not known.
    """
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(_COLUMNS)
    for source, num_crops, record, caption in photos:
        facts = [(record or {}).get(name, "") for name in _COLUMNS[2:-1]]
        writer.writerow([source, num_crops, *facts, caption or ""])
    write_text(path, buffer.getvalue())


def read_photos(path: Path) -> dict[str, FileRecord | None] | None:
    """By source, the record of each photo that a dataset was made of.

    Returns:
        None if the dataset does not say; a photo's record is None where the file could not be
        read.
    """
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        return {
            row["source"]: {
                "bytes": int(row["bytes"]),
                "mtime_ns": int(row["mtime_ns"]),
                "sha256": row["sha256"],
                "caption": row.get("caption_sha256") or None,
            }
            if row["sha256"]
            else None
            for row in rows
        }
    except (OSError, ValueError, KeyError, TypeError):
        return None


def changes_since(
    before: Mapping[str, FileRecord | None], photos: Photos, with_captions: bool = False
) -> Changes:
    """How photos differ from those that a dataset was made of.

    Args:
        before: as :func:`read_photos` gives it.
        photos: as they are now.
        with_captions: whether their captions count, of photos that were used.
    """

    def is_replaced(photo: Photo) -> bool:
        record = before[photo.source]
        if record is None:  # it could not be read then
            return record_of(photo.path) is not None
        return not same_file(photo.path, record)

    def is_recaptioned(photo: Photo) -> bool:
        recorded = (before[photo.source] or {}).get("caption")
        return bool(recorded) and caption_record(try_caption(photo.caption)[0]) != recorded

    known = [photo for photo in photos.photos if photo.source in before]
    return Changes(
        tuple(gone(before, photos)),
        tuple(photo.source for photo in known if is_replaced(photo)),
        tuple(photo.source for photo in photos.photos if photo.source not in before),
        tuple(photo.source for photo in known if with_captions and is_recaptioned(photo)),
    )
