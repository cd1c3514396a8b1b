"""The lines of a list of files to download: text or a table, in whatever encoding."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from dinogen.prepare.photos.read import IMAGE_SUFFIXES, PrepareError

# What somebody gives a name with one of these expects to be an image.
PHOTO_SUFFIXES = IMAGE_SUFFIXES | {".gif", ".heic", ".heif", ".avif", ".jxl", ".jp2"}
# Other files that people have in such lists. Any other suffix of an address says nothing about
# what lies behind it: `thumb.php`, `F00BAR.jpg:large`, `photo.v2`.
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
        line: on which it begins, counted from 1.
        num_lines: over which it goes: more than one where a cell holds line breaks.
        text: its first line.
        cells: URL, checksum and filename, "" where there is none; None for an empty line, a
            comment or the header, and what is wrong with a line that cannot be read.
    """

    line: int
    num_lines: int
    text: str
    cells: tuple[str, str, str] | BadLine | None


def read_rows(listing: Path) -> Iterator[Row]:
    """The entries of a list, in order; see :func:`dinogen.prepare.download.links.read_list`.

    Bytes that are not UTF-8 are lone surrogates in the cells, to be refused where they matter.

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
            raise PrepareError(f"{listing}: is {what}: save the list as text or CSV, a URL a line")
    lines = _decode(data).replace("\r\n", "\n").replace("\r", "\n").split("\n")
    if not lines[-1]:
        lines.pop()
    suffix = listing.suffix.lower()
    told = [line for line in lines if not _is_blank(line.strip(_DELIMITERS))][:2]
    said = _separator(told[0]) if told else None
    first = (told[1:] if said else told)[:1]
    header, delimiter = _header(first[0] if first else "", said)
    if header is not None:
        return _table(lines, delimiter, header, has_header=True)
    if suffix not in (".csv", ".tsv"):
        return _text(lines)
    delimiter = said or _guess_delimiter(first[0] if first else "", suffix)
    return _table(lines, delimiter, list(_COLUMNS), has_header=False)


def _decode(data: bytes) -> str:
    """Text; bytes that are not UTF-8 become lone surrogates, to be told where they matter."""
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        return data.decode("utf-16", "replace")
    # What PowerShell and old tools write without a mark: every other byte of ASCII is zero.
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
            found = BadLine("bad_line", "a quote is not closed, or stands inside a cell")
        elif not cells or text.startswith("#") or _separator(text):
            found = None
        elif has_header:
            found, has_header = None, False
        elif len(cells) > len(columns) > 1:
            found = BadLine(
                "bad_line",
                f"{len(cells)} cells, but there are {len(columns)} columns: put double quotes "
                f"around a cell that holds '{delimiter}'",
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


def _header(line: str, said: str | None) -> tuple[list[str] | None, str]:
    """What each column is, if a line names them, "" for those of no use; and the delimiter."""
    for delimiter in said or _DELIMITERS:
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
    """Of a table without header: what is followed by a checksum, or by an empty cell."""
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

    A quote that nobody closes would swallow all the lines behind it: it costs its own line alone.
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
                raise csv.Error("an open quote runs over a line that has an address")
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
                # Quotes inside a caption, which do no harm to the cells that are read.
                if lines[start].count('"') % 2 == 0:
                    lenient = next(csv.reader([lines[start]], delimiter=delimiter))
                    plain = lines[start].split(delimiter)
                    if all(lenient[p : p + 1] == plain[p : p + 1] for p in places):
                        cells = lenient
            if span > 1 and cells is not None:
                url = "".join(cells[places[0] : places[0] + 1])
                more = any("://" in line for line in lines[start + 1 : start + span])
                # Nothing to fetch here, so that it must not hide what its other lines say.
                if "\n" in url or (more and not _ADDRESS.match(url)):
                    cells, span = None, 1
            yield start + 1, span, None if cells is None else [cell.strip() for cell in cells]
            start += span
    finally:
        csv.field_size_limit(before)


def _split(line: str) -> tuple[str, str, str]:
    """URL, checksum and filename of a line of text.

    Raises:
        BadLine: a blank may be part of the URL or stand before the filename.
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
    if "/" in name:  # which no name of a file can hold
        return line, "", ""
    raise BadLine(
        "bad_url",
        "holds a blank: write %20 for it if it is part of the address; if what follows is the name "
        "of the file, put a tab before it",
    )
