"""Converts the colours of an image to sRGB, by its ICC profile or other data in its file."""

from __future__ import annotations

import io
import logging
import struct
import threading
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

try:
    from PIL import ImageCms
except ImportError:  # a Pillow without LittleCMS
    ImageCms = None  # type: ignore[assignment]

log = logging.getLogger(__name__)

XY = tuple[float, float]
Matrix = npt.NDArray[np.float64]

# Profiles that call themselves sRGB differ from each other by this much, of 255.
_SAME = 2
_D50 = (0.9642, 1.0, 0.8249)
_D65: XY = (0.3127, 0.329)
_SRGB: tuple[XY, XY, XY] = ((0.64, 0.33), (0.3, 0.6), (0.15, 0.06))
_ADOBE_RGB: tuple[XY, XY, XY] = ((0.64, 0.33), (0.21, 0.71), (0.15, 0.06))
_P3: tuple[XY, XY, XY] = ((0.68, 0.32), (0.265, 0.69), (0.15, 0.06))
# ITU-T H.273, table 2: primaries and white point by number
_PRIMARIES: dict[int, tuple[tuple[XY, XY, XY], XY]] = {
    1: (_SRGB, _D65),
    5: (((0.64, 0.33), (0.29, 0.6), (0.15, 0.06)), _D65),
    6: (((0.63, 0.34), (0.31, 0.595), (0.155, 0.07)), _D65),
    7: (((0.63, 0.34), (0.31, 0.595), (0.155, 0.07)), _D65),
    9: (((0.708, 0.292), (0.17, 0.797), (0.131, 0.046)), _D65),
    11: (_P3, (0.314, 0.351)),
    12: (_P3, _D65),
}
# A curve: (gamma,), or gamma, a, b, c, d: (a x + b)^gamma from d on, c x below it.
Curve = tuple[float, ...]
_SRGB_CURVE: Curve = (2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045)
# H.273, table 3: transfer characteristics by number, besides those of sRGB. The curves of
# television (1, 6, 14, 15) are what encoders of video write for photos that are in sRGB.
_CURVES: dict[int, Curve] = {4: (2.2,), 5: (2.8,), 8: (1.0,)}
_HDR = {16: "PQ", 18: "HLG"}
_LEVELS = np.arange(256, dtype=np.uint8)


class HighDynamicRange(Exception):
    """The values mean light far brighter than white: shown as they are they would be wrong."""


def to_srgb(image: Image.Image, profile: bytes) -> Image.Image:
    """An image of mode L, RGB, CMYK or LAB with its colours in sRGB, as L or RGB.

    Relative colorimetric, with black point compensation. A profile that is sRGB to within rounding
    changes nothing; neither does a profile that is broken or for other channels.
    """
    if ImageCms is None:
        _warn_once()
        return image
    source = image
    transform = _transform(profile, source.mode)
    if transform is None and image.mode == "L":  # a profile for RGB may stand in a grey image
        source = image.convert("RGB")
        transform = _transform(profile, "RGB")
    if transform is None:
        return image
    return ImageCms.applyTransform(source, transform) or image


@lru_cache(maxsize=32)
def _transform(profile: bytes, mode: str) -> Any:
    """The conversion of a mode to sRGB; None if it changes nothing or is impossible."""
    spaces = {"L": "GRAY", "RGB": "RGB ", "CMYK": "CMYK", "LAB": "Lab "}
    try:
        given = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if given.profile.xcolor_space != spaces.get(mode):
            return None
        # Grey to grey; otherwise the three channels would differ by rounding.
        wanted = "L" if mode == "L" else "RGB"
        transform = ImageCms.buildTransform(
            given,
            ImageCms.ImageCmsProfile(io.BytesIO(_grey_profile(_SRGB_CURVE)))
            if wanted == "L"
            else ImageCms.createProfile("sRGB"),
            mode,
            wanted,
            ImageCms.Intent.RELATIVE_COLORIMETRIC,
            ImageCms.Flags.BLACKPOINTCOMPENSATION,
        )
        if mode == wanted:
            probe = _probe(mode)
            after = np.asarray(ImageCms.applyTransform(probe, transform), np.int16)
            if np.abs(after - np.asarray(probe, np.int16)).max() <= _SAME:
                return None
    except Exception as error:  # a broken profile raises nearly any type
        log.debug("a colour profile was left out: %s", error)
        return None
    return transform


def _probe(mode: str) -> Image.Image:
    """All greys, or colours that fill the cube."""
    if mode == "L":
        return Image.fromarray(_LEVELS[None])
    steps = _LEVELS[::15]
    cube = np.stack(np.meshgrid(steps, steps, steps), -1).reshape(1, -1, 3)
    greys = np.repeat(_LEVELS[None, :, None], 3, axis=2)
    return Image.fromarray(np.concatenate((cube, greys), 1))


_warned = threading.Event()


def _warn_once() -> None:
    if not _warned.is_set():
        _warned.set()
        log.warning(
            "this Pillow has no LittleCMS: colour profiles of images are NOT applied; install "
            "Pillow's own wheel with `pip install --force-reinstall pillow`"
        )


def adobe_rgb() -> bytes:
    """A profile of what cameras call Adobe RGB, for files without a profile."""
    return _rgb_profile(_ADOBE_RGB, _D65, (563 / 256,))


def lab() -> bytes:
    """A profile of CIE L*a*b*, for files without a profile."""
    return (
        b""
        if ImageCms is None
        else ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    )


def coded_profile(primaries: int, transfer: int) -> bytes | None:
    """A profile for code points of ITU-T H.273; None if they mean sRGB or are unknown.

    Raises:
        HighDynamicRange: the transfer is PQ or HLG.
    """
    if transfer in _HDR:
        raise HighDynamicRange(f"a high dynamic range image ({_HDR[transfer]})")
    where = _PRIMARIES.get(primaries, _PRIMARIES[1])
    curve = _CURVES.get(transfer, _SRGB_CURVE)
    if where == _PRIMARIES[1] and curve == _SRGB_CURVE:
        return None
    return _rgb_profile(*where, curve)


def png_profile(chunks: Mapping[bytes, bytes], profile: bytes | None, grey: bool) -> bytes | None:
    """The profile that a PNG specifies; None for sRGB, which is the default.

    The order is that of the standard: cICP, iCCP, sRGB, then cHRM and gAMA.

    Args:
        chunks: cICP, sRGB, cHRM and gAMA by name, those that exist.
        profile: that of iCCP.
        grey: whether the image has no colours.

    Raises:
        HighDynamicRange: as `coded_profile`.
    """
    if len(code := chunks.get(b"cICP", b"")) == 4:
        return coded_profile(code[0], code[1])
    if profile is not None or b"sRGB" in chunks:
        return profile
    curve, primaries, white = _SRGB_CURVE, _SRGB, _D65
    gamma = int.from_bytes(chunks.get(b"gAMA", b"")[:4], "big")
    # 1 / 2.2 is how sRGB is written there, in round numbers.
    if gamma and not 43_000 <= gamma <= 47_500:
        curve = (100_000 / gamma,)
    if len(places := chunks.get(b"cHRM", b"")) == 32 and not grey:
        numbers = [number / 100_000 for number in struct.unpack(">8I", places)]
        found_white, *found = [(numbers[i], numbers[i + 1]) for i in range(0, 8, 2)]
        if np.abs(np.subtract((found_white, *found), (_D65, *_SRGB))).max() > 0.005:
            white, primaries = found_white, (found[0], found[1], found[2])
    if (curve, primaries, white) == (_SRGB_CURVE, _SRGB, _D65):
        return None
    if not 0.2 <= curve[0] <= 5:
        return None
    try:
        return _grey_profile(curve) if grey else _rgb_profile(primaries, white, curve)
    except (ValueError, ZeroDivisionError, np.linalg.LinAlgError, struct.error):
        return None  # values that are no colours


def _rgb_profile(primaries: tuple[XY, XY, XY], white: XY, curve: Curve) -> bytes:
    """An ICC profile of three primaries and one curve."""
    columns = np.array([(x / y, 1.0, (1 - x - y) / y) for x, y in primaries]).T
    whiteness = np.array((white[0] / white[1], 1.0, (1 - white[0] - white[1]) / white[1]))
    columns = columns * np.linalg.solve(columns, whiteness)
    # Bradford's adaptation to the white of all profiles
    bradford = np.array(
        [(0.8951, 0.2664, -0.1614), (-0.7502, 1.7135, 0.0367), (0.0389, -0.0685, 1.0296)]
    )
    scale = np.diag(bradford @ _D50 / (bradford @ whiteness))
    columns = np.linalg.inv(bradford) @ scale @ bradford @ columns
    places = {name: _xyz(columns[:, i]) for i, name in enumerate((b"rXYZ", b"gXYZ", b"bXYZ"))}
    curves = dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), _para(curve))
    return _icc(b"RGB ", {b"wtpt": _xyz(_D50), **places, **curves})


def _grey_profile(curve: Curve) -> bytes:
    """An ICC profile of greys."""
    return _icc(b"GRAY", {b"wtpt": _xyz(_D50), b"kTRC": _para(curve)})


def _xyz(values: Any) -> bytes:
    return b"XYZ \0\0\0\0" + b"".join(_fixed(float(value)) for value in values)


def _para(curve: Curve) -> bytes:
    kind = 0 if len(curve) == 1 else 3
    return b"para\0\0\0\0" + struct.pack(">HH", kind, 0) + b"".join(map(_fixed, curve))


def _fixed(value: float) -> bytes:
    return struct.pack(">i", round(value * 65536))


def _icc(space: bytes, tags: Mapping[bytes, bytes]) -> bytes:
    """An ICC profile (version 4.3, for displays) of these tags."""
    table, bodies = struct.pack(">I", len(tags)), b""
    start = 128 + 4 + 12 * len(tags)
    for name, body in tags.items():
        table += name + struct.pack(">II", start + len(bodies), len(body))
        bodies += body + bytes(-len(body) % 4)
    size = start + len(bodies)
    header = struct.pack(">I4sI4s4s4s", size, bytes(4), 0x04300000, b"mntr", space, b"XYZ ")
    header += bytes(12) + b"acsp" + bytes(28) + _xyz(_D50)[8:]
    return header + bytes(128 - len(header)) + table + bodies
