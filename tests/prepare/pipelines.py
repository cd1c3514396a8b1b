"""Photos of every kind of name, prepared in one pass, by a call and as it is typed."""

from __future__ import annotations

import numpy as np
import torch
import typer
from PIL import Image
from typer.testing import CliRunner

from dinogen.config import parse_config
from dinogen.prepare import pipeline
from dinogen.prepare.pyramid import PyramidMaker
from launch.cli import prepare as commands

CPU = torch.device("cpu")
SETTINGS = {
    "faces": {"size": 32, "detect": "none", "max_duplicate_distance": 2},
    "pyramids": {"batch": 4, "shard_size": 3},
    "pack": {"shard_size": 3, "val_fraction": 0.3},
}
# The order of these paths is not that of their keys, and three of them share a stem.
NAMES = [
    "b.jpg",
    "b.png",
    "Zoë 1.png",
    "a/b.png",
    "a-b.jpg",
    "a.jpg",
    "z/é/ü.jpg",
    "10.jpg",
    "9.jpg",
]
NAMES += [f"many/{number}.png" for number in range(9)]


def settings(**changes):
    values = {name: {**section, **changes.get(name, {})} for name, section in SETTINGS.items()}
    return parse_config({"prepare": values}).prepare


def random_photo(seed):
    pixels = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((48, 40), Image.Resampling.BICUBIC)


def fill(folder):
    for seed, name in enumerate(NAMES):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        random_photo(seed).save(path)
    random_photo(2).save(folder / "many/0-again.png")
    (folder / "many/5-empty.jpg").write_bytes(b"")
    return folder


def run(photos, data, guide, config=None, progress=None):
    config = config or settings()
    maker = PyramidMaker(guide, config.pyramids, CPU) if guide else None
    return pipeline.prepare(photos, data, config, maker, progress=progress)


def dinogen(*arguments):
    app = typer.Typer()
    commands.register(app)
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def contents(data):
    return {
        path.name: path.read_bytes()
        for path in data.iterdir()
        if path.suffix == ".tar" or path.name in ("manifest.json", "rejected.csv")
    }
