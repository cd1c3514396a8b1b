"""Tiny autoencoders on disk: diffusers' AutoencoderKL, and ours as `dinogen export` writes it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from dinogen._torchvision import ensure_torchvision
from dinogen.distributed import rng
from dinogen.networks.autoencoder import Autoencoder
from dinogen.runs.layout import EXPORTED_INFO

WEIGHTS = "diffusion_pytorch_model.safetensors"


def write_kl(folder: Path, seed: int = 0, **settings: Any) -> Path:
    """A folder of diffusers' AutoencoderKL with factor 4 and two channels.

    Args:
        folder: where.
        seed: of the weights.
        settings: further lines of config.json.

    Returns:
        The folder.
    """
    ensure_torchvision()
    from diffusers import AutoencoderKL

    with rng.torch_seed(seed, "kl"):
        model = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            block_out_channels=(8, 8, 8),
            norm_num_groups=4,
            latent_channels=2,
        )
    model.save_pretrained(folder)
    told = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(told | settings))
    return folder


def write_ours(
    file: Path, resolution: int = 16, latent: int = 3, latent_side: int = 4, seed: int = 0
) -> tuple[Path, Autoencoder]:
    """The file and the network in it; its metadata are those that are read."""
    arguments = {
        "resolution": resolution,
        "latent": latent,
        "base_channels": 8,
        "latent_side": latent_side,
    }
    with rng.torch_seed(seed, "vae"):
        G = Autoencoder(**arguments).eval()
        torch.nn.init.normal_(G.to_posterior.weight, std=0.5)
    network = {
        "name": "G",
        "class": "dinogen.networks.autoencoder.Autoencoder",
        "arguments": arguments,
    }
    info = {"random_guide": False, "network": network, "family": "vae"}
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file(G.state_dict(), file, {EXPORTED_INFO: json.dumps(info)})
    return file, G
