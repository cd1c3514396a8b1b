"""Runs of the family `ddpm` with random weights, as an import writes them."""

from __future__ import annotations

from pathlib import Path

import torch

from dinogen.formats.runs import Weights, write_run
from dinogen.networks.unet import UNet

RESOLUTION = 8
FAMILY = {
    "name": "ddpm",
    "base_channels": 16,
    "channel_multipliers": [1, 2],
    "num_blocks": 1,
    "attention_resolutions": [4],
    "head_channels": 8,
    "num_steps": 100,
    "sample_steps": 10,
    "unet": {"norm_groups": 4},
}
ARGUMENTS = ("base_channels", "channel_multipliers", "num_blocks", "attention_resolutions")


def disturbed(network, seed=0):
    """The network in eval mode, with no parameter left at its special start."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            scale = 0.05 if parameter.dim() > 1 else 0.1
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
    return network.eval()


def unet_with(weights):
    """Our U-Net with weights that were read."""
    family = weights.family
    network = UNet(
        weights.resolution,
        **{key: family[key] for key in (*ARGUMENTS, "num_classes")},
        head_channels=family.get("head_channels", 64),
        variant=family["unet"],
    )
    network.load_state_dict(weights.networks["G"])
    return network.eval()


def inputs(num=3, side=RESOLUTION):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(num, 3, side, side, generator=generator), torch.tensor([0, 50, 99])[:num]


def random_run(out: Path, seed: int = 0, **more) -> Path:
    """A run of a U-Net with random weights."""
    torch.manual_seed(seed)
    family = FAMILY | more
    network = UNet(
        RESOLUTION,
        **{key: family[key] for key in (*ARGUMENTS, "head_channels")},
        num_classes=family.get("num_classes", 0),
        variant=family["unet"] or {},
    )
    state = disturbed(network).state_dict()
    write_run(out, Weights(out, "test", family, RESOLUTION, {"G": state}, {"G": state}))
    return out
