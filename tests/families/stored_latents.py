"""Latents of discs as `dinogen prepare` stores them, made the naive way."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from dinogen.distributed import rng
from dinogen.features.autoencoder import FrozenAutoencoder, load_autoencoder
from dinogen.networks.autoencoder import Autoencoder
from tests.families.tiny import LATENT, RESOLUTION, discs, pack_discs
from tests.features.autoencoders import write_ours

CHANNELS, SIDE = LATENT["channels"], RESOLUTION // LATENT["factor"]


def posteriors(autoencoder: FrozenAutoencoder, pixels: np.ndarray) -> dict[str, np.ndarray]:
    """Mean and log variance of an image (R, R, 3) uint8 and of its mirror image, as levels."""
    image = torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 127.5 - 1
    found = {}
    for name, one in {"latents": image, "latents_flipped": image.flip(3)}.items():
        with torch.no_grad():
            both = torch.cat(autoencoder.encode(one), 1)
        side = both.shape[-1]
        found[f"{name}.n{side}"] = both.flatten(2).mT[0].half().numpy()
    return found


def make_autoencoder() -> FrozenAutoencoder:
    """Our own, in no file."""
    with rng.torch_seed(0, "vae"):
        G = Autoencoder(RESOLUTION, CHANNELS, base_channels=8, latent_side=SIDE)
    info = {"weights_sha256": "0" * 64, "num_channels": CHANNELS, "factor": LATENT["factor"]}
    return FrozenAutoencoder(G, info | {"random": True})


def write_autoencoder(folder: Path) -> FrozenAutoencoder:
    """Our own, in ``folder/vae.safetensors``."""
    file, _ = write_ours(folder / "vae.safetensors", latent=CHANNELS, latent_side=SIDE)
    return load_autoencoder(str(file), torch.device("cpu"))


def pack_latents(
    folder: Path, flips: bool = False, info: dict[str, Any] | None = None, **more: Any
) -> FrozenAutoencoder:
    """Packed discs with their latents in ``folder/data``; the autoencoder lies beside them."""
    autoencoder = write_autoencoder(folder)
    levels = [posteriors(autoencoder, pixels) for pixels in discs(24)]
    if not flips:
        levels = [{f"latents.n{SIDE}": one[f"latents.n{SIDE}"]} for one in levels]
    names = ("latents", "latents_flipped") if flips else ("latents",)
    pack_discs(
        folder / "data", levels, guides=dict.fromkeys(names, info or autoencoder.info), **more
    )
    return autoencoder
