"""Photos saved for tests of faces, and what a folder of faces then holds."""

import csv

import numpy as np
from PIL import Image

# The astronaut's head
FACE = (slice(20, 240), slice(110, 330))


def save(path, pixels, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.ascontiguousarray(pixels)).save(path, **options)


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def rejected(out):
    with (out / "rejected.csv").open(encoding="utf-8", newline="") as file:
        return [tuple(row.values()) for row in csv.DictReader(file)]
