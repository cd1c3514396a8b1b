"""Draws docs/objectives.png: the same sample numbers of runs with different objectives.

    python docs/make_objectives.py runs/hypothesis_fast/objectives/*/seed0 ...

The title of a row is the name of the run's folder, or NAME in NAME=RUN.
"""

from __future__ import annotations

import argparse
import io
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from dinogen.files import write_bytes
from dinogen.report.images import to_uint8
from dinogen.training.checkpointing.snapshot import load_snapshot

NUM, TILE, CAPTION, GAP = 12, 96, 26, 2
FONT = ImageFont.load_default(15)


def row(run: Path) -> Image.Image:
    """The first images of a run's moving average, side by side."""
    snapshot = load_snapshot(run)
    sheet = Image.new("RGB", (NUM * (TILE + GAP), TILE), "white")
    for number, image in enumerate(to_uint8(snapshot.sample(NUM, 0).numpy())):
        tile = Image.fromarray(image).resize((TILE, TILE), Image.Resampling.NEAREST)
        sheet.paste(tile, (number * (TILE + GAP), 0))
    return sheet


def main() -> None:
    """Read the runs, draw, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", metavar="[NAME=]RUN")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("objectives.png"))
    args = parser.parse_args()
    rows = []
    for item in args.runs:
        name, _, run = item.rpartition("=")
        rows.append((name or Path(run).name, row(Path(run))))
    canvas = Image.new("RGB", (rows[0][1].width, len(rows) * (TILE + CAPTION)), "white")
    draw = ImageDraw.Draw(canvas)
    for number, (name, sheet) in enumerate(rows):
        top = number * (TILE + CAPTION)
        draw.text((2, top + 4), name, fill="black", font=FONT)
        canvas.paste(sheet, (0, top + CAPTION))
    file = io.BytesIO()
    canvas.save(file, "PNG", optimize=True)
    write_bytes(args.out, file.getvalue())


if __name__ == "__main__":
    main()
