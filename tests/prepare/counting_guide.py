"""A guide that counts the pictures it is asked for, settings of its pyramids, and pictures."""

from __future__ import annotations

import io

import numpy as np
import torch
from PIL import Image

from dinogen.config_prepare import PyramidsConfig

CPU = torch.device("cpu")
CONFIG = PyramidsConfig(batch=2, shard_size=3)


class Counting:
    """The guide, counting pictures."""

    def __init__(self, guide):
        self.guide, self.info, self.num_pictures = guide, guide.info, 0

    def input_size(self, grid):
        return self.guide.input_size(grid)

    def __call__(self, images):
        self.num_pictures += len(images)
        return self.guide(images)


def picture(seed, size=32, file_format="PNG"):
    pixels = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).resize((size, size), Image.Resampling.BICUBIC).save(buffer, file_format)
    return buffer.getvalue()
