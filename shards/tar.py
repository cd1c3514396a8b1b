"""Walk over the headers of a plain tar: where each member's bytes lie."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass

BLOCK = 512
# One read takes a header and enough of what follows for a .npy header or a small JSON.
_HEAD = 4096
_MAX_DIGITS = 20


class TarError(Exception):
    """The tar is cut off or damaged at `offset`; what lies before it is sound."""

    def __init__(self, offset: int, what: str) -> None:
        self.offset, self.what = offset, what
        super().__init__(f"{what} at byte {offset}")


@dataclass(frozen=True)
class Member:
    """One regular file in a tar: `head` holds its first bytes (all of them if few)."""

    name: str
    offset: int
    size: int
    head: bytes


def walk(descriptor: int) -> Iterator[Member]:
    """Regular files of a tar in their order; USTAR, GNU long names and PAX paths.

    Raises:
        TarError: where a header is damaged or the file ends too early.
    """
    num_bytes = os.fstat(descriptor).st_size
    position = 0
    long_name: str | None = None
    while True:
        block = os.pread(descriptor, BLOCK + _HEAD, position)
        header = block[:BLOCK]
        if len(header) < BLOCK:
            raise TarError(position, "the end-of-archive blocks are missing: the tar is cut off")
        if header.count(0) == BLOCK:
            return
        name, size, kind = _parse(header, position)
        start = position + BLOCK
        if start + size > num_bytes:
            raise TarError(position, f"{name} is cut off")
        head = block[BLOCK : BLOCK + min(size, _HEAD)]
        if kind in (b"L", b"x"):
            text = os.pread(descriptor, size, start)
            long_name = _pax_path(text, position) if kind == b"x" else _string(text)
        elif kind in (b"0", b"\0"):
            yield Member(long_name or name, start, size, head)
            long_name = None
        elif kind in (b"5", b"g", b"K"):
            long_name = None if kind == b"5" else long_name
        else:
            raise TarError(position, f"{name} is no plain file (type {kind!r})")
        position = start + -(-size // BLOCK) * BLOCK


def _parse(header: bytes, position: int) -> tuple[str, int, bytes]:
    try:
        stored = int(header[148:156].rstrip(b"\0 ") or b"0", 8)
        if header[124] & 0x80:
            size = int.from_bytes(header[125:136], "big")
        else:
            size = int(header[124:136].rstrip(b"\0 ") or b"0", 8)
    except ValueError as error:
        raise TarError(position, "the header is damaged") from error
    if size < 0:
        raise TarError(position, "the header is damaged (its size is negative)")
    if sum(header) - sum(header[148:156]) + 8 * 32 != stored:
        raise TarError(position, "the header is damaged (its checksum does not fit)")
    name = _string(header[:100])
    if header[257:262] == b"ustar" and header[262:263] == b"\0" and header[345]:
        name = f"{_string(header[345:500])}/{name}"
    return name, size, header[156:157]


def _string(data: bytes) -> str:
    return data.partition(b"\0")[0].decode("utf-8", "surrogateescape")


def _pax_path(data: bytes, position: int) -> str | None:
    path = None
    while data:
        digits = data.partition(b" ")[0]
        # int() would take signs and thousands of digits.
        length = int(digits) if digits.isdigit() and len(digits) < _MAX_DIGITS else 0
        if not len(digits) < length <= len(data):
            raise TarError(position, "the PAX header is damaged")
        keyword, _, value = data[len(digits) + 1 : length].partition(b"=")
        if keyword == b"path":
            path = value.rstrip(b"\n").decode("utf-8", "surrogateescape")
        data = data[length:]
    return path
