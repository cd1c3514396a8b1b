"""Drawn discs with pyramids by a tiny random guide, and a config that trains on them."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image

from dinogen.config import GuideConfig
from shards.format.sample import Sample
from shards.write.shard_writer import pack

if TYPE_CHECKING:
    from dinogen.features.base import Guide

GRIDS = (4, 8)


def make(folder: Path, num: int) -> None:
    """``folder/guide`` and ``folder/data``, shards of 16."""
    guide = make_guide(folder / "guide")
    pack(draw(guide, num), folder / "data", shard_size=16, guide=guide.info.to_dict())


def make_guide(folder: Path) -> Guide:
    """A random guide that computes in no time, saved in ``folder``."""
    # it takes seconds to import, where it was not preloaded
    from dinogen.features.dinov2 import make_random_dinov2
    from dinogen.features.load import load_guide

    make_random_dinov2(folder, seed=0, hidden_size=32, num_layers=2, num_heads=2)
    return load_guide(GuideConfig(path=str(folder)), torch.device("cpu"))


def draw(guide: Guide, num: int) -> list[Sample]:
    """Bright discs on dark ground, 32x32 pixels."""
    from dinogen.features.pyramid import native_pyramid

    rng = np.random.default_rng(0)
    yy, xx = np.mgrid[:32, :32]
    samples = []
    for number in range(num):
        cx, cy, radius = rng.uniform(10, 22), rng.uniform(10, 22), rng.uniform(4, 10)
        inside = (xx - cx) ** 2 + (yy - cy) ** 2 < radius**2
        pixels = np.where(inside[..., None], rng.integers(128, 255, 3), rng.integers(0, 100, 3))
        file = io.BytesIO()
        Image.fromarray(pixels.astype(np.uint8)).save(file, "PNG")
        images = torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 127.5 - 1
        with torch.no_grad():
            levels = native_pyramid(guide, images, GRIDS)
        arrays = {f"n{grid}": value[0].half().numpy() for grid, value in levels.items()}
        samples.append(Sample(f"disc{number:03d}", file.getvalue(), "png", {}, arrays))
    return samples


def settings(data: Path, guide: Path) -> dict[str, Any]:
    """What all runs here have in common; stages, rhythms and ``run`` are still missing."""
    return {
        "data": {"path": str(data), "num_threads": 0},
        "guide": {"path": str(guide)},
        "family": {
            "name": "guided",
            "z_dim": 8,
            "channel_base": 64,
            "channel_max": 16,
            "probe_samples": 8,
        },
    }
