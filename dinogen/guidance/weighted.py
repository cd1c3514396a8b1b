"""The weighted sum of a config's objectives: its losses, its floor, its held-out values."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dinogen.batch import Batch, Features, Losses, Scalars
from dinogen.guidance.gradient_cache import GlobalBatchObjective
from dinogen.guidance.guides import GuideSet
from dinogen.guidance.objectives import (
    AnyObjective,
    DistributionObjective,
    Energy,
    Mse,
    Paired,
    PairObjective,
    is_of,
    titles,
)
from dinogen.losses.features import collapse_floor

# Real images from which the floors of objectives between distributions are estimated.
_NUM_REALS = 512


class WeightedObjectives:
    """The objectives of one stage, over all microbatches and ranks.

    Args:
        objectives: as the config names them.
        guides: of the run; their levels are compared. They do not normalize features: each
            objective has its own way.
        seed: of the run.
        batch: size of the global batch.
        split: of the real images that the floors are estimated from.
        features: returns the features of a microbatch's generated images.
        conditions: see :class:`GlobalBatchObjective`.
    """

    def __init__(
        self,
        objectives: Sequence[AnyObjective],
        guides: GuideSet,
        seed: int,
        batch: int,
        split: str,
        features: Callable[[Batch], Features],
        conditions: Callable[[Batch], Tensor] | None = None,
    ) -> None:
        named = dict(zip(titles(objectives), objectives, strict=True))
        self.pairs = {name: one for name, one in named.items() if isinstance(one, PairObjective)}
        self.distributions = {
            name: one for name, one in named.items() if isinstance(one, DistributionObjective)
        }
        self.guides = guides
        self.global_batch = GlobalBatchObjective(
            self.distributions, guides.scales, seed, batch, features, conditions
        )
        # The same measure for every run, so that runs with different objectives can be compared.
        self.energy = GlobalBatchObjective(
            {"energy": Energy()}, guides.scales, seed, batch, features
        )
        self.floors = {
            name: one.weight * self._collapse_floor(one)
            for name, one in self.pairs.items()
            if isinstance(one, Mse)
        }
        if self.distributions and conditions is None:
            self.floors |= self.global_batch.floors(guides.read_real(_NUM_REALS, split))

    @property
    def paired(self) -> bool:
        """Whether z has to be a function of the sample's key."""
        return any(isinstance(one, Paired) for one in self.pairs.values())

    @property
    def floor(self) -> float | None:
        """The least value of the summed losses, where it is known.

        For ``mse`` it is the collapse floor, which the same image for every z reaches; for
        objectives between distributions it is what real images reach against other real images.
        """
        known = len(self.floors) == len(self.pairs) + len(self.distributions)
        return sum(self.floors.values()) if known else None

    def losses(self, batch: Batch, features: Features, keep: Tensor | None = None) -> Losses:
        """Weighted losses and other values to plot, as ``Phase.losses`` returns them.

        Args:
            batch: a microbatch, with the stored features of its real images.
            features: of its generated images.
            keep: (B,) bool, which of them are conditioned on their real images; default: all.
        """
        losses: Scalars = {}
        report: Scalars = {}
        if self.pairs:
            real = self.guides.real(batch)
            for name, one in self.pairs.items():
                kept = self._kept(one, keep)
                losses[name] = one.weight * one.error(features, real, self.guides.scales, kept)
        if self.distributions:
            more, report = self.global_batch.losses(batch, features)
            losses |= more
        return losses, report

    def held_out_pairs(self, features: Features, batch: Batch) -> Scalars:
        """Mean squared errors of samples that were not trained on, by name."""
        real = self.guides.real(batch)
        scales = self.guides.scales
        return {name: one.error(features, real, scales) for name, one in self.pairs.items()}

    def held_out_distributions(self, features: Features, batch: Batch) -> Scalars:
        """Energy distance between at least two generated samples and those of ``batch``.

        It is a mean over the samples of ``batch``.
        """

        def none(size: int, number: int) -> Tensor:
            raise AssertionError("energy has no directions")

        found = self.energy.compare(features, self.guides.real(batch), none)
        return {"energy": found.losses["energy"]}

    def _kept(self, one: PairObjective, keep: Tensor | None) -> Tensor | None:
        # Without a condition or a z of its own, a sample's best answer to its real image is the
        # mean. It is left to objectives between distributions, if they compare the same levels.
        compared = all(
            any(is_of(level, other.guides) for other in self.distributions.values())
            for level in self.guides.levels
            if is_of(level, one.guides)
        )
        return keep if compared and not isinstance(one, Paired) else None

    def _collapse_floor(self, one: PairObjective) -> float:
        floors, data = [], self.guides.data
        for level in self.guides.levels:
            if not is_of(level, one.guides):
                continue
            if one.normalize:
                variance = torch.from_numpy(data.level_variance(level))
                scale = self.guides.scales[level].cpu()
                floors.append(float((variance * scale.square()).mean()))
            else:
                floors.append(data.total_variance(level))
        return collapse_floor(floors)
