"""Images as PNG and GIF: grids, and sheets with labels."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from dinogen.errors import UserError
from dinogen.files import write_bytes

GAP = 2
BACKGROUND = 255
MIN_FONT = 7  # pixels; smaller letters cannot be told apart
NOT_FINITE = (255, 0, 255)


def save_grid(
    images: NDArray[Any],
    path: Path | str,
    columns: int | None = None,
    min_tile: int = 64,
    about: Mapping[str, Any] | None = None,
) -> Path:
    """Write images as one PNG grid, row by row.

    Args:
        images: ``(N, 3, R, R)`` float in [-1, 1], or ``(N, R, R, 3)`` uint8.
        path: the PNG file; appears whole or not at all.
        columns: tiles per row; by default the grid is nearly square.
        min_tile: a smaller image is enlarged by a whole factor without smoothing, so that a
            4x4 image can be seen pixel by pixel.
        about: where the images come from, see :func:`png_bytes`.

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
    path = Path(path)
    write_bytes(path, png_bytes(sheet, about, optimize=True))
    return path


def png_bytes(
    pixels: NDArray[np.uint8], about: Mapping[str, Any] | None = None, optimize: bool = False
) -> bytes:
    """One image (H, W, 3) as a PNG.

    Args:
        pixels: RGB.
        about: JSON-ready facts, such as run and seed; they are the file's text ``dinogen``.
        optimize: take longer, for a smaller file.
    """
    text = PngInfo()
    if about is not None:
        text.add_text("dinogen", json.dumps(about))
    png = io.BytesIO()
    Image.fromarray(pixels).save(png, "PNG", optimize=optimize, pnginfo=text)
    return png.getvalue()


def with_watermark(images: NDArray[np.uint8], text: str) -> NDArray[np.uint8]:
    """Images (N, R, R, 3) uint8 with a text along the lower edge, as large as fits.

    Raises:
        UserError: it would be too small to read.
    """
    side = images.shape[1]
    width = 0.96 * side
    sizes = range(max(side // 8, MIN_FONT), MIN_FONT - 1, -1)
    fonts = (ImageFont.load_default(size) for size in sizes)
    font = next((one for one in fonts if one.getlength(text) <= width), None)
    if font is None:
        raise UserError(
            f"--watermark: {len(text)} characters cannot be read on {side}x{side} pixels: give a "
            "shorter text or a larger --stage"
        )
    marked = []
    for image in images:
        canvas = Image.fromarray(image)
        place = (side / 2, side - max(1, side // 64))
        ImageDraw.Draw(canvas).text(
            place, text, "white", font, anchor="ms", stroke_width=1, stroke_fill="black"
        )
        marked.append(np.asarray(canvas))
    return np.stack(marked)


def to_uint8(images: NDArray[Any]) -> NDArray[np.uint8]:
    """``(N, 3, R, R)`` float in [-1, 1] as ``(N, R, R, 3)`` uint8; uint8 NHWC passes through.

    A pixel that is not finite turns magenta: black or grey could be mistaken for part of an image.

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


MIN_TILE = 96
FONT_SIZE = 12
LINE = FONT_SIZE + 4
INK = (40, 40, 40)


@dataclass(frozen=True)
class Sheet:
    """Images row by row.

    Attributes:
        images: (N, 3, R, R) float in [-1, 1], or (N, R, R, 3) uint8.
        columns: images per row.
        labels: text above the first images; empty ones take no room.
        left: text to the left of the rows.
    """

    images: NDArray[Any]
    columns: int
    labels: Sequence[str] = ()
    left: Sequence[str] = ()


def draw_sheet(sheet: Sheet) -> Image.Image:
    """A sheet as RGB; images below 96 pixels are enlarged by a whole factor, unsmoothed."""
    tiles = to_uint8(sheet.images)
    side = tiles.shape[1]
    factor = max(1, math.ceil(MIN_TILE / side))
    tiles = tiles.repeat(factor, axis=1).repeat(factor, axis=2)
    side *= factor
    columns = min(sheet.columns, len(tiles))
    rows = math.ceil(len(tiles) / columns)
    font = ImageFont.load_default(FONT_SIZE)
    margin = max((math.ceil(font.getlength(text)) + 6 for text in sheet.left), default=0)
    labels = [*sheet.labels, *[""] * (rows * columns - len(sheet.labels))]
    per_row = [labels[columns * row : columns * (row + 1)] for row in range(rows)]
    strips = [LINE if any(words) else 0 for words in per_row]
    size = (margin + columns * (side + GAP) - GAP, sum(strips) + rows * (side + GAP) - GAP)
    canvas = Image.new("RGB", size, (BACKGROUND,) * 3)
    draw = ImageDraw.Draw(canvas)
    top = 0
    for row in range(rows):
        for column, text in enumerate(per_row[row]):
            draw.text((margin + column * (side + GAP) + 1, top), text, INK, font)
        top += strips[row]
        if row < len(sheet.left):
            draw.text((0, top + side // 2), sheet.left[row], INK, font, anchor="lm")
        for column, tile in enumerate(tiles[columns * row : columns * (row + 1)]):
            canvas.paste(Image.fromarray(tile), (margin + column * (side + GAP), top))
        top += side + GAP
    return canvas


def save_sheet(sheet: Sheet, path: Path) -> None:
    """Write a sheet as PNG, whole or not at all."""
    file = io.BytesIO()
    draw_sheet(sheet).save(file, "PNG")
    write_bytes(path, file.getvalue())


def save_animation(sheets: Sequence[Sheet], path: Path, seconds: float) -> None:
    """Write sheets of one size as a GIF that repeats, whole or not at all.

    Args:
        sheets: one frame each, at least two; the last is shown three times as long.
        path: the GIF.
        seconds: duration of a frame.
    """
    first, *others = (draw_sheet(sheet) for sheet in sheets)
    times = [round(1000 * seconds)] * len(others) + [round(3000 * seconds)]
    file = io.BytesIO()
    # Pillow merges equal frames and adds up their durations, which is fine.
    first.save(file, "GIF", save_all=True, append_images=others, duration=times, loop=0)
    write_bytes(path, file.getvalue())


def with_corner(above: NDArray[Any], left: NDArray[Any], table: NDArray[Any]) -> NDArray[np.uint8]:
    """A table of images with a row above and a column to its left, and a white corner.

    Args:
        above: (C, 3, R, R) float in [-1, 1].
        left: (L, 3, R, R).
        table: (L * C, 3, R, R), row by row.

    Returns:
        ((L + 1) * (C + 1), R, R, 3) uint8, row by row.
    """
    columns = len(above)
    rows = [np.full_like(to_uint8(above[:1]), BACKGROUND), to_uint8(above)]
    for number, head in enumerate(left):
        rows += [to_uint8(head[None]), to_uint8(table[number * columns : (number + 1) * columns])]
    return np.concatenate(rows)
