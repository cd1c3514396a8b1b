"""What visualizations are drawn from: one checkpoint's EMA weights, a seed, the training images."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from dinogen.config import ConfigError
from dinogen.families.abilities import HasCritic, fade
from dinogen.report.images import Sheet
from dinogen.training.checkpointing.checkpoint import check_same_data
from dinogen.training.checkpointing.snapshot import Snapshot
from dinogen.training.data import data_fingerprint, open_data
from dinogen.visualize.nearest import Nearest, Ruler, choose_ruler, nearest_of, real_images
from shards.errors import ShardsError
from shards.read.dataset import Dataset

NUM_DRAWN = 128
NUM_HELD_OUT = 64
# parts of this size fit into the memory that a training step needs
PIXELS_PER_PART = 64 * 64 * 64


class LeftOut(Exception):
    """A visualization is not possible for this run; the message says why."""


@dataclass(frozen=True)
class Visualization:
    """One image, or one animation if there are several sheets.

    Attributes:
        sheets: the image, or the frames.
        caption: what it shows, in a sentence.
    """

    sheets: tuple[Sheet, ...]
    caption: str


Maker = Callable[["Scene"], Visualization]


class Scene:
    """A snapshot under a seed.

    Args:
        snapshot: its EMA weights are used.
        seed: of all latents.
    """

    def __init__(self, snapshot: Snapshot, seed: int) -> None:
        self.snapshot = snapshot
        self.seed = seed
        self.family = snapshot.family
        self.networks = snapshot.ema.networks
        self.resolution = snapshot.resolution

    def latents(self, indices: Tensor) -> Tensor:
        """Latents (N, ...) of sample numbers (N,)."""
        return self.family.latents(indices, self.seed)

    @torch.no_grad()
    def decode(self, latents: Tensor, indices: Tensor, psi: float = 1.0) -> Tensor:
        """Images (N, 3, R, R) in [-1, 1] on the CPU, in parts."""
        size = max(1, min(64, PIXELS_PER_PART // self.resolution**2))
        parts = zip(latents.split(size), indices.split(size), strict=True)
        decode, networks = self.family.decode, self.networks
        images = [decode(networks, z, numbers, self.seed, psi).cpu() for z, numbers in parts]
        return torch.cat(images)

    @cached_property
    def drawn(self) -> Tensor:
        """Images of the first 128 sample numbers, (N, 3, R, R) in [-1, 1] on the CPU."""
        indices = torch.arange(NUM_DRAWN)
        return self.decode(self.latents(indices), indices)

    @cached_property
    def opinions(self) -> Tensor | None:
        """How real the discriminator rates :attr:`drawn`, (N,); None without a discriminator."""
        family, snapshot = self.family, self.snapshot
        if not isinstance(family, HasCritic):
            return None
        rest = set(family.networks) - set(self.networks)
        if not all(snapshot.checkpoint.holds(name) for name in rest):
            return None
        for name in rest:
            # a snapshot only loads the EMA weights
            family.networks[name].load_state_dict(snapshot.checkpoint.tensors(name))
        fade(family, family.networks, snapshot.alpha, snapshot.fading)
        found = family.realism(self.drawn.to(family.device))
        return None if found is None else found.cpu()

    @cached_property
    def ruler(self) -> Ruler:
        """The distance between images."""
        return choose_ruler(self.family.config.metrics, self.resolution, self.family.device)

    @cached_property
    def data(self) -> Dataset:
        """The training data of the run.

        Raises:
            LeftOut: the data are missing, or are not those it was trained on.
        """
        config = self.family.config
        try:
            data = open_data(config)
            check_same_data(
                self.snapshot.checkpoint,
                config,
                data_fingerprint(data),
                "give data.path= the shards that it was trained on",
            )
        except (ConfigError, ShardsError, OSError) as error:
            raise LeftOut(f"the run's data are required: {error}") from None
        return data

    @cached_property
    def nearest(self) -> tuple[Nearest, float | None]:
        """The training images nearest to :attr:`drawn`, and how near held-out images are.

        The second is the median distance of ``val`` images to their nearest training image; None
        without such images, or if ``val`` is the training split. Mirrored training images count if
        training mirrored them.

        Raises:
            LeftOut: as :attr:`data`.
        """
        config, ruler, data = self.family.config, self.ruler, self.data
        split = config.data.split
        num_val = data.num_samples("val") if split != "val" else 0
        rows = [ruler.rows(self.drawn)]
        if num_val:
            chosen = np.linspace(0, num_val - 1, min(num_val, NUM_HELD_OUT)).astype(int).tolist()
            rows.append(ruler.rows(real_images(data, chosen, "val", ruler.side)))
        found = nearest_of(torch.cat(rows), ruler, data, split, config.augment.flip > 0)
        num = len(self.drawn)
        usual = float(found.distances[num:, 0].median()) if num_val else None
        ours = (found.distances[:num], found.numbers[:num], found.mirrored[:num])
        return Nearest(*ours, num=found.num), usual
