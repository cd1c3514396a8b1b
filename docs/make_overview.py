"""Draws docs/overview.png from a demo's folder: the steps from one photo, and the results of a run.

    python docs/make_overview.py --demo DEMO --run RUN

DEMO is a finished demo (its photo and its face), RUN a run over the same faces.
"""

from __future__ import annotations

import argparse
import io
import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from dinogen.config import load_config
from dinogen.files import write_bytes
from shards import open_dataset

WIDTH, MARGIN, TILE, CAPTION = 1180, 20, 212, 26
FONT = ImageFont.load_default(15)


def colours(features: torch.Tensor) -> Image.Image:
    """Features (g*g, C) of one image: their three main directions as red, green and blue."""
    x = features.double() - features.double().mean(0)
    _, _, directions = torch.linalg.svd(x, full_matrices=False)
    shown = x @ directions[:3].T
    shown = (shown / shown.abs().amax(0) + 1) / 2
    side = round(len(x) ** 0.5)
    return Image.fromarray((shown.reshape(side, side, 3).numpy() * 255).astype(np.uint8))


def main() -> None:
    """Read the folders, draw, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--demo", type=Path, required=True)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("overview.png"))
    args = parser.parse_args()

    (meta,) = (args.demo / "faces").glob("astronaut-*.json")
    (face,) = (args.demo / "faces").glob("astronaut-*.jpg")
    photo = Image.open(args.demo / "photos" / "astronaut.png").convert("RGB")
    box = json.loads(meta.read_text(encoding="utf-8"))["box"]
    ImageDraw.Draw(photo).rectangle(box, outline=(255, 200, 0), width=5)
    data = open_dataset(load_config(args.run / "config.yaml").data.path)
    number = next(n for n, key in enumerate(data.keys()) if key.startswith("astronaut"))
    pyramid = data.read([number], levels=("p4", "p8", "p16"))["pyramid"]

    top = [("photo", photo), ("aligned face", Image.open(face))]
    top += [(f"features {g}x{g}", colours(pyramid[g][0])) for g in (4, 8, 16)]
    sheets: list[tuple[str, Image.Image]] = []
    for name in ("4x4", "8x8", "16x16"):
        files = json.loads((args.run / name / "result.json").read_text(encoding="utf-8"))["files"]
        for kind, caption in (("final", "generated"), ("real", "real")):
            image = Image.open(args.run / name / files[kind]).convert("RGB")
            sheets.append((f"{caption} {name}", image.crop((0, 0, *[min(image.size)] * 2))))
        curve = Image.open(args.run / name / files["loss_curve"]).convert("RGB")

    height = 2 * (TILE + CAPTION) + round(WIDTH * 0.42)
    sheet = Image.new("RGB", (WIDTH, height + MARGIN), "white")
    draw = ImageDraw.Draw(sheet)

    def place(image: Image.Image, caption: str, left: int, y: int, side: int) -> None:
        small = image.width < side
        how = Image.Resampling.NEAREST if small else Image.Resampling.LANCZOS
        sheet.paste(image.convert("RGB").resize((side, side), how), (left, y + CAPTION))
        draw.text((left, y + 4), caption, fill="black", font=FONT)

    step = (WIDTH - 2 * MARGIN + 20) // 5
    for n, (caption, image) in enumerate(top):
        place(image, caption, MARGIN + n * step, 0, TILE)
    y = TILE + CAPTION + 10
    side = 175
    for n, (caption, image) in enumerate(sheets):
        place(image, caption, MARGIN + n // 2 * (side + 12), y + n % 2 * (side + CAPTION), side)
    room = WIDTH - 2 * MARGIN - 3 * (side + 12)
    scale = min(room / curve.width, (2 * side + CAPTION) / curve.height)
    curve = curve.resize((round(curve.width * scale), round(curve.height * scale)))
    sheet.paste(curve, (WIDTH - MARGIN - curve.width, y + CAPTION))
    sheet = sheet.crop((0, 0, WIDTH, y + 2 * (side + CAPTION) + 10))
    png = io.BytesIO()
    sheet.quantize(256).save(png, "PNG", optimize=True)
    write_bytes(args.out, png.getvalue())


if __name__ == "__main__":
    main()
