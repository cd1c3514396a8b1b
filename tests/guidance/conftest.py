"""Discs with native features of two guides: a tiny random network, and the pixels themselves."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dinogen.config import GuideConfig
from dinogen.features.dinov2 import make_random_dinov2
from dinogen.features.load import load_guide
from dinogen.features.pyramid import native_pyramid
from tests.families.tiny import RESOLUTION, discs, pack_discs

GRIDS = (RESOLUTION // 2, RESOLUTION)


@pytest.fixture(scope="session")
def two_guides(tmp_path_factory) -> Path:
    """Packed discs; the guide that made their main features lies beside them."""
    folder = tmp_path_factory.mktemp("guidance")
    make_random_dinov2(folder / "guide", seed=0, hidden_size=16, num_layers=1, num_heads=2)
    guides = {
        "": load_guide(GuideConfig(path=str(folder / "guide")), torch.device("cpu")),
        "pixels.": load_guide(GuideConfig(name="pixels"), torch.device("cpu")),
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
