"""Photos with captions, guides and an embedder that are quick, and what was made of them."""

from __future__ import annotations

from collections import Counter

import numpy as np
import torch
from PIL import Image

from dinogen.config import GuideConfig, parse_config
from dinogen.features import GuideInfo, load_guide
from dinogen.prepare.pyramid import PyramidMaker
from shards import open_dataset

CPU = torch.device("cpu")
NUM = 11
CAPTIONS = {1: "a grey square", 4: "größer ", 5: "  two\nlines\n", 9: "x" * 4096}
SETTINGS = {
    "faces": {"size": 32, "detect": "none"},
    "pyramids": {"batch": 4, "shard_size": 3, "grids": [4, 8], "base_grid": 8},
    "pack": {"shard_size": 3, "val_fraction": 0.3},
}


class PatchGuide:
    """A fixed linear map of every patch; counts its calls."""

    def __init__(self, patch, channels):
        generator = torch.Generator().manual_seed(patch)
        self.weight = torch.randn(channels, 3, patch, patch, generator=generator) / patch
        self.patch = patch
        self.info = GuideInfo(
            "dinov2", f"patch{patch}", None, f"{patch:064d}", channels, [1, 2], False
        )
        self.calls = Counter()

    def input_size(self, grid):
        return self.patch * grid

    def __call__(self, images):
        self.calls[tuple(images.shape)] += 1
        return torch.nn.functional.conv2d(images, self.weight, stride=self.patch)


class Embedder:
    """Means of the photo's colours; of a caption, its length and first letter."""

    def __init__(self, weights="e", path="here"):
        self.info = {"name": "clip", "path": path, "revision": None, "weights_sha256": weights}
        self.info["mean"] = (0.5, 0.25)  # JSON knows no tuples
        self.seen = []

    def images(self, images):
        assert images.shape[1:] == (3, 32, 32) and images.abs().max() <= 1
        return torch.cat((images.mean((2, 3)), images.std((2, 3))), 1)

    def captions(self, captions):
        self.seen += captions
        return torch.tensor([[len(c), ord(c[0]), 1, 2, 3, 4] for c in captions]).float()


def settings(**changes):
    values = {name: {**section, **changes.get(name, {})} for name, section in SETTINGS.items()}
    return parse_config({"prepare": values}).prepare


def maker_of(**changes):
    parts = {
        "guide": PatchGuide(3, 5),
        "config": settings().pyramids,
        "device": CPU,
        "guides": {
            "pixels": load_guide(GuideConfig(name="pixels"), CPU),
            "wide": PatchGuide(2, 4),
        },
        "embedder": Embedder(),
    }
    return PyramidMaker(**(parts | changes))


def fill(folder):
    folder.mkdir()
    for number in range(NUM):
        pixels = np.random.default_rng(number).integers(0, 256, (6, 6, 3), dtype=np.uint8)
        photo = Image.fromarray(pixels).resize((48, 40), Image.Resampling.BICUBIC)
        photo.save(folder / f"f{number:02d}.jpg")
        if number in CAPTIONS:
            (folder / f"f{number:02d}.txt").write_text(CAPTIONS[number], encoding="utf-8")
    (folder / "f00x.jpg").write_bytes(b"")
    return folder


def photos_as_faces(photos):
    """Square photos, which need no cutting; captions stay beside them."""
    (photos / "f00x.jpg").unlink()
    for path in photos.glob("*.jpg"):
        with Image.open(path) as photo:
            square = photo.resize((32, 32))
        square.save(path)
    return photos


def contents(data):
    return {
        path.name: path.read_bytes()
        for path in data.iterdir()
        if path.name not in ("summary.json", "rejected.csv", "photos.csv")
    }


def all_samples(data):
    dataset = open_dataset(data)
    return [
        dataset.sample(number, split)
        for split in dataset.manifest.splits
        for number in range(dataset.num_samples(split))
    ]
