"""What the segments of a JPEG say before it is decoded, and whether all of its scans are there."""

from __future__ import annotations

import re
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
        height: likewise.
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
        coded: offset of its coded data; also what a header of the same bytes would end at.
        one_scan: whether the first scan holds all that there is.
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
    """Walk through the segments of a JPEG up to its first scan.

    Raises:
        EOFError: the data end before a scan begins.
        ValueError: they cannot be the segments of a JPEG.
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
    """Whether coefficients were left for scans that never come.

    Decoders say nothing of that: they show the image blurred, or without its colours.
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
    """The same with an end marker behind it."""
    return bytes(data) + b"\xff\xd9"


def with_clean_header(data: Bytes, header: Header) -> bytes:
    """The same with a header of those segments alone that decide the pixels.

    What only looks odd there (bytes between segments, an unknown revision of JFIF, numbers in the
    scan's segment that mean nothing in a sequential JPEG) then raises no warning, so that a warning
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
