"""Images as users bring them, encoded by Pillow or, where it cannot, by hand."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image


def photo(width: int, height: int) -> Image.Image:
    """Smooth colours with some texture, such as a photo has."""
    y, x = np.mgrid[:height, :width] / 24
    waves = [np.sin(x + i) * np.cos(y * (1 + i / 3)) for i in range(3)]
    noise = np.random.default_rng(width * 1000 + height).normal(0, 6, (height, width, 3))
    pixels = 128 + 90 * np.stack(waves, -1) + noise
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def encode(image: Image.Image, kind: str, **options: Any) -> bytes:
    """An image file."""
    file = io.BytesIO()
    if kind == "JPEG2000":
        options.pop("quality", None)
    image.save(file, kind, **options)
    return file.getvalue()


def chunk(name: bytes, body: bytes, checksum: int | None = None) -> bytes:
    """A chunk of a PNG."""
    right = zlib.crc32(name + body)
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", checksum or right)


def png(pixels: npt.NDArray[Any], chunks: Sequence[bytes] = ()) -> bytes:
    """A PNG of 8 or 16 bits, grey (H, W), with alpha (H, W, 2), RGB or RGBA, with more chunks."""
    channels = 1 if pixels.ndim == 2 else pixels.shape[2]
    kind = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    height, width = pixels.shape[:2]
    rows = pixels.astype(pixels.dtype.newbyteorder(">")).reshape(height, -1)
    packed = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
    head = struct.pack(">IIBBBBB", width, height, 8 * pixels.dtype.itemsize, kind, 0, 0, 0)
    parts = [chunk(b"IHDR", head), *chunks, chunk(b"IDAT", packed), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)
