"""Options that make each family small enough for tests, and configs to train it on discs."""

from __future__ import annotations

import copy
import io
from pathlib import Path

import numpy as np
from PIL import Image

from dinogen.config import Config, parse_config
from shards.format.sample import Sample
from shards.write.shard_writer import pack

RESOLUTION = 16
BATCH = 8

_UNET = {
    "base_channels": 8,
    "channel_multipliers": [1, 2],
    "num_blocks": 1,
    "attention_resolutions": [8],
    "head_channels": 8,
}
_DIT = {
    "network": "dit",
    "dit": {"width": 16, "depth": 2, "num_heads": 2, "patch": 4, "num_registers": 1},
}
_RCG = {"level": "n16", "channels": 32, "width": 16, "depth": 2, "steps": 2}
# Of the autoencoder whose latents the discs have.
LATENT = {"channels": 3, "factor": 4}
# By family; what follows a hyphen is a variant of it.
TINY = {
    "dcgan": {"z_dim": 8, "ngf": 4, "ndf": 4},
    "wgan_gp": {"z_dim": 8, "channels": 4, "channel_max": 8},
    "sagan": {"z_dim": 8, "channels": 8, "channel_max": 8, "attention": [8]},
    "progressive_gan": {"z_dim": 8, "channel_base": 64, "channel_max": 8},
    "stylegan2_ada": {"z_dim": 8, "w_dim": 8, "channel_base": 128, "channel_max": 8},
    "vae": {"latent": 8, "base_channels": 8},
    "vae-spatial": {"latent": 2, "latent_side": 4, "base_channels": 8, "beta": 1e-3},
    "vae_gan": {"latent": 8, "base_channels": 8, "d_layers": 1, "d_channels": 8},
    "ddpm": {**_UNET, "num_steps": 50, "sample_steps": 4},
    "ddpm-edm": {**_UNET, "prediction": "edm", "sample_steps": 4},
    "ddpm-snr": {**_UNET, "num_steps": 50, "sample_steps": 4, "min_snr": 5},
    "ddpm-dit": {**_DIT, "num_steps": 50, "sample_steps": 4},
    "flow": {**_UNET, "sample_steps": 4},
    "flow-dit": {**_DIT, "sampler": "midpoint", "sample_steps": 3},
    "ddpm-rcg": {**_DIT, "num_steps": 50, "sample_steps": 4, "representation": _RCG},
    "flow-rcg": {**_UNET, "sample_steps": 2, "representation": _RCG},
    "ddpm-repa": {
        **_DIT,
        "num_steps": 50,
        "sample_steps": 4,
        "repa": {"layer": 1, "level": "n4", "channels": 32, "hidden": 8},
    },
    "flow-repa": {
        **_UNET,
        "sample_steps": 4,
        "repa": {"layer": 1, "level": "n16", "channels": 32, "hidden": 8, "until_kimg": 0.016},
    },
    "ddpm-latent": {
        **_DIT,
        "dit": _DIT["dit"] | {"patch": 2},
        "prediction": "edm",
        "sample_steps": 4,
        "latent": {**LATENT, "sample": "mean"},
    },
    "flow-latent": {
        **_UNET,
        "attention_resolutions": [2],
        "sample_steps": 4,
        "latent": LATENT,
    },
    "guided": {
        "z_dim": 8,
        "channel_base": 64,
        "channel_max": 16,
        "probe_samples": 4,
        "objectives": [{"name": "mse"}],
    },
    "guided-dit": {
        "generator": "dit",
        "dit": _DIT["dit"],
        "num_classes": 2,
        "samples_per_class": 4,
        "guidance_range": [1, 4],
        "guidance": 1.5,
        "reference_batch": 6,
        "probe_samples": 4,
        "objectives": [
            {
                "name": "drift",
                "views": ["location", "global", "mean_std", "patches"],
                "normalize": "together",
            }
        ],
    },
}


def tiny_config(family: str, data: Path, run: Path, *overrides: str) -> Config:
    """A run of four steps of a family or a variant; ``overrides`` as on the command line."""
    base = {
        "run": str(run),
        "data": {"path": str(data), "num_threads": 0},
        "guide": {"path": str(data.parent / "guide")},
        "family": {"name": family.partition("-")[0], **copy.deepcopy(TINY[family])},
        "stages": [{"resolution": RESOLUTION, "kimg": 0.032, "batch": BATCH, "lr": 1e-3}],
        # Adam would blow up gradients that are zero but for rounding: a hinge critic's last bias
        "optim": {"eps": 1e-5},
        "checkpoint": {"every_kimg": 1},
        "log": {"every_kimg": 0.008, "probe_kimg": 1, "samples_kimg": 1, "num_samples": 4},
    }
    return parse_config(base, overrides)


def discs(num: int, size: int = RESOLUTION) -> list[np.ndarray]:
    """Images (size, size, 3) uint8 of a bright disc on a dark ground."""
    rng = np.random.default_rng(0)
    yy, xx = np.mgrid[:size, :size] / size
    images = []
    for _ in range(num):
        cx, cy, radius = [*rng.uniform(0.3, 0.7, 2).tolist(), rng.uniform(0.15, 0.3)]
        inside = (xx - cx) ** 2 + (yy - cy) ** 2 < radius**2
        pixels = np.where(inside[..., None], rng.integers(128, 255, 3), rng.integers(0, 100, 3))
        images.append(pixels.astype(np.uint8))
    return images


def pack_discs(
    folder: Path,
    levels: list[dict[str, np.ndarray]] | None = None,
    size: int = RESOLUTION,
    **more,
) -> None:
    """24 discs with labels 0 and 1, a quarter of them held out."""
    samples = []
    for number, pixels in enumerate(discs(24, size)):
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "PNG")
        own = levels[number] if levels else {}
        name = f"disc{number:03d}"
        samples.append(Sample(name, file.getvalue(), "png", {}, own, label=number % 2))
    pack(samples, folder, **{"shard_size": 8, "val_fraction": 0.25} | more)
