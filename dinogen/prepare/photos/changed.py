"""What has changed in a folder of photos since crops or a dataset were made from it."""

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
from dinogen.prepare.photos.read import try_caption

PHOTOS = "photos.csv"
_COLUMNS = ("source", "crops", "bytes", "mtime_ns", "sha256", "caption_sha256")
_WORDS = {"withdrawn": "removed", "recaptioned": "with another caption"}
# Up to this many photos may well be removed by hand.
_MANY = 10

FileRecord = dict[str, Any]
# A record that matches no file.
NO_FILE: FileRecord = {"bytes": -1, "mtime_ns": 0, "sha256": ""}


def record_of(path: Path) -> FileRecord | None:
    """Identifies a file's content; None if it cannot be read.

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
    """Whether a file matches its record: by size and time, or else by its bytes.

    A file that was only touched or copied matches. One that cannot be read now counts as a match.
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
        withdrawn: existed, and are gone.
        replaced: exist, with other content.
        added: did not exist.
        recaptioned: have another caption, a new one, or none any more.
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
    """Sources of an earlier run that are no longer among the photos.

    Photos in a folder that cannot be listed now do not count as gone.
    """
    there = {photo.source for photo in photos.photos}
    unseen = tuple(f"{folder}/" for folder in photos.unlistable if folder != ".")
    if "." in photos.unlistable:
        return []
    return [s for s in before if s not in there and not s.startswith(unseen)]


def looks_like_an_accident(num_gone: int, num_before: int) -> bool:
    """Whether enough photos are gone that the folder may be another one, or not mounted."""
    return num_gone > 0 and (
        num_gone == num_before or (num_gone > _MANY and 2 * num_gone > num_before)
    )


def emptied(src: Path, before: Collection[str], missing: Collection[str]) -> list[str]:
    """Folders below ``src`` that had many photos and are empty now.

    The mount point of a disk that is not mounted looks like this.
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
    """Identifies a caption: its SHA-256 as hex, ``none`` if there is none."""
    return "none" if caption is None else hashlib.sha256(caption.encode()).hexdigest()


def write_photos(
    path: Path, photos: Iterable[tuple[str, int, FileRecord | None, str | None]]
) -> None:
    """Write the list of the photos that a dataset was made from.

    Args:
        path: of the file.
        photos: source, number of crops, and records of the file and of its caption; None if
            these are unknown.
    """
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(_COLUMNS)
    for source, num_crops, record, caption in photos:
        facts = [(record or {}).get(name, "") for name in _COLUMNS[2:-1]]
        writer.writerow([source, num_crops, *facts, caption or ""])
    write_text(path, buffer.getvalue())


def read_photos(path: Path) -> dict[str, FileRecord | None] | None:
    """By source, the record of each photo that a dataset was made from.

    Returns:
        None if the dataset has no list; a photo's record is None if the file could not be read.
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
    """How photos differ from those that a dataset was made from.

    Args:
        before: from :func:`read_photos`.
        photos: as they are now.
        with_captions: whether the captions of photos that were used count.
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
