"""Draws docs/overview.png and docs/collapse.png from a demo's folder.

The first shows the steps from one photo and the faces learnt, the second the same z under mse.

make demo
python docs/make_overview.py --demo demo
"""

from __future__ import annotations

import argparse
import io
import json
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from dinogen.files import write_bytes
from dinogen.report.images import to_uint8
from dinogen.training.checkpointing.snapshot import load_snapshot
from shards import open_dataset

WIDTH, MARGIN, TILE, CAPTION = 1180, 20, 212, 26
COLUMNS, ROWS, FACE, GAP = 9, 6, 60, 2
FONT = ImageFont.load_default(15)


def colours(features: torch.Tensor) -> Image.Image:
    """Features (g*g, C) of one image: their three main directions as red, green and blue."""
    x = features.double() - features.double().mean(0)
    _, _, directions = torch.linalg.svd(x, full_matrices=False)
    shown = x @ directions[:3].T
    shown = (shown / shown.abs().amax(0) + 1) / 2
    side = round(len(x) ** 0.5)
    return Image.fromarray((shown.reshape(side, side, 3).numpy() * 255).astype(np.uint8))


def sheet_of(faces: NDArray[np.uint8]) -> Image.Image:
    """Faces (N, R, R, 3), row by row."""
    step = FACE + GAP
    sheet = Image.new("RGB", (COLUMNS * step - GAP, ROWS * step - GAP), "white")
    for number, face in enumerate(faces[: COLUMNS * ROWS]):
        tile = Image.fromarray(face).resize((FACE, FACE), Image.Resampling.BICUBIC)
        sheet.paste(tile, (number % COLUMNS * step, number // COLUMNS * step))
    return sheet


def main() -> None:
    """Read the folder, draw, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--demo", type=Path, default=Path("demo"))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="a folder")
    args = parser.parse_args()

    (meta,) = (args.demo / "faces").glob("astronaut-*.json")
    (face,) = (args.demo / "faces").glob("astronaut-*.png")
    photo = Image.open(args.demo / "photos" / "astronaut.png").convert("RGB")
    box = json.loads(meta.read_text(encoding="utf-8"))["box"]
    ImageDraw.Draw(photo).rectangle(box, outline=(255, 200, 0), width=5)
    data = open_dataset(str(args.demo / "data"))
    keys = list(data.keys())
    number = next(n for n, key in enumerate(keys) if key.startswith("astronaut-"))
    pyramid = data.read([number], levels=("p4", "p8", "p16"))["pyramid"]
    top = [("photo", photo), ("aligned face", Image.open(face))]
    top += [(f"features {g}x{g}", colours(pyramid[g][0])) for g in (4, 8, 16)]

    snapshot = load_snapshot(args.demo / "run")
    generated = to_uint8(snapshot.sample(COLUMNS * ROWS, 0).numpy())
    upright = [n for n, key in enumerate(keys) if "_mirrored-" not in key]
    real = data.read(upright[: COLUMNS * ROWS], image_size=snapshot.resolution)["image"]
    bottom = [
        (f"generated, {generated.shape[1]}x{generated.shape[1]}, z after z", sheet_of(generated)),
        ("real", sheet_of(to_uint8(real.numpy()))),
    ]

    y = TILE + 2 * CAPTION
    canvas = Image.new("RGB", (WIDTH, y + CAPTION + bottom[0][1].height + MARGIN), "white")
    draw = ImageDraw.Draw(canvas)
    step = (WIDTH - 2 * MARGIN + MARGIN) // len(top)
    for n, (caption, image) in enumerate(top):
        how = Image.Resampling.NEAREST if image.width < TILE else Image.Resampling.LANCZOS
        left = MARGIN + n * step
        canvas.paste(image.convert("RGB").resize((TILE, TILE), how), (left, CAPTION))
        draw.text((left, 4), caption, fill="black", font=FONT)
    for left, (caption, sheet) in zip((MARGIN, WIDTH // 2 + 6), bottom, strict=True):
        canvas.paste(sheet, (left, y + CAPTION))
        draw.text((left, y + 4), caption, fill="black", font=FONT)
    write(canvas, args.out / "overview.png")

    collapsed = load_snapshot(args.demo / "run-mse")
    sheet = sheet_of(to_uint8(collapsed.sample(COLUMNS * ROWS, 0).numpy()))
    name = json.loads(collapsed.place.result_file.read_text(encoding="utf-8"))["files"]
    curve = Image.open(collapsed.place.folder / name["loss_curve"]).convert("RGB")
    curve.thumbnail((WIDTH // 2 - MARGIN, sheet.height), Image.Resampling.LANCZOS)
    canvas = Image.new("RGB", (WIDTH, CAPTION + sheet.height + MARGIN), "white")
    canvas.paste(sheet, (MARGIN, CAPTION))
    canvas.paste(curve, (WIDTH // 2 + 6, CAPTION))
    caption = "generated under mse, the same z"
    ImageDraw.Draw(canvas).text((MARGIN, 4), caption, fill="black", font=FONT)
    write(canvas, args.out / "collapse.png")


def write(canvas: Image.Image, file: Path) -> None:
    """As PNG of 256 colours."""
    png = io.BytesIO()
    canvas.quantize(256).save(png, "PNG", optimize=True)
    write_bytes(file, png.getvalue())


if __name__ == "__main__":
    main()
