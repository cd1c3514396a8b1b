"""Grids of pictures as PNG files."""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dinogen.files import write_bytes

GAP = 2
BACKGROUND = 255
NOT_FINITE = (255, 0, 255)


def save_grid(
    images: NDArray[Any],
    path: Path | str,
    columns: int | None = None,
    min_tile: int = 64,
) -> Path:
    """Write pictures as one PNG grid, row by row.

    Args:
        images: ``(N, 3, R, R)`` float in [-1, 1], or ``(N, R, R, 3)`` uint8.
        path: the PNG file; appears whole or not at all.
        columns: tiles per row; the nearest to a square by default.
        min_tile: a smaller picture is enlarged by a whole factor without smoothing, so that a
            4x4 picture can be seen pixel by pixel.

    Returns:
        ``path``.

    Raises:
        ValueError: the array has another shape or type.
    """
    tiles = to_uint8(images)
    count, height, width, _ = tiles.shape
    columns = columns or math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    factor = max(1, math.ceil(min_tile / min(height, width)))
    tiles = tiles.repeat(factor, axis=1).repeat(factor, axis=2)
    step_y, step_x = height * factor + GAP, width * factor + GAP
    sheet = np.full((rows * step_y - GAP, columns * step_x - GAP, 3), BACKGROUND, np.uint8)
    for number, tile in enumerate(tiles):
        top, left = number // columns * step_y, number % columns * step_x
        sheet[top : top + height * factor, left : left + width * factor] = tile
    png = io.BytesIO()
    Image.fromarray(sheet).save(png, "PNG", optimize=True)
    path = Path(path)
    write_bytes(path, png.getvalue())
    return path


def to_uint8(images: NDArray[Any]) -> NDArray[np.uint8]:
    """``(N, 3, R, R)`` float in [-1, 1] as ``(N, R, R, 3)`` uint8; uint8 NHWC passes through.

    A pixel that is not finite turns magenta: black or grey could pass for a picture.

    Raises:
        ValueError: the array has another shape or type.
    """
    if images.ndim == 4 and images.size:
        if images.dtype == np.uint8 and images.shape[3] == 3:
            return images
        if np.issubdtype(images.dtype, np.floating) and images.shape[1] == 3:
            values = images.astype(np.float32).transpose(0, 2, 3, 1)
            broken = ~np.isfinite(values).all(axis=3)
            values[broken] = 0
            pixels = np.rint((values.clip(-1, 1) + 1) * 127.5).astype(np.uint8)
            pixels[broken] = NOT_FINITE
            return pixels
    raise ValueError(
        "a grid takes (N, 3, R, R) floats in [-1, 1] or (N, R, R, 3) uint8, "
        f"not {images.dtype} {images.shape}"
    )
