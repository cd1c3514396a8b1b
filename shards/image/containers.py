"""The structure of image files, which says more than their decoders do: JPEG, PNG, ISO boxes."""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field

Bytes = bytes | memoryview

_SOI, _EOI, _SOS, _APP0, _APP1, _APP2, _APP14 = 0xD8, 0xD9, 0xDA, 0xE0, 0xE1, 0xE2, 0xEE
_DQT, _DHT, _DAC, _DRI = 0xDB, 0xC4, 0xCC, 0xDD
# SOF0 and SOF1 are sequential, SOF2 progressive; 9 and 10 are the same with arithmetic coding.
_SEQUENTIAL, _PROGRESSIVE = (0xC0, 0xC1, 0xC9), (0xC2, 0xCA)
_SOFS = frozenset(range(0xC0, 0xD0)) - {_DHT, 0xC8, _DAC}
_ALONE = frozenset((0x01, *range(0xD0, 0xD8)))  # markers without a length
# In coded data 0xff is followed by 0 or by the number of a restart.
_NEXT_MARKER = re.compile(rb"\xff+([^\x00\xff\xd0-\xd7])")
_JFIF = b"\xff\xe0\x00\x10JFIF\x00\x01\x01\x00\x00\x01\x00\x01\x00\x00"
_COEFFICIENTS = 64


@dataclass
class Header:
    """The segments up to the first scan.

    Attributes:
        width: in pixels, as stored.
        height: in pixels, as stored.
        frame: marker of the frame, 0xC0 for baseline.
        components: their numbers.
        precision: bits per value.
        exif: the payload of the EXIF segment.
        xmp: the payload of the XMP segment.
        profile: the ICC profile.
        transform: what an Adobe segment says of the colours; None without one.
        jfif: whether there is a JFIF segment.
        stray: whether there are bytes between segments.
        scan: offset of the first scan's segment.
        coded: offset of its coded data, where the header ends.
        one_scan: whether the first scan holds the whole image.
    """

    width: int = 0
    height: int = 0
    frame: int = 0
    components: tuple[int, ...] = ()
    precision: int = 8
    exif: bytes | None = None
    xmp: bytes | None = None
    profile: bytes | None = None
    transform: int | None = None
    jfif: bool = False
    stray: bool = False
    scan: int = 0
    coded: int = 0
    one_scan: bool = False
    segments: list[tuple[int, int, int]] = field(default_factory=list)

    @property
    def simple(self) -> bool:
        """Whether it is in grey or three colours without a profile, all of them in one scan."""
        return self.one_scan and self.profile is None and len(self.components) in (1, 3)


def read_header(data: Bytes) -> Header:
    """Read the segments of a JPEG up to its first scan.

    Raises:
        EOFError: the data end before a scan begins.
        ValueError: the data are not segments of a JPEG.
    """
    found = Header()
    profile: dict[int, bytes] = {}
    position = 2
    try:
        while True:
            if data[position] != 0xFF:
                found.stray = True
                position += 1
                continue
            marker = data[position + 1]
            if marker in _ALONE:
                position += 2
                continue
            if marker in (0xFF, 0x00):
                found.stray |= marker == 0
                position += 1
                continue
            if marker in (_SOI, _EOI):
                raise ValueError("has no scan")
            start = position + 4
            end = position + 2 + (data[position + 2] << 8 | data[position + 3])
            found.segments.append((marker, position, end))
            if marker in _SOFS:
                _read_frame(found, marker, data, start)
            elif marker == _SOS:
                found.scan, found.coded = position, end
                whole = data[start] == len(found.components)
                found.one_scan = whole and found.frame in _SEQUENTIAL
                break
            elif marker >= _APP0:
                _read_application(found, marker, bytes(data[start:end]), profile)
            position = end
        if end > len(data):
            raise IndexError
    except IndexError:
        raise EOFError("ends before its coded data begin") from None
    if not found.components:
        raise ValueError("has no frame before its scan")
    if profile:
        found.profile = b"".join(profile[number] for number in sorted(profile))
    return found


def _read_frame(found: Header, marker: int, data: Bytes, start: int) -> None:
    found.frame = marker
    found.precision = data[start]
    found.height = data[start + 1] << 8 | data[start + 2]
    found.width = data[start + 3] << 8 | data[start + 4]
    found.components = tuple(data[start + 6 + 3 * i] for i in range(data[start + 5]))


def _read_application(found: Header, marker: int, body: bytes, profile: dict[int, bytes]) -> None:
    if marker == _APP1 and body.startswith(b"Exif\0"):
        found.exif = found.exif or body
    elif marker == _APP1 and body.startswith(b"http://ns.adobe.com/xap/1.0/\0"):
        found.xmp = found.xmp or body
    elif marker == _APP2 and body.startswith(b"ICC_PROFILE\0"):
        profile[body[12] if len(body) > 12 else 0] = body[14:]
    elif marker == _APP14 and body.startswith(b"Adobe") and len(body) >= 12:
        found.transform = body[11]
    elif marker == _APP0 and body.startswith(b"JFIF\0"):
        found.jfif = True


def lacks_scans(data: Bytes, header: Header) -> bool:
    """Whether scans are missing, so that some coefficients are never given.

    Decoders do not report it: they show the image blurred, or without its colours.
    """
    if header.one_scan:
        return False
    left = {component: [1] * _COEFFICIENTS for component in header.components}
    position = header.scan
    while position + 4 <= len(data):
        marker = data[position + 1]
        if marker in (_EOI, _SOI):
            break
        end = position + 2 + (data[position + 2] << 8 | data[position + 3])
        if marker == _SOS and end <= len(data):
            _read_scan(bytes(data[position + 4 : end]), left, header.frame in _PROGRESSIVE)
        following = _NEXT_MARKER.search(data, end)
        if following is None:
            break
        position = following.start(1) - 1
    return any(any(bits) for bits in left.values())


def _read_scan(scan: bytes, left: dict[int, list[int]], progressive: bool) -> None:
    """Note which bits of which coefficients a scan holds."""
    count = scan[0] if scan else 0
    if len(scan) < 4 + 2 * count:
        return
    first, last, low = scan[1 + 2 * count], scan[2 + 2 * count], scan[3 + 2 * count] & 15
    if not progressive:
        first, last, low = 0, _COEFFICIENTS - 1, 0
    for component in scan[1 : 1 + 2 * count : 2]:
        bits = left.get(component, [])
        bits[first : last + 1] = [low] * len(bits[first : last + 1])


def ended(data: Bytes) -> bytes:
    """The same data with an end marker appended."""
    return bytes(data) + b"\xff\xd9"


def with_clean_header(data: Bytes, header: Header) -> bytes:
    """The same data with a header of only those segments that decide the pixels.

    What is merely unusual (bytes between segments, an unknown revision of JFIF, numbers in the
    scan's segment that mean nothing in a sequential JPEG) then raises no warning, so a warning
    means damage.
    """
    parts = [b"\xff\xd8"]
    if header.jfif:
        parts.append(_JFIF)
    if header.transform is not None:
        known = (
            header.transform
            if header.transform < 3
            else {3: 1, 4: 2}.get(len(header.components), 0)
        )
        parts.append(b"\xff\xee\x00\x0eAdobe\x00d\x00\x00\x00\x00" + bytes((known,)))
    for marker, start, end in header.segments:
        if marker in _SOFS or marker in (_DQT, _DHT, _DAC, _DRI):
            parts.append(bytes(data[start:end]))
    scan = bytes(data[header.scan : header.coded])
    if header.frame in _SEQUENTIAL:
        scan = scan[:-3] + bytes((0, _COEFFICIENTS - 1, 0))
    return b"".join((*parts, scan, data[header.coded :]))


_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_END = b"\x00\x00\x00\x00IEND\xaeB`\x82"
_NAME = re.compile(rb"[A-Za-z]{4}")
# A compressed chunk may unpack to a thousand times its size; not more than this is unpacked.
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
        pixels: a PNG of the chunks that decide the pixels, with an end; the original data if they
            hold no other chunks.
        whole: whether it had its end, and no chunk with a wrong checksum or too many bytes.
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
    """Read the chunks of a PNG.

    Raises:
        EOFError: the data end before the pixels begin.
        ValueError: a chunk that decides the pixels is damaged.
        NotImplementedError: it is not a PNG of the standard.
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
            raise NotImplementedError("a PNG in Apple's own format: convert it to a standard PNG")
        cut = end + 4 > size
        if name in _PIXELS:
            chunk = data[position : end + 4]
            if cut and name == b"IDAT":
                # All rows may still be there.
                chunk = _chunk(name, bytes(data[position + 8 : min(end, size)]))
            elif cut:
                break
            elif zlib.crc32(data[position + 4 : end]) != int.from_bytes(data[end : end + 4], "big"):
                raise ValueError(f"wrong checksum of its chunk {name.decode()}")
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
    """Take what matters out of a chunk that holds no pixels; `chunk` begins with its name."""
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
    """XMP, or EXIF data that ImageMagick stores in a text chunk."""
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
    """The unpacked content, or None if it is damaged or larger than `limit` bytes."""
    unpacker = zlib.decompressobj()
    try:
        data = unpacker.decompress(packed, limit)
    except zlib.error:
        data = b""
    if not data or not unpacker.eof:
        found.whole = False
        return None
    return data


# Coded data of HEVC and AV1 never end in this many zeros, or hold a longer run of them: such a run
# was never filled, because a download was interrupted or a disk block lost. `mdat` may also hold
# EXIF data, where cameras leave shorter gaps. (WebP writes thousands of zeros for a plain wall.)
_ZEROS = bytes(256)
_MANY_ZEROS = bytes(4096)


def webp_size(data: Bytes) -> tuple[int, int] | None:
    """(width, height) of a WebP's canvas, which its decoder allocates when it opens the file."""
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
    """Whether coded data are missing that the decoders silently replace.

    Args:
        data: a HEIC, AVIF or JPEG 2000 file; False for all others.
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
    """Whether a codestream of JPEG 2000 has its end marker; zeros after it do no harm."""
    return bytes(data[start:end]).rstrip(b"\0").endswith(b"\xff\xd9")


def _boxes(data: Bytes) -> Iterator[tuple[bytes, int, int]]:
    """Name, start and end of the top-level boxes of a file of ISO boxes."""
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
