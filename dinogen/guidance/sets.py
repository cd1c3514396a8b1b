"""Features of a level as sets of samples: views, conditions, and how ranks share them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from dinogen.batch import Features
from dinogen.distributed.process_group import Ranks
from dinogen.losses.distributions import Coordinates

View = Literal["location", "global", "mean_std", "patches"]
PATCHES = (2, 4)
# Added to variances, whose root has no gradient at 0.
_LEAST_VARIANCE = 1e-6
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


@dataclass(frozen=True)
class Groups:
    """Samples that are compared with those of their own group alone, such as those of a class.

    Group i is the i-th run of equal length of the generated samples, and of the real ones.

    Attributes:
        num: how many there are.
        negatives: real samples that belong to no group and repel the generated ones of all, (L,
            locations, C) by level; None if there are none.
        weights: of one of them in each group, (num,); a generated sample has weight 1.
    """

    num: int
    negatives: Features | None = None
    weights: Tensor | None = None


def regrouped(values: Tensor, num: int) -> Tensor:
    """Samples of groups at several places (N, P, D) as problems (num * P, N / num, D), or back.

    Args:
        values: samples, group by group; or what this function made of them.
        num: groups.
    """
    split: Tensor = values.unflatten(0, (num, len(values) // num))
    return split.transpose(1, 2).flatten(0, 1)


def sets_of(view: View, grid: int) -> tuple[str, ...]:
    """Names of the sets that a view makes of a level, which count alike in the loss.

    Args:
        view: of an objective.
        grid: side of the level's grid.

    Raises:
        ValueError: no patch fits the grid.
    """
    if view == "mean_std":
        return ("mean", "std")
    if view != "patches":
        return (view,)
    sizes = [size for size in PATCHES if size < grid and grid % size == 0]
    if not sizes:
        raise ValueError(
            f"view patches: a grid of {grid}x{grid} is not cut into patches of 2x2 or 4x4: leave "
            "the view out, or compare a grid such as 4, 8 or 16"
        )
    return tuple(f"{what}_{size}" for size in sizes for what in ("mean", "std"))


def places_of(features: Tensor, view: View) -> dict[str, Tensor]:
    """Features of a grid (N, locations, C) as the sets of a view, each at one place or several.

    ``mean_std`` are mean and standard deviation over the grid, ``patches`` those of its patches of
    2x2 and 4x4 locations that are smaller than it (Deng et al. 2026, "Generative Modeling via
    Drifting", as public re-implementations have it). Deviations are the population's, with 1e-6
    added to the variance.

    Returns:
        (N, places, D) by the names of :func:`sets_of`.

    Raises:
        ValueError: no patch fits the grid.
    """
    if view == "location":
        return {view: features}
    if view == "global":
        return {view: features.flatten(1)[:, None]}
    grid = math.isqrt(features.shape[1])
    maps = features.unflatten(1, (grid, grid))
    found = {}
    for size in dict.fromkeys(name.partition("_")[2] for name in sets_of(view, grid)):
        side, suffix = int(size or grid), f"_{size}" if size else ""
        parts = maps.unflatten(2, (-1, side)).unflatten(1, (-1, side))
        mean = parts.mean((2, 4), keepdim=True)
        variance = (parts - mean).square().mean((2, 4))
        found[f"mean{suffix}"] = mean.flatten(1, 4)
        found[f"std{suffix}"] = (variance + _LEAST_VARIANCE).sqrt().flatten(1, 2)
    return found


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
