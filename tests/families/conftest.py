"""Labelled discs with the features of a tiny random guide, and latents, for every family."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dinogen.config import GuideConfig
from dinogen.features.dinov2 import make_random_dinov2
from dinogen.features.load import load_guide
from dinogen.features.pyramid import native_pyramid
from tests.families.stored_latents import posteriors, write_autoencoder
from tests.families.tiny import RESOLUTION, discs, pack_discs


@pytest.fixture(scope="session")
def disc_data(tmp_path_factory) -> Path:
    """Packed discs; the guide and the autoencoder that made their levels lie beside them."""
    folder = tmp_path_factory.mktemp("families")
    make_random_dinov2(folder / "guide", seed=0, hidden_size=32, num_layers=2, num_heads=2)
    guide = load_guide(GuideConfig(path=str(folder / "guide")), torch.device("cpu"))
    autoencoder = write_autoencoder(folder)
    levels = []
    for pixels in discs(24):
        image = torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 127.5 - 1
        with torch.no_grad():
            pyramid = native_pyramid(guide, image, (RESOLUTION, 4))
        native = {f"n{grid}": v[0].half().numpy() for grid, v in pyramid.items()}
        levels.append(native | posteriors(autoencoder, pixels))
    latents = dict.fromkeys(("latents", "latents_flipped"), autoencoder.info)
    pack_discs(folder / "data", levels, guide=guide.info.to_dict(), guides=latents)
    return folder / "data"
