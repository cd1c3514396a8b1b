"""Read a list of files to download: addresses, checksums and safe file names."""

from __future__ import annotations

import csv
import hashlib
import re
from collections.abc import Iterator, Set
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from urllib.parse import unquote, urlsplit

from dinogen.prepare.read import PrepareError

_SHA256 = re.compile(r"[0-9a-fA-F]{64}")
_COLUMNS = ("url", "sha256", "filename")
_LONGEST_NAME = 200  # bytes; file systems allow 255, and a partial file's name is longer


@dataclass(frozen=True)
class Item:
    """One file: its address, what it is called on disk, and its SHA-256 in hex if known."""

    url: str
    filename: str
    sha256: str | None


def read_list(listing: Path, reserved: Set[str] = frozenset()) -> list[Item]:
    """Read ``URL [sha256] [filename]`` lines.

    In a ``.csv`` file the columns are url, sha256 and filename, in this order or as a header
    line names them; in any other file they stand apart by blanks, empty lines and lines that
    begin with ``#`` do not count, and the filename, being last, may hold blanks. Without a
    filename a file is called like the last part of its address; if an earlier one is called so
    already, a hash of the address is added. A line that comes twice counts once.

    Args:
        listing: UTF-8 text.
        reserved: names that no file may have.

    Raises:
        PrepareError: naming the line, for anything but an http or https address, a checksum
            that is none, a filename that is no plain name, two addresses for one filename or two
            checksums for one address.
    """
    try:
        text = listing.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise PrepareError(f"{listing}: no such list") from None
    except (OSError, UnicodeDecodeError) as error:
        raise PrepareError(f"{listing}: cannot be read as text: {error}") from None
    rows = _csv_rows(text) if listing.suffix.lower() == ".csv" else _text_rows(text)
    items: dict[str, Item] = {}
    seen: set[tuple[str, str, str]] = set()
    unnamed: set[str] = set()
    for number, url, sha256, filename in rows:
        where = f"{listing}, line {number}"
        if (url, sha256, filename) in seen:
            continue
        seen.add((url, sha256, filename))
        if not _is_address(url):
            raise PrepareError(f"{where}: '{url}' is no http or https address")
        if sha256 and not _SHA256.fullmatch(sha256):
            raise PrepareError(f"{where}: '{sha256}' is no SHA-256, which has 64 hex digits")
        if filename:
            _check_name(filename, reserved, where)
            name = filename
            if name in items:
                raise PrepareError(
                    f"{where}: '{name}' is already the name of {items[name].url}: give another"
                )
        else:
            if url in unnamed:
                raise PrepareError(f"{where}: '{url}' comes twice with different checksums")
            unnamed.add(url)
            name = _name_of(url, {*items, *reserved})
        items[name] = Item(url, name, sha256.lower() or None)
    if not items:
        raise PrepareError(f"{listing}: no address in it: write one URL per line")
    return list(items.values())


def _text_rows(text: str) -> Iterator[tuple[int, str, str, str]]:
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        url, *rest = line.split(maxsplit=1)
        sha256, filename = "", rest[0].strip() if rest else ""
        first, *others = filename.split(maxsplit=1) if filename else [""]
        if _SHA256.fullmatch(first):
            sha256, filename = first, others[0] if others else ""
        yield number, url, sha256, filename


def _csv_rows(text: str) -> Iterator[tuple[int, str, str, str]]:
    reader = csv.reader(text.splitlines())
    columns: tuple[str, ...] = _COLUMNS
    for row in reader:
        cells = [cell.strip() for cell in row]
        if not any(cells):
            continue
        if reader.line_num == 1 and "url" in [cell.lower() for cell in cells]:
            columns = tuple(cell.lower() for cell in cells)
            continue
        named = dict(zip(columns, cells, strict=False))
        yield reader.line_num, *(named.get(column, "") for column in _COLUMNS)  # type: ignore[misc]


def _is_address(url: str) -> bool:
    try:
        parts = urlsplit(url)
    except ValueError:
        return False
    return parts.scheme in ("http", "https") and bool(parts.hostname)


def _check_name(name: str, reserved: Set[str], where: str) -> None:
    plain = PurePosixPath(name).name == name and "\\" not in name and name.isprintable()
    if not plain or name.startswith(".") or len(name.encode()) > _LONGEST_NAME:
        raise PrepareError(
            f"{where}: '{name}' is no plain file name: leave out folders, control characters and "
            f"a leading dot, and keep to {_LONGEST_NAME} bytes"
        )
    if name in reserved:
        raise PrepareError(f"{where}: '{name}' is written by dinogen itself: give another name")


def _name_of(url: str, taken: Set[str]) -> str:
    last = PurePosixPath(unquote(urlsplit(url).path)).name
    name = re.sub(r"[^\w.()+-]+", "_", last).lstrip(".") or "file"
    path = PurePosixPath(name)
    suffix = path.suffix if len(path.suffix.encode()) <= 16 else ""
    stem = name.removesuffix(suffix)
    room = _LONGEST_NAME - 20 - len(suffix.encode())
    stem = stem.encode()[:room].decode("utf-8", "ignore")
    name = stem + suffix
    if name in taken:
        name = f"{stem}-{hashlib.sha256(url.encode()).hexdigest()[:16]}{suffix}"
    return name
