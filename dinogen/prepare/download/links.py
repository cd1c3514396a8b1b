"""Reads a list of files to download: text or a table, addresses, checksums, safe names."""

from __future__ import annotations

import csv
import hashlib
import re
from collections.abc import Iterator, Set
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from urllib.parse import unquote

import httpx

from dinogen.prepare.photos.read import IMAGE_SUFFIXES, PrepareError

_SUFFIX = re.compile(r"\.(?=[0-9]*[A-Za-z])[0-9A-Za-z]{1,12}")
_HOST = re.compile(r"(?=.{1,253}$)([A-Za-z0-9_-]{1,63}\.)*[A-Za-z0-9_-]{1,63}\.?|[0-9a-fA-F:.]+")
_CREDENTIALS = re.compile(r"(?<=//)[^/?#\s]*@")
_LONGEST_NAME = 200  # bytes; file systems allow 255, and a partial file's name is longer
_LONGEST_QUERY = 60  # bytes; longer ones are signatures, which are no readable names
_LONGEST_SHOWN = 300
_LONGEST_URL = 4000
_LONGEST_QUOTED = 60


@dataclass(frozen=True)
class Item:
    """One file to fetch.

    Attributes:
        line: of the list, counted from 1.
        url: its address, as the list has it.
        filename: its name on disk; if ``by_content``, without the suffix.
        sha256: in lower-case hex, if known.
        by_content: the suffix follows from the content, which has to be an image.
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
        url: its address, or the whole line if no address was found; without credentials.
        filename: the name it would have had, if known.
        reason: ``bad_url``, ``bad_checksum``, ``bad_filename`` or ``bad_line`` for faults of the
            list; ``http_404`` and the like, ``connection``, ``checksum``, ``protocol``,
            ``retry_after``, ``empty``, ``not_an_image``, ``web_page`` or ``unwritable`` for faults
            of the download.
        detail: for a person.
    """

    line: int
    url: str
    filename: str
    reason: str
    detail: str


@dataclass(frozen=True)
class Listing:
    """The content of a list.

    Attributes:
        items: different files, in the order of the list.
        bad: lines that cannot be used.
        num_lines: all lines of the file.
        num_blank: of these, empty lines, comments and the header.
        num_repeated: of these, lines that repeat a file of an earlier line.
        num_continued: of these, lines that continue the cell of an earlier line.
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
    """Read ``URL [sha256] [filename]`` lines; an unusable line does not affect the others.

    A table is a file that ends in ``.csv`` or ``.tsv``, or whose first line names a column of
    addresses (``url``, ``image_url``, ...; in any case). Its cells are separated by commas,
    semicolons, tabs or bars. Without such a header its columns are url, sha256 and filename. Other
    columns, such as captions, are ignored. In any other file, URL, checksum and filename are
    separated by a tab or spaces; the filename may contain spaces. A space inside a URL is part of
    it if that is certain, and makes the line unusable if it may also start the filename. Empty
    lines and lines that begin with ``#`` are ignored.

    Without a filename a file is named after the last part of its address; if that name is taken, a
    hash of the address is added. A repeated line counts once.

    Args:
        listing: UTF-8 or UTF-16 text. Other bytes are allowed where they do not matter.
        reserved: names that no file may have.

    Raises:
        PrepareError: the list is missing, is no text, or holds nothing but comments.
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
    """The address to request: spaces, other alphabets and lone percent signs are encoded.

    Raises:
        httpx.InvalidURL: it is not a URL.
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
                    f"a caption or the like, add a first line that names the columns of the table",
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
            what = f"{_quoted(filename)} is already used by line {other.line}: give another name"
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
            # The line with the checksum counts.
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
        raise BadLine("bad_url", "the address contains control characters")
    scheme, found, rest = url.partition("://")
    if not found or scheme.lower() not in ("http", "https"):
        more = ": write https: before it" if url.startswith("//") else ""
        raise BadLine("bad_url", f"is not an http or https address{more}")
    if "#" in url:
        raise BadLine(
            "bad_url",
            "contains '#': write %23 if it is part of the name, or leave out what follows",
        )
    if "@" in re.split(r"[/?]", rest, maxsplit=1)[0]:
        raise BadLine(
            "bad_url", "contains credentials, which would be written to logs: not supported"
        )
    try:
        parts = address(url)
    except (httpx.InvalidURL, ValueError) as error:
        raise BadLine("bad_url", f"is not a valid URL: {error}") from None
    if not _HOST.fullmatch(parts.raw_host.decode("ascii")):
        raise BadLine("bad_url", f"{_quoted(parts.host)} is not a host name")
    if parts.port is not None and not 0 < parts.port < 65536:
        raise BadLine("bad_url", f"there is no port {parts.port}")
    return parts


def _check_name(name: str, reserved: Set[str]) -> None:
    plain = PurePosixPath(name).name == name and "\\" not in name and name.isprintable()
    if not plain or name.startswith(".") or len(name.encode()) > _LONGEST_NAME:
        raise BadLine(
            "bad_filename",
            f"{_quoted(name)} is not a plain file name: leave out folders, control characters and "
            f"a leading dot, and use at most {_LONGEST_NAME} bytes",
        )
    if name in reserved:
        raise BadLine(
            "bad_filename", f"{_quoted(name)} is written by dinogen itself: give another name"
        )


class _Names:
    """Names that are taken, with their items. A name by content takes all its suffixes."""

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
        """A file named after the last part of its address, and its query if that helps."""
        name = re.sub(r"[^\w.()+-]+", "_", last).lstrip(".") or "file"
        suffix = PurePosixPath(name).suffix
        by_content = suffix.lower() not in PHOTO_SUFFIXES | FILE_SUFFIXES
        if by_content:
            # Without a suffix the query often distinguishes one photo from another.
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


# A name with one of these suffixes has to be that of an image.
PHOTO_SUFFIXES = IMAGE_SUFFIXES | {".gif", ".heic", ".heif", ".avif", ".jxl", ".jp2"}
# Other files that occur in such lists. Any other suffix of an address says nothing about its
# content: `thumb.php`, `F00BAR.jpg:large`, `photo.v2`.
FILE_SUFFIXES = frozenset(
    {".zip", ".tar", ".gz", ".tgz", ".bz2", ".xz", ".zst", ".7z", ".parquet", ".arrow", ".npz"}
    | {".npy", ".safetensors", ".pt", ".pth", ".onnx", ".json", ".jsonl", ".csv", ".tsv", ".txt"}
    | {".md", ".pdf", ".mp4", ".mov", ".webm"}
    | {".dng", ".nef", ".cr2", ".cr3", ".arw", ".orf", ".rw2", ".raf", ".pef", ".srw"}
)
SHA256 = re.compile(r"[0-9a-fA-F]{64}")
_CHECKSUM = re.compile(r"[ \t]+([0-9a-fA-F]{64})(?:[ \t]+|$)")
_ADDRESS = re.compile(r"\s*https?://", re.I)

_COLUMNS = ("url", "sha256", "filename")
_DELIMITERS = ",;\t|"
_CALLED = {
    "url": ("url", "urls", "image_url", "img_url", "photo_url", "image_link", "link", "uri", "src"),
    "sha256": ("sha256", "sha_256"),
    "filename": ("filename", "file_name"),
}
_NO_TEXT = {
    b"PAR1": "a Parquet file",
    b"PK\x03\x04": "a zip archive or Excel file",
    b"\x1f\x8b": "compressed by gzip",
    b"\xd0\xcf\x11\xe0": "an old Excel file",
    b"\xff\xd8\xff": "a JPEG image",
    b"\x89PNG": "a PNG image",
    b"%PDF": "a PDF file",
}


class BadLine(Exception):
    """A line that cannot be used.

    Attributes:
        reason: short code; see :class:`dinogen.prepare.download.links.Failure`.
    """

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


@dataclass(frozen=True)
class Row:
    """One entry of a list.

    Attributes:
        line: its first line, counted from 1.
        num_lines: number of its lines; more than one if a cell contains line breaks.
        text: its first line.
        cells: URL, checksum and filename, "" for a missing one; None for an empty line, a comment
            or the header; the error of a line that cannot be read.
    """

    line: int
    num_lines: int
    text: str
    cells: tuple[str, str, str] | BadLine | None


def read_rows(listing: Path) -> Iterator[Row]:
    """The entries of a list, in order; see :func:`dinogen.prepare.download.links.read_list`.

    Bytes that are not UTF-8 become lone surrogates in the cells, and are refused if they matter.

    Raises:
        PrepareError: the list is missing or is no text.
    """
    try:
        data = listing.read_bytes()
    except FileNotFoundError:
        raise PrepareError(f"{listing}: no such list") from None
    except OSError as error:
        raise PrepareError(f"{listing}: cannot be read: {error.strerror}") from None
    for magic, what in _NO_TEXT.items():
        if data.startswith(magic):
            raise PrepareError(
                f"{listing}: is {what}: save the list as text or CSV, with one URL per line"
            )
    lines = _decode(data).replace("\r\n", "\n").replace("\r", "\n").split("\n")
    if not lines[-1]:
        lines.pop()
    suffix = listing.suffix.lower()
    top = [line for line in lines if not _is_blank(line.strip(_DELIMITERS))][:2]
    declared = _separator(top[0]) if top else None
    first = (top[1:] if declared else top)[:1]
    header, delimiter = _header(first[0] if first else "", declared)
    if header is not None:
        return _table(lines, delimiter, header, has_header=True)
    if suffix not in (".csv", ".tsv"):
        return _text(lines)
    delimiter = declared or _guess_delimiter(first[0] if first else "", suffix)
    return _table(lines, delimiter, list(_COLUMNS), has_header=False)


def _decode(data: bytes) -> str:
    """Text; bytes that are not UTF-8 become lone surrogates, which are reported if they matter."""
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        return data.decode("utf-16", "replace")
    # UTF-16 of PowerShell and old tools, without a mark: every other byte of ASCII is zero.
    if len(data) >= 4 and data[0] and not data[1] and data[2] and not data[3]:
        return data.decode("utf-16-le", "replace")
    return data.decode("utf-8", "surrogateescape").removeprefix("\ufeff")


def _text(lines: list[str]) -> Iterator[Row]:
    for number, line in enumerate(lines, 1):
        try:
            yield Row(number, 1, line, None if _is_blank(line) else _split(line))
        except BadLine as error:
            yield Row(number, 1, line, error)


def _table(lines: list[str], delimiter: str, columns: list[str], has_header: bool) -> Iterator[Row]:
    places = [columns.index(name) if name in columns else len(columns) for name in _COLUMNS]
    for number, num_lines, cells in _records(lines, delimiter, places):
        text = lines[number - 1]
        found: tuple[str, str, str] | BadLine | None
        while cells and not cells[-1]:
            cells.pop()
        if cells is None:
            found = BadLine("bad_line", "a quote is not closed, or is inside a cell")
        elif not cells or text.startswith("#") or _separator(text):
            found = None
        elif has_header:
            found, has_header = None, False
        elif len(cells) > len(columns) > 1:
            found = BadLine(
                "bad_line",
                f"{len(cells)} cells, but there are {len(columns)} columns: put double quotes "
                f"around a cell that contains '{delimiter}'",
            )
        else:
            if len(columns) == 1:
                cells = [delimiter.join(cells)]
            url, sha256, filename = (cells[p] if p < len(cells) else "" for p in places)
            found = url, sha256, filename
        yield Row(number, num_lines, text, found)


def _is_blank(line: str) -> bool:
    return not line.strip() or line.lstrip().startswith("#")


def _separator(line: str) -> str | None:
    """Excel's own first line, ``sep=;``."""
    found = re.fullmatch(rf'"?sep=([{re.escape(_DELIMITERS)}])"?', line.strip(" \r\n"), re.I)
    return found[1] if found else None


def _header(line: str, declared: str | None) -> tuple[list[str] | None, str]:
    """What each column is, if a line names them, "" for ignored ones; and the delimiter."""
    for delimiter in declared or _DELIMITERS:
        try:
            cells = next(csv.reader([line], delimiter=delimiter), [])
        except csv.Error:  # longer than the limit: no header
            continue
        called = [re.sub(r"[\s-]+", "_", cell.strip().casefold()) for cell in cells]
        while called and not called[-1]:
            called.pop()
        columns = [""] * len(called)
        for column, names in _CALLED.items():
            if found := next((name for name in names if name in called), None):
                columns[called.index(found)] = column
        if "url" in columns:
            return columns, delimiter
    return None, ","


def _guess_delimiter(line: str, suffix: str) -> str:
    """The delimiter of a table without header: followed by a checksum or an empty cell."""
    usual = "\t" if suffix == ".tsv" else ","
    for delimiter in usual + _DELIMITERS:
        _, found, rest = line.partition(delimiter)
        second = rest.partition(delimiter)[0].strip(' "')
        if found and (not second or SHA256.fullmatch(second)):
            return delimiter
    return usual


def _records(
    lines: list[str], delimiter: str, places: list[int]
) -> Iterator[tuple[int, int, list[str] | None]]:
    """(line, how many lines, cells or None if quotes are wrong) of each record of a table.

    A quote that is not closed would swallow all following lines; here it affects only its own.
    """

    def swallowed(line: str) -> bool:
        if '"' in line:
            return False
        cells = line.split(delimiter)
        found = cells[places[0]] if places[0] < len(cells) else ""
        return _ADDRESS.match(found) is not None

    def behind(start: int) -> Iterator[str]:
        yield lines[start] + "\n"
        for number in range(start + 1, len(lines)):
            if swallowed(lines[number]):
                raise csv.Error("an open quote spans a line that has an address")
            yield lines[number] + "\n"

    before = csv.field_size_limit(2**31 - 1)
    try:
        start = 0
        while start < len(lines):
            reader = csv.reader(behind(start), delimiter=delimiter, strict=True)
            span = 1
            cells: list[str] | None = None
            try:
                cells = next(reader)
                span = max(1, reader.line_num)
            except csv.Error:
                # Quotes inside a caption, which do not affect the cells that are read.
                if lines[start].count('"') % 2 == 0:
                    lenient = next(csv.reader([lines[start]], delimiter=delimiter))
                    plain = lines[start].split(delimiter)
                    if all(lenient[p : p + 1] == plain[p : p + 1] for p in places):
                        cells = lenient
            if span > 1 and cells is not None:
                url = "".join(cells[places[0] : places[0] + 1])
                more = any("://" in line for line in lines[start + 1 : start + span])
                # Nothing to fetch here, so it must not hide its other lines.
                if "\n" in url or (more and not _ADDRESS.match(url)):
                    cells, span = None, 1
            yield start + 1, span, None if cells is None else [cell.strip() for cell in cells]
            start += span
    finally:
        csv.field_size_limit(before)


def _split(line: str) -> tuple[str, str, str]:
    """URL, checksum and filename of a line of text.

    Raises:
        BadLine: a space may be part of the URL or start the filename.
    """
    line = line.strip()
    if found := _CHECKSUM.search(line):
        return line[: found.start()].strip(), found[1], line[found.end() :].strip()
    if "\t" in line:
        url, _, name = line.partition("\t")
        return url.strip(), "", name.strip()
    first, blank, name = line.partition(" ")
    if not blank or not _ADDRESS.match(first):
        return line, "", ""
    if "://" in name:
        raise BadLine("bad_line", "two addresses: write one per line")
    last = first.partition("://")[2]
    suffix = PurePosixPath(last).suffix.lower()
    if "?" not in first and (suffix in PHOTO_SUFFIXES | FILE_SUFFIXES or last.endswith("/")):
        return first, "", name.strip()
    if "/" in name:  # no file name can contain it
        return line, "", ""
    raise BadLine(
        "bad_url",
        "contains a space: write %20 if it is part of the address; if a file name follows, put a "
        "tab before it",
    )
