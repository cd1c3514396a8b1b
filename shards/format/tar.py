"""Walks over the headers of a plain tar and finds where each member's bytes are.

Members and their names are those that Python's tarfile finds, which WebDataset reads with. Where
tarfile stops silently at damage, this walk reports it and can continue after it.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np

from shards.errors import show_name

BLOCK = 512
# One read takes a header and enough of what follows for a .npy header or a small JSON.
_HEAD = 4096
_MAX_DIGITS = 20
_CHUNK = 1 << 20
# A name or a set of PAX records; more than that is a damaged size.
_MAX_EXTENDED = 1 << 24
# A sparse file may claim any size that fits into the index; how much of it is read into memory is
# decided when it is read.
_MAX_SPARSE = 1 << 62

_REGULAR = (b"0", b"\0", b"7", b"S")
_NO_DATA = {
    b"1": "hard link",
    b"2": "symbolic link",
    b"3": "character device",
    b"4": "block device",
    b"5": "folder",
    b"6": "FIFO",
}
_OTHER = {
    b"V": "volume label",
    b"M": "continued file",
    b"D": "folder listing",
}
# The last digit of a header's checksum and what ends it.
_CHECKSUM = re.compile(rb"[0-7]\0 ")
_CHECKSUM_AT = 153
_PAX_RECORD = re.compile(rb"\d+ [A-Za-z][\w.]*=")
# (first byte in the tar, bytes, position in the file) of each stored part of a sparse file.
Extents = tuple[tuple[int, int, int], ...]


class TarError(Exception):
    """The tar is cut off or damaged at `offset`.

    Attributes:
        offset: first byte that cannot be read as a tar.
        end: where the next sound header is; None if there is none.
        what: what is wrong.
        loses: whether a file is lost here, which may have been a whole sample.
    """

    def __init__(self, offset: int, what: str, end: int | None = None, loses: bool = True) -> None:
        self.offset, self.what, self.end, self.loses = offset, what, end, loses
        super().__init__(f"{what} at byte {offset}")


@dataclass(frozen=True)
class Member:
    """One regular file in a tar.

    Attributes:
        name: with its folders, as it is written there.
        offset: first byte of its content.
        size: bytes of its content.
        head: the first bytes of the content (all of them if few); empty for a sparse file.
        extents: the parts of a sparse file, whose content is not contiguous.
    """

    name: str
    offset: int
    size: int
    head: bytes
    extents: Extents | None = None


@dataclass
class _Extended:
    """What the headers before a member say about it: the first of each kind counts."""

    name: str | None = None
    size: int | None = None
    sparse: dict[str, str] = field(default_factory=dict)
    sparse_map: list[int] = field(default_factory=list)


def walk(
    descriptor: int,
    on_damage: Callable[[TarError], None] | None = None,
    skipped: Counter[str] | None = None,
) -> Iterator[Member]:
    """Regular files of a tar in their order, from any program that writes tars.

    Args:
        descriptor: of the tar.
        on_damage: called with each damage, after which the walk continues at the next sound
            header; if None, the first damage is raised.
        skipped: counts the entries that are not regular files, by kind; folders and headers
            about other entries are not counted.

    Raises:
        TarError: where a header is damaged or the file ends too early.
    """
    reader = _Walk(descriptor, skipped)
    while True:
        try:
            member = reader.next()
        except TarError as error:
            error.end = reader.resume(error)
            if on_damage is None:
                raise
            on_damage(error)
            if error.end is None:
                return
            continue
        if member is None:
            return
        yield member


class _Walk:
    def __init__(self, descriptor: int, skipped: Counter[str] | None) -> None:
        self._descriptor = descriptor
        self._num_bytes = os.fstat(descriptor).st_size
        self._skipped: Counter[str] = Counter() if skipped is None else skipped
        self._position = 0
        # Where the content of the last member begins: a header inside it is a sign of lost bytes.
        self._last_content = 0
        # Where the headers of the current entry begin.
        self._entry = 0
        self._global_name: str | None = None
        self._untrusted = False

    def next(self) -> Member | None:
        """The next regular file; None at the end of the archive."""
        extended = _Extended()
        self._entry = self._position
        while True:
            position = self._position
            block = os.pread(self._descriptor, BLOCK + _HEAD, position)
            header = block[:BLOCK]
            if len(header) < BLOCK:
                what = "the end-of-archive blocks are missing: the tar is cut off"
                raise TarError(position, what, loses=any(header))
            if header.count(0) == BLOCK:
                self._check_end(position)
                return None
            name, size, kind = _parse(header, position)
            start = position + BLOCK
            if kind in _NO_DATA or (
                # This is how tars of 1979 mark a folder.
                kind == b"\0" and (extended.name or name).endswith("/")
            ):
                self._position = self._behind_empty(start, size)
                if kind in _NO_DATA and kind != b"5":
                    self._skipped[_NO_DATA[kind]] += 1
                extended, self._entry = _Extended(), self._position
                continue
            if kind in _REGULAR and extended.size is not None:
                size = extended.size
            if start + size > self._num_bytes:
                raise TarError(position, f"{show_name(extended.name or name)} is cut off")
            self._position = start + -(-size // BLOCK) * BLOCK
            if kind in (b"L", b"K", b"x", b"X", b"g"):
                self._read_extended(kind, position, start, size, extended)
            elif kind in _REGULAR:
                member = self._member(header, block, kind, name, start, size, extended)
                self._last_content = start
                if self._untrusted:
                    self._untrusted = False
                    what = f"the name of the file {show_name(member.name)} may be lost"
                    # The damage before it counts for both.
                    raise TarError(position, what, self._position, loses=False)
                return member
            else:
                self._skipped[_OTHER.get(kind, f"entry of type {kind.decode('latin-1')!r}")] += 1
                extended, self._entry = _Extended(), self._position

    def resume(self, error: TarError) -> int | None:
        """Go to the next sound header after a damaged place; None if there is none."""
        if error.end is None:
            phase = error.offset % BLOCK
            start = max(self._last_content, 1)
            found = find_header(self._descriptor, start, self._num_bytes, phase)
            if found is None or found >= self._entry:
                start = error.offset + 1
                found = find_header(self._descriptor, start, self._num_bytes, phase)
            if found is not None and found > error.offset:
                length = min(found - error.offset, _HEAD)
                lost = os.pread(self._descriptor, length, error.offset)
                self._untrusted = _is_about_next(lost)
            error.end = found
        if error.end is not None:
            self._position = error.end
            self._last_content = error.end + BLOCK
        return error.end

    def _check_end(self, position: int) -> None:
        """Raise TarError if more of a tar follows the zeroed block at `position`."""
        found = find_header(self._descriptor, position + BLOCK, self._num_bytes, position % BLOCK)
        if found is None:
            return
        first, second = (
            os.pread(self._descriptor, BLOCK, at) for at in (position, position + BLOCK)
        )
        only_zeros = _is_zero(self._descriptor, position, found)
        if only_zeros and first.count(0) == second.count(0) == BLOCK:
            what = "another tar follows the end-of-archive blocks (were tars joined by cat?)"
        else:
            what = "there is a zeroed block instead of a header, and more files follow"
        self._untrusted = _is_about_next(
            os.pread(self._descriptor, min(found - position, _HEAD), position)
        )
        raise TarError(position, what, found, loses=not only_zeros)

    def _behind_empty(self, start: int, size: int) -> int:
        """Where the header after a link, a device or a folder is: some store content of links."""
        if size == 0:
            return start
        behind = start + -(-size // BLOCK) * BLOCK
        for position in (start, behind):
            header = os.pread(self._descriptor, BLOCK, position)
            if len(header) == BLOCK and (header.count(0) == BLOCK or _is_header(header)):
                return position
        return start

    def _read_extended(
        self, kind: bytes, position: int, start: int, size: int, extended: _Extended
    ) -> None:
        if size > _MAX_EXTENDED:
            raise TarError(position, f"the header claims {size} bytes of names")
        text = os.pread(self._descriptor, size, start)
        if kind == b"L":
            extended.name = _string(text) if extended.name is None else extended.name
        elif kind != b"K":
            records = _pax_records(text, position)
            if kind == b"g":
                self._global_name = next(
                    (value.rstrip("/") for keyword, value in records if keyword == "path"),
                    self._global_name,
                )
            else:
                _apply(records, extended, position)

    def _member(
        self,
        header: bytes,
        block: bytes,
        kind: bytes,
        name: str,
        start: int,
        size: int,
        extended: _Extended,
    ) -> Member:
        name = self._global_name or name
        if extended.name is not None:
            name = extended.name
        if kind != b"S" and not extended.sparse:
            return Member(name, start, size, block[BLOCK : BLOCK + min(size, _HEAD)])
        try:
            parts, start, whole = self._sparse(header, kind, start, extended)
        except (ValueError, IndexError) as error:
            raise TarError(
                start - BLOCK, f"the map of the sparse file {show_name(name)} is damaged"
            ) from error
        if kind == b"S":
            # Blocks of the map are between the header and the content, and are not counted.
            self._position = start + -(-size // BLOCK) * BLOCK
        extents, at = [], start
        for position, length in parts:
            if length > 0:
                extents.append((at, length, position))
                at += length
        name = extended.sparse.get("name", name)
        damaged = f"the map of the sparse file {show_name(name)} is damaged"
        ordered = all(a[2] + a[1] <= b[2] for a, b in pairwise(extents))
        if at > self._num_bytes or not ordered or not 0 <= whole <= _MAX_SPARSE:
            raise TarError(start - BLOCK, damaged)
        if extents and extents[-1][2] + extents[-1][1] > whole:
            raise TarError(start - BLOCK, damaged)
        return Member(name, start, whole, b"", tuple(extents))

    def _sparse(
        self, header: bytes, kind: bytes, start: int, extended: _Extended
    ) -> tuple[list[tuple[int, int]], int, int]:
        """(position, bytes) of each part, offset of the first one, size of the whole file."""
        facts = extended.sparse
        if kind == b"S":
            parts = _old_map(header[386:482])
            more, whole = bool(header[482]), _number(header[483:495])
            while more:
                block = os.pread(self._descriptor, BLOCK, start)
                parts += [part for part in _old_map(block[:504]) if all(part)]
                more, start = bool(block[504]), start + BLOCK
            return parts, start, whole
        whole = int(facts.get("realsize", facts.get("size", "-1")))
        if "map" in facts:
            numbers = [int(number) for number in facts["map"].split(",")]
        elif facts.get("major") == "1":
            numbers = []
            lines = os.pread(self._descriptor, _HEAD, start).split(b"\n")
            count = int(lines[0])
            while len(lines) < 2 * count + 2 and len(lines) < _MAX_EXTENDED:
                length = len(b"\n".join(lines)) + _CHUNK
                lines = os.pread(self._descriptor, length, start).split(b"\n")
                if start + length > self._num_bytes:
                    break
            numbers = [int(line) for line in lines[1 : 2 * count + 1]]
            used = sum(len(line) + 1 for line in lines[: 2 * count + 1])
            start += -(-used // BLOCK) * BLOCK
        else:
            numbers = extended.sparse_map
        return list(zip(numbers[::2], numbers[1::2], strict=True)), start, whole


def _parse(header: bytes, position: int) -> tuple[str, int, bytes]:
    """Name, size and type of an entry."""
    try:
        stored, size = _number(header[148:156]), _number(header[124:136])
    except ValueError as error:
        raise TarError(position, f"the header is damaged{_perhaps(header)}") from error
    if size < 0:
        raise TarError(position, "the header is damaged (its size is negative)")
    if stored not in _checksums(header):
        what = f"the header is damaged (its checksum does not fit){_perhaps(header)}"
        raise TarError(position, what)
    name, kind = _string(header[:100]), header[156:157]
    if header[345] and kind not in (b"L", b"K", b"S"):
        name = f"{_string(header[345:500])}/{name}"
    return name, size, kind


def _number(data: bytes) -> int:
    if data[0] in (0x80, 0xFF):
        number = int.from_bytes(data[1:], "big")
        return number if data[0] == 0x80 else number - 256 ** (len(data) - 1)
    digits = data.partition(b"\0")[0].strip()
    if digits and not digits.lstrip(b"+-").isdigit():
        raise ValueError(f"{digits!r} is not an octal number")
    return int(digits or b"0", 8)


def _checksums(header: bytes) -> tuple[int, int]:
    """Sum of the bytes, and of signed bytes as some old programs compute it."""
    rest = header[:148] + header[156:]
    total = sum(rest) + 8 * 32
    return total, total - 256 * sum(byte > 127 for byte in rest)


def _is_header(header: bytes) -> bool:
    try:
        return bool(header[0] or header[345]) and bool(_parse(header, 0))
    except TarError:
        return False


def _perhaps(header: bytes) -> str:
    """The name in a damaged header, if it looks like one."""
    name = _string(header[:100])
    return f", perhaps that of {name}" if len(name) > 1 and name.isprintable() else ""


def _is_about_next(lost: bytes) -> bool:
    """Whether lost blocks held the name of the file after them."""
    if len(lost) < 2 * BLOCK:
        return False
    content = lost[BLOCK : 2 * BLOCK]
    return (
        lost[156] in b"xXL"
        or b"PaxHeader" in lost[:100]
        or b"@LongLink" in lost[:100]
        or _PAX_RECORD.match(content) is not None
    )


def find_header(descriptor: int, start: int, num_bytes: int, phase: int) -> int | None:
    """First byte of the next sound header of a tar at or after `start`; None if there is none.

    Args:
        descriptor: of the tar.
        start: where to begin.
        num_bytes: size of the tar.
        phase: headers whose checksum is written in an unusual way are searched only at this offset
            modulo 512; all others anywhere, because bytes may have been lost.
    """
    position = start
    while position < num_bytes:
        chunk = os.pread(descriptor, _CHUNK + BLOCK - 1, position)
        if len(chunk) < BLOCK:
            return None
        found = _aligned(chunk, (phase - position) % BLOCK)
        for mark in _CHECKSUM.finditer(chunk):
            at = mark.start() - _CHECKSUM_AT
            if found is not None and at >= found:
                break
            if at >= 0 and _is_header(chunk[at : at + BLOCK].ljust(BLOCK, b"\1")):
                found = at
                break
        if found is not None:
            return position + found
        position += _CHUNK
    return None


def _aligned(chunk: bytes, first: int) -> int | None:
    """Offset of the first header among every 512th byte of `chunk` from `first` on."""
    count = (len(chunk) - first) // BLOCK
    if count < 1:
        return None
    blocks = np.frombuffer(chunk, np.uint8, count * BLOCK, first).reshape(count, BLOCK)
    # Most blocks are no headers: where the checksum has to be, they have no octal digits.
    digits = blocks[:, 148:153]
    maybe = (((digits >= 48) & (digits < 56)) | (digits == 32)).all(1) & (blocks[:, 0] != 0)
    for number in np.flatnonzero(maybe).tolist():
        if _is_header(blocks[number].tobytes()):
            return first + int(number) * BLOCK
    return None


def _is_zero(descriptor: int, start: int, end: int) -> bool:
    while start < end:
        chunk = os.pread(descriptor, min(_CHUNK, end - start), start)
        if not chunk or chunk.count(0) < len(chunk):
            return False
        start += len(chunk)
    return True


def _old_map(data: bytes) -> list[tuple[int, int]]:
    parts = []
    for at in range(0, len(data) - 23, 24):
        if data[at] == 0:
            break
        parts.append((_number(data[at : at + 12]), _number(data[at + 12 : at + 24])))
    return parts


def _string(data: bytes) -> str:
    return data.partition(b"\0")[0].decode("utf-8", "surrogateescape")


def _pax_records(data: bytes, position: int) -> list[tuple[str, str]]:
    records = []
    data = data.rstrip(b"\0")
    while data:
        digits = data.partition(b" ")[0]
        # int() would take signs and thousands of digits.
        length = int(digits) if digits.isdigit() and len(digits) < _MAX_DIGITS else 0
        if not len(digits) < length <= len(data):
            raise TarError(position, "the PAX header is damaged")
        keyword, _, value = data[len(digits) + 1 : length].partition(b"=")
        text = value.removesuffix(b"\n").decode("utf-8", "surrogateescape")
        records.append((keyword.decode("utf-8", "surrogateescape"), text))
        data = data[length:]
    return records


def _apply(records: list[tuple[str, str]], extended: _Extended, position: int) -> None:
    """Apply the PAX records of one header to the next file."""
    name = size = None
    try:
        for keyword, value in records:
            if keyword == "path":
                name = value.rstrip("/")
            elif keyword == "size":
                size = int(value)
            elif keyword in ("GNU.sparse.offset", "GNU.sparse.numbytes"):
                extended.sparse_map.append(int(value))
            if keyword.startswith("GNU.sparse."):
                extended.sparse[keyword.removeprefix("GNU.sparse.")] = value
    except ValueError as error:
        raise TarError(position, "the PAX header is damaged") from error
    if size is not None and size < 0:
        raise TarError(position, "the PAX header is damaged (its size is negative)")
    extended.name = name if extended.name is None else extended.name
    extended.size = size if extended.size is None else extended.size
