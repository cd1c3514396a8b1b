"""What looks are made from: one checkpoint's averages, a seed, and the pictures it learnt from."""

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
from dinogen.visualize.nearest import Nearest, Ruler, choose_ruler, nearest_of, real_pictures
from shards.errors import ShardsError
from shards.read.dataset import Dataset

NUM_DRAWN = 128
NUM_HELD_OUT = 64
# latents and pictures of one part fit where a training step did
PIXELS_PER_PART = 64 * 64 * 64


class LeftOut(Exception):
    """A look that this run does not have; says why."""


@dataclass(frozen=True)
class Look:
    """One picture for people, or one animation if there are several sheets.

    Attributes:
        sheets: what it is made of.
        caption: what it shows, in a sentence.
    """

    sheets: tuple[Sheet, ...]
    caption: str


Maker = Callable[["Scene"], Look]


class Scene:
    """A snapshot under a seed.

    Args:
        snapshot: whose averages are looked at.
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
        """Pictures (N, 3, R, R) in [-1, 1] on the CPU, in parts."""
        size = max(1, min(64, PIXELS_PER_PART // self.resolution**2))
        parts = zip(latents.split(size), indices.split(size), strict=True)
        decode, networks = self.family.decode, self.networks
        images = [decode(networks, z, numbers, self.seed, psi).cpu() for z, numbers in parts]
        return torch.cat(images)

    @cached_property
    def drawn(self) -> Tensor:
        """Pictures of the first 128 sample numbers, (N, 3, R, R) in [-1, 1] on the CPU."""
        indices = torch.arange(NUM_DRAWN)
        return self.decode(self.latents(indices), indices)

    @cached_property
    def opinions(self) -> Tensor | None:
        """How real the discriminator finds what is :attr:`drawn`, (N,); None without one."""
        family, snapshot = self.family, self.snapshot
        if not isinstance(family, HasCritic):
            return None
        rest = set(family.networks) - set(self.networks)
        for name in rest:
            # a snapshot has loaded the averages alone
            family.networks[name].load_state_dict(snapshot.checkpoint.tensors(name))
        plan, nimg = snapshot.plan, snapshot.nimg
        fade(family, family.networks, plan.alpha(nimg), plan.fading(nimg))
        found = family.realism(self.drawn.to(family.device))
        return None if found is None else found.cpu()

    @cached_property
    def ruler(self) -> Ruler:
        """By what pictures are near each other."""
        return choose_ruler(self.family.config.metrics, self.resolution, self.family.device)

    @cached_property
    def data(self) -> Dataset:
        """What the run was trained on.

        Raises:
            LeftOut: it is not there any more, or is another.
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
            raise LeftOut(f"the data of the run are needed: {error}") from None
        return data

    @cached_property
    def nearest(self) -> tuple[Nearest, float | None]:
        """Training pictures nearest to what is :attr:`drawn`, and how near those held out are.

        The second is the median over pictures of ``val`` of the distance to their nearest; None if
        there are none, or they are what was trained on. Mirrored pictures count where training
        showed them.

        Raises:
            LeftOut: as :attr:`data`.
        """
        config, ruler, data = self.family.config, self.ruler, self.data
        split = config.data.split
        num_val = data.num_samples("val") if split != "val" else 0
        rows = [ruler.rows(self.drawn)]
        if num_val:
            chosen = np.linspace(0, num_val - 1, min(num_val, NUM_HELD_OUT)).astype(int).tolist()
            rows.append(ruler.rows(real_pictures(data, chosen, "val", ruler.side)))
        found = nearest_of(torch.cat(rows), ruler, data, split, config.augment.flip > 0)
        num = len(self.drawn)
        usual = float(found.distances[num:, 0].median()) if num_val else None
        ours = (found.distances[:num], found.numbers[:num], found.mirrored[:num])
        return Nearest(*ours, num=found.num), usual
