"""Discs with native features of two guides, and discriminators that look through a tiny one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dinogen.config import GuideConfig, StageConfig
from dinogen.features.dinov2 import make_random_dinov2
from dinogen.features.load import load_guide
from dinogen.features.pyramid import native_pyramid
from dinogen.guidance.discriminator import Adversary
from dinogen.guidance.options import DiscriminatorOptions
from tests.families.tiny import RESOLUTION, discs, pack_discs
from tests.guidance.discriminators import KINDS, SIDE

CPU = torch.device("cpu")
GRIDS = (RESOLUTION // 2, RESOLUTION)


@pytest.fixture(scope="session")
def two_guides(tmp_path_factory) -> Path:
    """Packed discs; the guide that made their main features is next to them."""
    folder = tmp_path_factory.mktemp("guidance")
    make_random_dinov2(folder / "guide", seed=0, hidden_size=16, num_layers=1, num_heads=2)
    guides = {
        "": load_guide(GuideConfig(path=str(folder / "guide")), CPU),
        "pixels.": load_guide(GuideConfig(name="pixels"), CPU),
    }
    levels = []
    for pixels in discs(24):
        image = torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 127.5 - 1
        with torch.no_grad():
            levels.append(
                {
                    f"{prefix}n{grid}": features[0].half().numpy()
                    for prefix, guide in guides.items()
                    for grid, features in native_pyramid(guide, image, GRIDS).items()
                }
            )
    pack_discs(
        folder / "data",
        levels,
        guide=guides[""].info.to_dict(),
        guides={"pixels": guides["pixels."].info.to_dict()},
    )
    return folder / "data"


@pytest.fixture(scope="module")
def main(tmp_path_factory):
    """Of a tiny random DINOv2, both layers."""
    folder = tmp_path_factory.mktemp("guides") / "dinov2"
    make_random_dinov2(folder, seed=0, hidden_size=24, num_layers=2, num_heads=2, image_size=42)
    return GuideConfig(path=str(folder), layer=(1, 2))


@pytest.fixture(scope="module")
def guide(main):
    return load_guide(main, CPU)


@pytest.fixture
def make(main, guide):
    """Builds a discriminator of one of the kinds, ready to use."""

    def build(kind="whole", side=SIDE, **options):
        torch.manual_seed(0)
        own = DiscriminatorOptions(**KINDS[kind], **options)
        stage = StageConfig(resolution=side, kimg=1)
        adversary = Adversary(own, main, stage, 11, CPU)
        adversary.begin(guide)
        return adversary

    return build
