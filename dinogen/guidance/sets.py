"""Features of a level as sets of samples: views, conditions, and how ranks share them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from dinogen.distributed.process_group import Ranks
from dinogen.losses.distributions import Coordinates

View = Literal["location", "global"]
# Embeddings that generated and real samples are conditioned on: (N, E) and (M, E).
Conditions = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Spread:
    """How a comparison is spread over ranks: each has all samples, at its share of the locations.

    Attributes:
        ranks: over which it is spread.
        num_locations: of each level, on all ranks together.
        num_conditions: dimensions of the embeddings, also spread; 0 if there are none.
    """

    ranks: Ranks
    num_locations: Mapping[str, int]
    num_conditions: int = 0

    def coordinates(self, level: str, num_channels: int) -> Coordinates:
        """This rank's coordinates of view ``global``: of its locations, then of the conditions."""
        ranks, num = self.ranks, self.num_locations[level]
        own, total = ranks.share(num), num * num_channels
        held = [slice(own.start * num_channels, own.stop * num_channels)]
        if self.num_conditions:
            more = ranks.share(self.num_conditions)
            held.append(slice(total + more.start, total + more.stop))
        total += self.num_conditions
        return Coordinates(total, tuple(held), ranks.rank, ranks.num, ranks.sum)

    def whole(
        self, level: str, sides: tuple[Tensor, Tensor], conditions: Conditions | None
    ) -> tuple[tuple[Tensor, Tensor], Conditions | None]:
        """Generated and real samples, and their conditions, gathered from all ranks."""
        num, ranks = self.num_locations[level], self.ranks
        sides = (ranks.whole(sides[0], num), ranks.whole(sides[1], num))
        if conditions is not None:
            ours, theirs = (
                ranks.whole(given[:, :, None], self.num_conditions)[..., 0] for given in conditions
            )
            conditions = (ours, theirs)
        return sides, conditions


def problems(features: Tensor, view: View) -> Tensor:
    """Features (N, locations, C) as sets: (locations, N, C), or one of (1, N, locations * C)."""
    return features.transpose(0, 1) if view == "location" else features.flatten(1)[None]


def append_conditions(features: Tensor, conditions: Tensor, num: int, factor: float) -> Tensor:
    """(1, N, D) features with (N, E) conditions, which weigh as many dimensions as the features.

    Distances are divided by the root of all dimensions, so both keep their weights.

    Args:
        features: or this rank's share of them.
        conditions: or this rank's share of them.
        num: D, of all ranks.
        factor: sqrt((D + E) / D).
    """
    return torch.cat([features, conditions[None] * math.sqrt(num)], 2).mul_(factor)


@contextmanager
def full_precision() -> Iterator[None]:
    """Context in which GPUs multiply float32 as such, also where TF32 is chosen for networks."""
    settings = torch.backends.cuda.matmul
    before = settings.fp32_precision
    settings.fp32_precision = "ieee"
    try:
        yield
    finally:
        settings.fp32_precision = before
