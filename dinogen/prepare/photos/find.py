"""Finds the photos below a folder, and gives each a key made from its path."""

from __future__ import annotations

import hashlib
import os
import re
import stat
import unicodedata
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

from dinogen.prepare.photos.read import IMAGE_SUFFIXES, UNREAD, PrepareError, caption_files, kind_of
from shards.image.kinds import is_hidden

MAX_KEY = 80
_HASHED = 17  # a dash and 16 hex digits
# Shortened keys leave room for the number of a photo's further face: KEY_123.
_ROOM = 4
_PLAIN_STEM = re.compile(rf"[A-Za-z0-9][A-Za-z0-9_-]{{0,{MAX_KEY - 1}}}")
# Stems that are not used as keys, because keys of other photos, of further faces of a photo, and
# the files beside the crops look like this.
_TAKEN_STEM = re.compile(r"(?i).*-[0-9a-f]{16}|.*_[1-9][0-9]*|settings|summary|rejected")

# Text and metadata that are found beside photos: captions, Google Takeout, Lightroom, iOS.
_SIDECARS = frozenset(
    {".txt", ".json", ".jsonl", ".csv", ".tsv", ".xmp", ".aae", ".xml", ".yaml", ".yml", ".md"}
)
# Older versions and thumbnails of a photo beside them.
_SPARE = re.compile(r"(?i)\.(bak|orig|old|tmp|temp|swp|thm|lrv)|\..*(~|_original)")
# Recognised by the first bytes if the suffix says nothing; for other kinds these are not enough.
_KNOWN_BY_CONTENT = frozenset({".jpg", ".png", ".webp", ".gif", ".bmp", ".jp2", ".heic", ".avif"})
_HEAD = 512
_NUM_SUFFIXES = 40
_NO_SUFFIX = "no suffix"
_OTHERS = "other suffixes"
_BROKEN = "broken link"
_REMEDIES = {**UNREAD, _BROKEN: "the target is missing: mount its disk, or delete the link"}


@dataclass(frozen=True)
class Photo:
    """A file that may be a photo, by its suffix or its first bytes.

    Attributes:
        path: of the file.
        source: its path relative to the folder searched, with ``/``; bytes of the name that are
            not UTF-8 are written as ``\\xNN``.
        key: unique name for its crops; see :func:`photo_key`.
        caption: the text file of the same name beside it, if there is one.
    """

    path: Path
    source: str
    key: str
    caption: Path | None = None

    @property
    def has_caption(self) -> bool:
        """Whether there is a caption beside it."""
        return self.caption is not None


@dataclass(frozen=True)
class Photos:
    """The content of a folder and its subfolders.

    Attributes:
        photos: files that may be photos, and folders that cannot be listed, sorted by path.
        left_out: number of other files by suffix (lower case, with the dot, or ``no suffix``),
            most frequent first.
        num_sidecars: number of text and metadata files, such as captions.
        num_hidden: number of hidden and system files and folders; the content of such a folder is
            not counted.
        unlistable: sources of the folders that cannot be listed, and of broken links that may have
            led to folders; these are also counted in ``left_out``.
    """

    photos: tuple[Photo, ...]
    left_out: dict[str, int] = field(default_factory=dict)
    num_sidecars: int = 0
    num_hidden: int = 0
    unlistable: tuple[str, ...] = ()

    @property
    def num_files(self) -> int:
        """All files that were seen except hidden ones; a folder that cannot be listed counts."""
        return len(self.photos) + sum(self.left_out.values()) + self.num_sidecars


def find_photos(src: Path) -> Photos:
    """List every file below ``src`` that may be a photo, sorted by the bytes of its path.

    A photo has an image suffix, or a suffix that says nothing (``photo``, ``a.jpg_large``,
    ``a.jpg.1``) and begins like an image. Hidden and system files and folders
    (:func:`shards.image.kinds.is_hidden`) are skipped, but not ``src`` itself. Links are followed;
    a folder reached twice is searched once. Files with an image suffix that cannot be read, and
    folders that cannot be listed, are in the list too, so that reading them reports them.

    Raises:
        PrepareError: ``src`` is missing, is not a folder, or has no photo below it.
    """
    if not src.is_dir():
        what = "is not a folder" if src.exists() else "does not exist"
        raise PrepareError(f"{src}: {what}: give the folder that holds the photos")
    found: list[tuple[str, Path, Path | None]] = []  # relative path, file, its caption
    unlistable: list[Path] = []
    broken: list[Path] = []  # links, perhaps to folders that are not mounted
    visited: set[str] = set()
    others: Counter[str] = Counter()
    num_sidecars = num_hidden = 0
    for folder, folders, files in os.walk(
        src, onerror=lambda error: unlistable.append(Path(error.filename)), followlinks=True
    ):
        real = os.path.realpath(folder)
        if real in visited:
            folders.clear()
            continue
        visited.add(real)
        below = os.path.relpath(folder, src)
        within = "" if below == "." else f"{below}/"
        num_hidden += sum(map(is_hidden, folders)) + sum(map(is_hidden, files))
        folders[:] = sorted((n for n in folders if not is_hidden(n)), key=os.fsencode)
        texts = caption_files(name for name in files if not is_hidden(name))
        for name in (n for n in files if not is_hidden(n)):
            path = Path(folder, name)
            label = _label(path)
            if label is None:
                text = texts.get(path.stem) if texts else None
                caption = None if text is None else Path(folder, text)
                found.append((within + name, path, caption))
            elif label in _SIDECARS:
                num_sidecars += 1
            elif path.is_symlink() and not path.exists():
                broken.append(path)
                others[_BROKEN] += 1
            else:
                others[label] += 1
    found += [(path.relative_to(src).as_posix(), path, None) for path in unlistable]
    left_out = _most(others)
    if not found:
        raise PrepareError(
            f"{src}: no photo below this folder{_instead(left_out, num_hidden)}: give a folder "
            "with JPEG, PNG, WebP, TIFF or BMP files"
        )
    found.sort(key=lambda item: os.fsencode(item[0]))
    return Photos(
        tuple(Photo(path, _source(name), photo_key(name), text) for name, path, text in found),
        left_out,
        num_sidecars,
        num_hidden,
        tuple(_source(path.relative_to(src).as_posix()) for path in (*unlistable, *broken)),
    )


def left_out_words(left_out: dict[str, int]) -> list[str]:
    """``12 files left out: 4 .heic, 3 .avif, ...``, and a line for each remedy.

    Args:
        left_out: as in :class:`Photos`.
    """
    if not left_out:
        return []
    total = sum(left_out.values())
    counts = ", ".join(f"{count} {suffix}" for suffix, count in left_out.items())
    remedies: dict[str, list[str]] = {}
    for suffix in left_out:
        remedies.setdefault(_REMEDIES.get(suffix, ""), []).append(suffix)
    lines = [f"{counted(total, 'file')} left out: {counts}"]
    for remedy, suffixes in remedies.items():
        if remedy:
            lines.append(f"  {', '.join(suffixes)}: {remedy}")
    if unknown := remedies.get(""):
        lines.append(f"  {', '.join(unknown)}: not photos by suffix or content")
    return lines


def photo_key(relative: str) -> str:
    """The key of a photo; it depends only on its relative path, not on other photos.

    ``name.jpg`` directly in the folder searched keeps ``name`` if that is up to 80 letters,
    digits, ``_`` and ``-``. Every other path becomes such a name followed by ``-`` and 16 hex
    digits of the path's SHA-256, so ``a/x.jpg``, ``b/x.jpg`` and ``x.png`` differ.

    Args:
        relative: path relative to the folder searched, with ``/`` between its parts.

    Returns:
        ASCII letters, digits, ``_`` and ``-``; at most 80 characters.
    """
    stem, dot, suffix = relative.rpartition(".")
    if not dot or "/" in suffix:
        stem, suffix = relative, ""
    if suffix == "jpg" and _PLAIN_STEM.fullmatch(stem) and not _TAKEN_STEM.fullmatch(stem):
        return stem
    return _hashed_key(stem, relative)


def face_key(key: str, number: int) -> str:
    """The key of a photo's face: ``KEY`` for the first one, ``KEY_1`` for the second one.

    Args:
        key: the photo's key.
        number: of the face, from 0.
    """
    if not number:
        return key
    end = f"_{number}"
    if len(key) + len(end) <= MAX_KEY:
        return key + end
    return _with_hash(key, key, MAX_KEY - len(end)) + end


def face_number(key: str) -> int:
    """Number of the face in a key made by :func:`face_key`."""
    # No photo's own key ends like this, see photo_key.
    found = re.search(r"_([1-9][0-9]*)$", key)
    return int(found[1]) if found else 0


def kept_apart(photos: Photos) -> Photos:
    """The same photos with keys that differ in more than upper and lower case.

    For case-insensitive file systems, where ``A.jpg`` would replace ``a.jpg``.
    """
    taken: set[str] = set()
    apart = []
    for photo in photos.photos:
        key = photo.key
        if key.lower() in taken:
            key = _hashed_key(key, photo.source)
        taken.add(key.lower())
        apart.append(replace(photo, key=key))
    return replace(photos, photos=tuple(apart))


def _source(relative: str) -> str:
    return os.fsencode(relative).decode("utf-8", "backslashreplace")


def _hashed_key(stem: str, relative: str) -> str:
    ascii_stem = stem
    if not stem.isascii():
        ascii_stem = unicodedata.normalize("NFKD", stem).encode("ascii", "ignore").decode()
    slug = re.sub(r"[^A-Za-z0-9_]+", "-", ascii_stem).strip("-_")[-MAX_KEY:].strip("-_") or "photo"
    if len(slug) + _HASHED <= MAX_KEY:
        return f"{slug}-{_hash(relative)}"
    return _with_hash(slug, relative, MAX_KEY - _ROOM)


def _with_hash(slug: str, relative: str, length: int) -> str:
    """The end of a slug, and the hash of what it stands for, in ``length`` characters at most."""
    return f"{slug[-(length - _HASHED) :].strip('-_')}-{_hash(relative)}"


def _hash(relative: str) -> str:
    return hashlib.sha256(os.fsencode(relative)).hexdigest()[:16]


def _suffix(name: str) -> str:
    return Path(name).suffix.lower()


def _label(path: Path) -> str | None:
    """None if a file may be a photo; else the suffix to count it under."""
    suffix = _suffix(path.name)
    if suffix in IMAGE_SUFFIXES:
        return None
    label = os.fsencode(suffix).decode("utf-8", "backslashreplace") or _NO_SUFFIX
    if suffix in _SIDECARS or suffix in UNREAD or _SPARE.fullmatch(suffix):
        return label
    kind = kind_of(_head(path))
    if kind is None or not kind.suffixes:
        return label
    if kind.suffixes[0] in _KNOWN_BY_CONTENT or (
        # Camera raw files begin like TIFF.
        kind.suffixes[0] == ".tif" and (not suffix or suffix.startswith(".tif"))
    ):
        return None if kind.plugin else kind.suffixes[0]
    return label


def _head(path: Path) -> bytes:
    """The first bytes of a file; empty if it cannot be read or reading might block."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            return b""
        with path.open("rb") as file:
            return file.read(_HEAD)
    except OSError:
        return b""


def _most(others: Counter[str]) -> dict[str, int]:
    """The most frequent suffixes, and the rest under one name."""
    kept = dict(sorted(others.items(), key=lambda item: (-item[1], item[0]))[:_NUM_SUFFIXES])
    if rest := sum(others.values()) - sum(kept.values()):
        kept[_OTHERS] = rest
    return kept


def _instead(left_out: dict[str, int], num_hidden: int) -> str:
    """What there is instead of photos, in brackets."""
    parts: list[str] = left_out_words(left_out)
    if num_hidden:
        parts.append(f"{num_hidden} hidden or system files and folders skipped")
    return f" ({'; '.join(part.strip() for part in parts)})" if parts else ""


def named(names: Iterable[str], num: int = 5) -> str:
    """The first few names: ``a.jpg, b.jpg and 7 more``."""
    listed = list(names)
    more = f" and {len(listed) - num} more" if len(listed) > num else ""
    return ", ".join(listed[:num]) + more


def counted(number: int, noun: str, one: str = "", many: str = "") -> str:
    """``1 photo``, ``2 photos``, with a verb: ``1 photo is``."""
    verb = one if number == 1 else many
    return f"{number} {noun}{'' if number == 1 else 's'}{verb and f' {verb}'}"
