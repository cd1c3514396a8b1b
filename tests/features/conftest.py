"""Tiny DINOv2 checkpoints with weights of every kind unlike zero, and a linear guide."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from dinogen._torchvision import ensure_torchvision
from dinogen.features.base import GuideInfo

ensure_torchvision()

PATCH = 14
NUM_LAYERS = 3
HIDDEN = 32


class PatchGuide:
    """A guide one can compute by hand: a fixed linear map of every 5x5 patch."""

    info = GuideInfo("patch", "tests", None, "0" * 64, 6, -1, True)

    def __init__(self, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.weight = torch.randn(6, 3, 5, 5, generator=generator) / 8

    def input_size(self, grid: int) -> int:
        return 5 * grid

    def __call__(self, images):
        return torch.nn.functional.conv2d(images, self.weight, stride=5)


@pytest.fixture
def patch_guide() -> PatchGuide:
    return PatchGuide()


def build_checkpoint(folder: Path, num_registers: int, **changes) -> None:
    """Save a tiny DINOv2; transformers' own initial zeros would hide whole terms."""
    import transformers

    shape = {
        "hidden_size": HIDDEN,
        "num_hidden_layers": NUM_LAYERS,
        "num_attention_heads": 2,
        "patch_size": PATCH,
        "image_size": 5 * PATCH,
        **changes,
    }
    torch.manual_seed(num_registers)
    if num_registers:
        model = transformers.Dinov2WithRegistersModel(
            transformers.Dinov2WithRegistersConfig(num_register_tokens=num_registers, **shape)
        )
    else:
        model = transformers.Dinov2Model(transformers.Dinov2Config(**shape))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(folder)


@pytest.fixture(scope="session")
def make_checkpoint() -> Callable[..., None]:
    return build_checkpoint


@pytest.fixture(scope="session", params=[0, 4], ids=["plain", "registers"])
def checkpoint(request, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("dinov2") / "checkpoint"
    build_checkpoint(folder, request.param)
    return folder


@pytest.fixture(scope="session")
def assets() -> Path:
    default = Path(__file__).parents[3] / "shared" / "assets"
    folder = Path(os.environ.get("DINOGEN_ASSETS", default))
    if not (folder / "inception").is_dir():
        pytest.skip(f"no measuring data at {folder}: set DINOGEN_ASSETS")
    return folder
