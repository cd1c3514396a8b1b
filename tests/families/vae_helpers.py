"""Autoencoder families built by hand, drawn images, and a few steps of a real engine."""

from __future__ import annotations

import torch

from dinogen.config import parse_config
from dinogen.distributed import rng
from dinogen.families.registry import family_class
from dinogen.training.engines import make_engine

CPU = torch.device("cpu")
SMALL = {"latent": 8, "base_channels": 16}


def build(name, *overrides, resolution=16):
    """The family as a stage builds it, but narrow."""
    family = {"name": name} | SMALL
    if name == "vae_gan":
        family |= {"d_layers": 2, "d_channels": 8}
    stages = [{"resolution": resolution, "kimg": 1, "batch": 8, "lr": 5e-3}]
    config = parse_config({"family": family, "stages": stages}, overrides)
    with rng.torch_seed(0, "init"):
        return family_class(config.family)(config, config.stages[0], CPU)


def drawn_images(num=8, size=16):
    """Discs of their own place, size and colours on grounds of their own."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.arange(size)[:, None] / size
    columns = torch.arange(size)[None, :] / size
    images = []
    for _ in range(num):
        x, y, r, *colours = torch.rand(9, generator=generator).tolist()
        inside = (columns - 0.3 - 0.4 * x) ** 2 + (rows - 0.3 - 0.4 * y) ** 2 < 0.15 * (0.3 + r)
        disc, ground = torch.tensor(colours[:3]), torch.tensor(colours[3:])
        images.append(torch.where(inside, disc[:, None, None], ground[:, None, None]) * 2 - 1)
    return torch.stack(images)


def batch_of(images, start=0):
    """As the trainer hands it to a phase."""
    positions = torch.arange(start, start + len(images))
    return {"image": images, "position": positions, "key": [str(p) for p in positions.tolist()]}


def train(family, images, num_steps):
    """Steps on the same images at growing positions, by the engine of one process."""
    engine = make_engine(family.config, family, family.stage.lr, CPU)
    engine.prepare()
    for step in range(num_steps):
        batch = batch_of(images, step * len(images))
        for phase in family.phases:
            losses, _ = engine.losses(phase, batch, last=True)
            engine.backward(phase, losses, 1.0)
            assert engine.step(phase).applied


def means(losses):
    """Plain numbers."""
    return {name: value.item() for name, value in losses.items()}
