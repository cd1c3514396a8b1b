"""What the boxes of WebP, HEIC, AVIF and JPEG 2000 files say that their decoders do not."""

from __future__ import annotations

from collections.abc import Iterator

Bytes = bytes | memoryview

# HEVC and AV1 do not end in so many zeros, nor write more of them: a part that was never filled is
# such, be it that a download broke off or a disk block was lost. Beside the coded data `mdat` may
# hold EXIF data, where makers of cameras leave gaps. (WebP writes thousands for a plain wall.)
_ZEROS = bytes(256)
_MANY_ZEROS = bytes(4096)


def webp_size(data: Bytes) -> tuple[int, int] | None:
    """(width, height) of a WebP's canvas, which its decoder makes room for as it opens the file."""
    head = bytes(data[:32])
    if head[12:16] == b"VP8X" and len(head) >= 30:
        width, height = (int.from_bytes(head[i : i + 3], "little") + 1 for i in (24, 27))
        return width, height
    if head[12:16] == b"VP8L" and len(head) >= 25:
        bits = int.from_bytes(head[21:25], "little")
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    if head[12:16] == b"VP8 " and len(head) >= 30:
        width, height = (int.from_bytes(head[i : i + 2], "little") & 0x3FFF for i in (26, 28))
        return width, height
    return None


def colour_code(data: Bytes) -> tuple[int, int] | None:
    """Numbers of the primaries and of the transfer (ITU-T H.273) in a HEIC or AVIF file."""
    head = bytes(data[: 1 << 16])
    place = head.find(b"colrnclx")
    if place < 0 or len(head) < place + 12:
        return None
    return tuple(int.from_bytes(head[place + i : place + i + 2], "big") for i in (8, 10))  # type: ignore[return-value]


def lacks_data(data: Bytes) -> bool:
    """Whether coded data are missing for which the decoders show something all the same.

    Args:
        data: a file of HEIC, AVIF or JPEG 2000; of others nothing is known.
    """
    if data[:4] == b"\xff\x4f\xff\x51":
        return not _has_end(data, 0, len(data))
    if data[4:8] == b"jP  ":
        spans = [span for name, *span in _boxes(data) if name == b"jp2c"]
        return not all(_has_end(data, *span) for span in spans)
    if data[4:8] == b"ftyp":
        parts = [bytes(data[start:end]) for name, start, end in _boxes(data) if name == b"mdat"]
        return any(part.endswith(_ZEROS) or _MANY_ZEROS in part for part in parts)
    return False


def _has_end(data: Bytes, start: int, end: int) -> bool:
    """Whether a codestream of JPEG 2000 has its end marker; zeros behind it do no harm."""
    return bytes(data[start:end]).rstrip(b"\0").endswith(b"\xff\xd9")


def _boxes(data: Bytes) -> Iterator[tuple[bytes, int, int]]:
    """Name, start and end of the boxes at the top of a file of ISO boxes."""
    position = 0
    while position + 8 <= len(data):
        size, start = int.from_bytes(data[position : position + 4], "big"), position + 8
        name = bytes(data[position + 4 : start])
        if size == 1:
            size, start = int.from_bytes(data[start : start + 8], "big"), start + 8
        end = position + size if size else len(data)
        if end < start:
            return
        yield name, start, min(end, len(data))
        position = end
