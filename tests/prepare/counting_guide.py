"""A guide that counts the photos it is asked for, settings of its pyramids, and photos."""

from __future__ import annotations

import io
import json

import numpy as np
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.numpy import save_file

from dinogen.config import PyramidsConfig
from dinogen.prepare.parts import PartFiles

CPU = torch.device("cpu")
CONFIG = PyramidsConfig(batch=2, shard_size=3)


class Counting:
    """The guide, counting photos."""

    def __init__(self, guide):
        self.guide, self.info, self.num_photos = guide, guide.info, 0

    def input_size(self, grid):
        return self.guide.input_size(grid)

    def __call__(self, images):
        self.num_photos += len(images)
        return self.guide(images)


def random_photo(seed, size=32, file_format="PNG"):
    pixels = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).resize((size, size), Image.Resampling.BICUBIC).save(buffer, file_format)
    return buffer.getvalue()


def whole(folder):
    """Every level of every face."""
    parts = PartFiles(folder)
    return {
        (key, name): array
        for key in sorted(parts.keys())
        for name, array in parts.levels(key).items()
    }


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


def same(a, b):
    return a.keys() == b.keys() and all(np.array_equal(a[key], b[key]) for key in a)


def as_an_older_version_wrote_it(out):
    """Without sums of each face; the bytes of all parts."""
    for path in out.iterdir():
        with safe_open(path, "numpy") as file:
            header = json.loads(file.metadata()["dinogen"])
            tensors = {name: file.get_tensor(name) for name in sorted(file.keys())}
        del header["sums"]
        save_file(tensors, path, {"dinogen": json.dumps(header)})
    return {path: path.read_bytes() for path in out.iterdir()}
