"""A tiny packed dataset of drawn images, a tiny random DINOv2, and configs that train on them."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dinogen.config import Config, GuideConfig, parse_config
from dinogen.features.dinov2 import make_random_dinov2
from dinogen.features.load import load_guide
from dinogen.features.pyramid import native_pyramid, pooled_pyramid
from shards.format.sample import Sample
from shards.write.shard_writer import pack

NUM_SAMPLES = 40
GRIDS = (4, 8, 16)


@pytest.fixture(autouse=True)
def no_downloads(monkeypatch):
    """What measures asks nobody for weights, here and in other processes."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.fixture(scope="session")
def guide_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("guide") / "tiny"
    make_random_dinov2(folder, seed=0, hidden_size=32, num_layers=2, num_heads=2)
    return folder


@pytest.fixture(scope="session")
def data_folder(tmp_path_factory, guide_folder) -> Path:
    """40 images of 32x32 pixels: a bright disc on a dark ground, with their pyramids."""
    guide = load_guide(GuideConfig(path=str(guide_folder)), torch.device("cpu"))
    rng = np.random.default_rng(0)
    yy, xx = np.mgrid[:32, :32]
    samples = []
    for number in range(NUM_SAMPLES):
        cx, cy, radius = [*rng.uniform(10, 22, 2).tolist(), rng.uniform(4, 10)]
        inside = (xx - cx) ** 2 + (yy - cy) ** 2 < radius**2
        pixels = np.where(inside[..., None], rng.integers(128, 255, 3), rng.integers(0, 100, 3))
        file = io.BytesIO()
        Image.fromarray(pixels.astype(np.uint8)).save(file, "PNG")
        images = torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 127.5 - 1
        with torch.no_grad():
            levels = {f"p{g}": v for g, v in pooled_pyramid(guide, images, GRIDS).items()}
            levels |= {f"n{g}": v for g, v in native_pyramid(guide, images, GRIDS).items()}
        arrays = {name: value[0].half().numpy() for name, value in levels.items()}
        samples.append(Sample(f"disc{number:03d}", file.getvalue(), "png", {}, arrays))
    folder = tmp_path_factory.mktemp("data") / "discs"
    pack(samples, folder, shard_size=16, guide=guide.info.to_dict())
    return folder


@pytest.fixture
def make_config(tmp_path, data_folder, guide_folder):
    """Config of a run of stages 4 and 8 with 8 images a step; ``overrides`` as on the command
    line."""

    def make(*overrides: str, run: str = "run") -> Config:
        base = {
            "run": str(tmp_path / run),
            "data": {"path": str(data_folder), "num_threads": 0},
            "guide": {"path": str(guide_folder)},
            "family": {
                "name": "guided",
                "z_dim": 8,
                "channel_base": 64,
                "channel_max": 16,
                "probe_samples": 8,
                "objectives": [{"name": "mse"}],
            },
            "stages": [
                {"resolution": 4, "kimg": 0.08, "batch": 8, "lr": 0.01},
                {"resolution": 8, "kimg": 0.16, "fade_kimg": 0.08, "batch": 8, "lr": 0.01},
            ],
            "checkpoint": {"every_kimg": 0.024},
            "metrics": {"num_samples": 32, "num_bootstrap": 2},
            "log": {
                "every_kimg": 0.016,
                "probe_kimg": 0.04,
                "samples_kimg": 0.08,
                "num_samples": 4,
            },
        }
        return parse_config(base, overrides)

    return make
