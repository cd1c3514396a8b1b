"""What the chunks of a PNG say before its pixels are decoded, and a copy without the rest."""

from __future__ import annotations

import re
import zlib
from dataclasses import dataclass, field

Bytes = bytes | memoryview

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_END = b"\x00\x00\x00\x00IEND\xaeB`\x82"
_NAME = re.compile(rb"[A-Za-z]{4}")
# What is packed into a chunk may be a thousand times its size: no more than that is unpacked.
_MAX_PROFILE = 32 << 20
_MAX_TEXT = 1 << 20  # Pillow's own limit
# Chunks that decide the pixels: damage there counts. In all others it does not.
_PIXELS = frozenset((b"IHDR", b"PLTE", b"tRNS", b"IDAT"))
_COLOURS = frozenset((b"cICP", b"iCCP", b"sRGB", b"cHRM", b"gAMA"))


@dataclass
class Chunks:
    """What the chunks of a PNG say.

    Attributes:
        bits: per value: 1, 2, 4, 8 or 16.
        kind: 0 grey, 2 RGB, 3 palette, 4 grey with alpha, 6 RGB with alpha.
        pixels: a PNG of the chunks that decide the pixels, with an end; the data as they came if
            these hold no others.
        whole: whether it had its end, and no chunk with a wrong checksum or of too many bytes.
        exif: the EXIF data.
        xmp: the XMP data.
        profile: the ICC profile.
        colours: the chunks cICP, sRGB, cHRM and gAMA by name.
    """

    bits: int = 8
    kind: int = 2
    pixels: Bytes = b""
    whole: bool = True
    exif: bytes | None = None
    xmp: bytes | None = None
    profile: bytes | None = None
    colours: dict[bytes, bytes] = field(default_factory=dict)


def read_chunks(data: Bytes) -> Chunks:
    """Walk through the chunks of a PNG.

    Raises:
        EOFError: the data end before the pixels begin.
        ValueError: a chunk that decides the pixels is damaged.
        NotImplementedError: it is no PNG as the standard has it.
    """
    found = Chunks()
    kept: list[Bytes] = [_SIGNATURE]
    position, size = len(_SIGNATURE), len(data)
    pure, ended, begun, cut = True, False, False, False
    while position + 8 <= size:
        length = int.from_bytes(data[position : position + 4], "big")
        name = bytes(data[position + 4 : position + 8])
        end = position + 8 + length
        if name == b"IEND":
            ended = True
            break
        if not _NAME.fullmatch(name):
            break
        if name == b"CgBI":
            raise NotImplementedError("a PNG in Apple's own format: convert it to a usual PNG")
        cut = end + 4 > size
        if name in _PIXELS:
            chunk = data[position : end + 4]
            if cut and name == b"IDAT":
                # All rows may be there all the same.
                chunk = _chunk(name, bytes(data[position + 8 : min(end, size)]))
            elif cut:
                break
            elif zlib.crc32(data[position + 4 : end]) != int.from_bytes(data[end : end + 4], "big"):
                raise ValueError(f"wrong checksum in its chunk {name.decode()}")
            if name == b"IHDR" and length == 13:
                found.bits, found.kind = chunk[16], chunk[17]
            begun |= name == b"IDAT"
            kept.append(chunk)
        else:
            pure = False
            if not cut:
                _read_other(found, name, data[position + 4 : end], data[end : end + 4])
        if cut:
            break
        position = end + 4
    if not begun:
        if position + 8 <= size and not cut:
            raise ValueError("a chunk is damaged before its pixels begin")
        raise EOFError("ends before its pixels begin")
    found.whole &= ended
    found.pixels = data if pure and ended else b"".join((*kept, _END))
    return found


def _chunk(name: bytes, body: bytes) -> bytes:
    length, checksum = len(body), zlib.crc32(name + body)
    return length.to_bytes(4, "big") + name + body + checksum.to_bytes(4, "big")


def _read_other(found: Chunks, name: bytes, chunk: Bytes, checksum: Bytes) -> None:
    """Take what matters out of a chunk beside the pixels; `chunk` begins with its name."""
    if zlib.crc32(chunk) != int.from_bytes(checksum, "big"):
        found.whole = False
        return
    if name in _COLOURS or name in (b"eXIf", b"iTXt", b"zTXt", b"tEXt"):
        body = bytes(chunk[4:])
    else:
        return
    if name == b"iCCP":
        packed = body.partition(b"\0")[2][1:]
        found.profile = _unpack(found, packed, _MAX_PROFILE)
        found.whole &= len(found.profile or b"") <= _MAX_TEXT
    elif name in _COLOURS:
        found.colours[name] = body
    elif name == b"eXIf":
        found.exif = body
    else:
        _read_text(found, name, body)


def _read_text(found: Chunks, name: bytes, body: bytes) -> None:
    """XMP, or EXIF data as ImageMagick hides it in a text."""
    key, _, rest = body.partition(b"\0")
    if name == b"zTXt":
        rest = _unpack(found, rest[1:], _MAX_TEXT) or b""
    elif name == b"iTXt":
        packed, text = rest[:1] == b"\1", rest[2:].split(b"\0", 2)[-1]
        rest = (_unpack(found, text, _MAX_TEXT) or b"") if packed else text
    if key == b"XML:com.adobe.xmp":
        found.xmp = rest
    elif key in (b"Raw profile type exif", b"Raw profile type APP1") and found.exif is None:
        try:
            found.exif = bytes.fromhex("".join(rest.decode("latin-1").split("\n")[3:]))
        except ValueError:
            found.whole = False


def _unpack(found: Chunks, packed: bytes, limit: int) -> bytes | None:
    """What is packed, or None if it is damaged or larger than `limit` bytes."""
    unpacker = zlib.decompressobj()
    try:
        data = unpacker.decompress(packed, limit)
    except zlib.error:
        data = b""
    if not data or not unpacker.eof:
        found.whole = False
        return None
    return data
