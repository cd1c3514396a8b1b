"""Read a list of files to download: addresses, checksums and safe file names."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Set
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from urllib.parse import unquote

import httpx

from dinogen.prepare.download.rows import FILE_SUFFIXES, PHOTO_SUFFIXES, SHA256, BadLine, read_rows
from dinogen.prepare.photos.read import PrepareError

_SUFFIX = re.compile(r"\.(?=[0-9]*[A-Za-z])[0-9A-Za-z]{1,12}")
_HOST = re.compile(r"(?=.{1,253}$)([A-Za-z0-9_-]{1,63}\.)*[A-Za-z0-9_-]{1,63}\.?|[0-9a-fA-F:.]+")
_CREDENTIALS = re.compile(r"(?<=//)[^/?#\s]*@")
_LONGEST_NAME = 200  # bytes; file systems allow 255, and a partial file's name is longer
_LONGEST_QUERY = 60  # bytes; longer ones are signatures, and make no readable name
_LONGEST_SHOWN = 300
_LONGEST_URL = 4000
_LONGEST_QUOTED = 60


@dataclass(frozen=True)
class Item:
    """One file to fetch.

    Attributes:
        line: of the list, counted from 1.
        url: its address, as the list has it.
        filename: what it is called on disk; if ``by_content``, without its suffix.
        sha256: in lower-case hex, if known.
        by_content: the suffix follows from what is fetched, which has to be an image.
    """

    line: int
    url: str
    filename: str
    sha256: str | None
    by_content: bool


@dataclass(frozen=True)
class Failure:
    """One line of the list whose file was not fetched.

    Attributes:
        line: of the list, counted from 1.
        url: its address, or the whole line where none can be told; without credentials.
        filename: what it would have been called, if known.
        reason: ``bad_url``, ``bad_checksum``, ``bad_filename`` or ``bad_line`` for what the list
            says; ``http_404`` and the like, ``connection``, ``checksum``, ``protocol``,
            ``retry_after``, ``empty``, ``not_an_image``, ``web_page`` or ``unwritable`` for what
            became of it.
        detail: for a person.
    """

    line: int
    url: str
    filename: str
    reason: str
    detail: str


@dataclass(frozen=True)
class Listing:
    """What a list says.

    Attributes:
        items: different files, in the order of the list.
        bad: lines that cannot be used.
        num_lines: all lines of the file.
        num_blank: of these, empty lines, comments and the header.
        num_repeated: of these, lines that name a file of an earlier line again.
        num_continued: of these, lines on which the cell of an earlier line goes on.
    """

    items: tuple[Item, ...]
    bad: tuple[Failure, ...]
    num_lines: int
    num_blank: int
    num_repeated: int
    num_continued: int


@dataclass(frozen=True)
class _Wanted:
    line: int
    text: str
    url: str
    sha256: str
    filename: str


def read_list(listing: Path, reserved: Set[str] = frozenset()) -> Listing:
    """Read ``URL [sha256] [filename]`` lines; a line that cannot be used stops no other.

    A table is a file that ends in ``.csv`` or ``.tsv``, or whose first line names a column of
    addresses (``url``, ``image_url``, ...; case does not count). Its cells stand apart by commas,
    semicolons, tabs or bars. Without such a header its columns are url, sha256 and filename. Other
    columns, such as captions, are passed over. In any other file a tab or blanks stand between
    URL, checksum and filename; the filename may hold blanks. A blank inside a URL is part of it if
    that is certain, and makes the line unusable if it might as well begin the filename. Empty
    lines and lines that begin with ``#`` do not count.

    Without a filename a file is called like the last part of its address; if another one is
    called so already, a hash of the address is added. A line that comes twice counts once.

    Args:
        listing: UTF-8 or UTF-16 text. Other bytes are allowed where they do not matter.
        reserved: names that no file may have.

    Raises:
        PrepareError: the list is missing, is no text, or holds no line but comments.
    """
    entries = list(read_rows(listing))
    rows: list[_Wanted] = []
    bad: list[Failure] = []
    for row in entries:
        if isinstance(row.cells, BadLine):
            bad.append(_failure(row.line, row.text, row.cells))
        elif row.cells is not None:
            rows.append(_Wanted(row.line, row.text, *row.cells))
    if not rows and not bad:
        raise PrepareError(f"{listing}: no address in it: write one URL per line")
    items, worse, num_repeated = _name_all(rows, reserved)
    bad = sorted([*bad, *worse], key=lambda failure: failure.line)
    return Listing(
        items=tuple(items),
        bad=tuple(bad),
        num_lines=sum(row.num_lines for row in entries),
        num_blank=sum(row.cells is None for row in entries),
        num_repeated=num_repeated,
        num_continued=sum(row.num_lines - 1 for row in entries),
    )


def address(url: str) -> httpx.URL:
    """The address to ask for: blanks, other alphabets and lone percent signs are encoded.

    Raises:
        httpx.InvalidURL: it makes no sense.
    """
    return httpx.URL(re.sub(r"%(?![0-9A-Fa-f]{2})", "%25", url))


def _quoted(text: str) -> str:
    return f"'{shown(text, _LONGEST_QUOTED)}'"


def shown_url(url: str) -> str:
    """An address, or a whole line, as one printable line without credentials."""
    return shown(_CREDENTIALS.sub("***@", url[: 2 * _LONGEST_URL]), _LONGEST_URL)


def shown(text: str, longest: int = _LONGEST_SHOWN) -> str:
    """A text from outside as one short printable line."""
    text = text[: longest + 1]
    text = text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    text = "".join(
        c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text
    )
    return text if len(text) <= longest else text[:longest] + "..."


def _failure(line: int, text: str, error: BadLine, filename: str = "") -> Failure:
    return Failure(line, shown_url(text), shown(filename), error.reason, shown(str(error)))


def _name_all(rows: list[_Wanted], reserved: Set[str]) -> tuple[list[Item], list[Failure], int]:
    """Check each row and name its file; returns files, unusable rows, number of repetitions."""
    bad: list[Failure] = []
    seen: set[tuple[str, str, str]] = set()
    unnamed: dict[str, Item] = {}
    names = _Names(reserved)
    items: dict[int, Item] = {}
    derived: list[tuple[_Wanted, str, str]] = []
    for row in rows:
        url, sha256, filename = row.url, row.sha256, row.filename
        try:
            parts = _check_address(url)
            if sha256 and not SHA256.fullmatch(sha256):
                raise BadLine(
                    "bad_checksum",
                    f"{_quoted(sha256)} is not a SHA-256, which has 64 hex digits; if it is "
                    f"a caption or the like, begin the table with a line that names its columns",
                )
            if filename:
                _check_name(filename, reserved)
        except BadLine as error:
            bad.append(_failure(row.line, url or row.text, error, filename))
            continue
        if (url, sha256, filename) in seen:
            continue
        seen.add((url, sha256, filename))
        if not filename:
            derived.append((row, PurePosixPath(parts.path).name, parts.query.decode("ascii")))
            continue
        item = Item(
            row.line, url, filename, sha256.lower() or None,
            by_content=not _SUFFIX.fullmatch(PurePosixPath(filename).suffix),
        )  # fmt: skip
        other = names.holder(item.filename, item.by_content)
        if other is None:
            names.add(item)
            items[row.line] = item
        else:
            what = f"{_quoted(filename)} is already the name of line {other.line}: give another"
            bad.append(_failure(row.line, url, BadLine("bad_filename", what), filename))
    # Given names come first, so that no derived one takes theirs.
    for row, last, query in derived:
        url, sha256 = row.url, row.sha256
        earlier = unnamed.get(url)
        if earlier is None:
            item = names.derive(row.line, url, sha256.lower() or None, last, query)
            unnamed[url] = items[row.line] = item
        elif sha256 and earlier.sha256 and sha256.lower() != earlier.sha256:
            what = f"line {earlier.line} has another checksum for the same address"
            bad.append(_failure(row.line, url, BadLine("bad_checksum", what)))
        elif sha256 and not earlier.sha256:
            # The more careful of the two lines counts.
            unnamed[url] = items[earlier.line] = replace(earlier, sha256=sha256.lower())
    num_repeated = len(rows) - len(items) - len(bad)
    return [items[line] for line in sorted(items)], bad, num_repeated


def _check_address(url: str) -> httpx.URL:
    """The parts of ``url``; raises BadLine unless it is an http or https address."""
    if not url:
        raise BadLine("bad_url", "there is no address in this line")
    if any("\ud800" <= c <= "\udfff" for c in url):
        raise BadLine("bad_url", "the address is not UTF-8: save the list as UTF-8")
    if not url.isprintable() and any(c < " " or c == "\x7f" for c in url):
        raise BadLine("bad_url", "the address holds control characters")
    scheme, found, rest = url.partition("://")
    if not found or scheme.lower() not in ("http", "https"):
        more = ": write https: before it" if url.startswith("//") else ""
        raise BadLine("bad_url", f"is not an http or https address{more}")
    if "#" in url:
        raise BadLine(
            "bad_url", "holds '#': write %23 if it is part of the name, or leave out what follows"
        )
    if "@" in re.split(r"[/?]", rest, maxsplit=1)[0]:
        raise BadLine("bad_url", "holds credentials, which would be written to logs: not supported")
    try:
        parts = address(url)
    except (httpx.InvalidURL, ValueError) as error:
        raise BadLine("bad_url", f"makes no sense: {error}") from None
    if not _HOST.fullmatch(parts.raw_host.decode("ascii")):
        raise BadLine("bad_url", f"{_quoted(parts.host)} is not the name of a host")
    if parts.port is not None and not 0 < parts.port < 65536:
        raise BadLine("bad_url", f"there is no port {parts.port}")
    return parts


def _check_name(name: str, reserved: Set[str]) -> None:
    plain = PurePosixPath(name).name == name and "\\" not in name and name.isprintable()
    if not plain or name.startswith(".") or len(name.encode()) > _LONGEST_NAME:
        raise BadLine(
            "bad_filename",
            f"{_quoted(name)} is not a plain file name: leave out folders, control characters and "
            f"a leading dot, and keep to {_LONGEST_NAME} bytes",
        )
    if name in reserved:
        raise BadLine(
            "bad_filename", f"{_quoted(name)} is written by dinogen itself: give another name"
        )


class _Names:
    """Names that are taken, and who has them. A name by content takes all its suffixes."""

    def __init__(self, reserved: Set[str]) -> None:
        self._reserved = reserved
        self._whole: dict[str, Item] = {}
        self._stems: dict[str, Item] = {}

    def holder(self, name: str, by_content: bool) -> Item | None:
        path = PurePosixPath(name)
        mine = [name, *(name + suffix for suffix in PHOTO_SUFFIXES)] if by_content else [name]
        found = next((self._whole[one] for one in mine if one in self._whole), None)
        found = found or self._stems.get(name)
        if found is None and path.suffix in PHOTO_SUFFIXES:
            found = self._stems.get(path.stem)
        return found

    def add(self, item: Item) -> None:
        (self._stems if item.by_content else self._whole)[item.filename] = item

    def derive(self, line: int, url: str, sha256: str | None, last: str, query: str) -> Item:
        """A file called like the last part of its address, and its query where that helps."""
        name = re.sub(r"[^\w.()+-]+", "_", last).lstrip(".") or "file"
        suffix = PurePosixPath(name).suffix
        by_content = suffix.lower() not in PHOTO_SUFFIXES | FILE_SUFFIXES
        if by_content:
            # Without a suffix it is often the query that tells one photo from another.
            query = re.sub(r"[^\w.()+-]+", "_", unquote(query)).strip("_")
            if query and len(query.encode()) <= _LONGEST_QUERY:
                path = PurePosixPath(f"{name}_{query}")
                name = path.stem if path.suffix.lower() in PHOTO_SUFFIXES else path.name
            suffix = ""
        stem = name.removesuffix(suffix)
        room = _LONGEST_NAME - 20 - len(suffix.encode())
        stem = stem.encode()[:room].decode("utf-8", "ignore")
        name = stem + suffix
        if name in self._reserved or self.holder(name, by_content):
            name = f"{stem}-{hashlib.sha256(url.encode()).hexdigest()[:16]}{suffix}"
        item = Item(line, url, name, sha256, by_content)
        self.add(item)
        return item
