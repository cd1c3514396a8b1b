"""Batches by class: which samples are compared, and how strongly each class is exaggerated."""

from __future__ import annotations

import torch
from torch import Tensor

from dinogen.batch import Features
from dinogen.distributed import rng
from dinogen.guidance.options import GuidedOptions
from dinogen.guidance.sets import Groups
from dinogen.losses.drifting import unconditional_weight

# With this power of the strength, its density is that of a uniform logarithm.
_UNIFORM_LOG = 1.0


class ClassBatches:
    """A batch as groups of one class each, n generated samples and n real ones.

    Each group has a strength of guidance, alpha. Its density is proportional to alpha to the power
    of ``-guidance_power`` (Deng et al. 2026, "Generative Modeling via Drifting", as public
    re-implementations have it). It follows from the seed and the group's first position.

    Args:
        options: of the run, with ``num_classes``.
        seed: of the run.
        batch: size of the global batch.
        start: position of the first sample of the stage.

    Attributes:
        num_groups: in a batch.
    """

    def __init__(self, options: GuidedOptions, seed: int, batch: int, start: int) -> None:
        self.options = options
        self.seed = seed
        self.start = start
        self.num = options.samples_per_class
        self.num_groups = batch // self.num

    def guidance(self, positions: Tensor) -> Tensor:
        """The strengths (B,) float32 that samples at these positions are generated with."""
        first = positions - (positions - self.start) % self.num
        low, high = self.options.guidance_range
        share = rng.uniform(self.seed, "guidance", first, device=positions.device)
        rest = _UNIFORM_LOG - self.options.guidance_power
        if not rest:
            return low * (high / low) ** share
        found: Tensor = (low**rest + share * (high**rest - low**rest)) ** (1 / rest)
        return found

    def groups(self, first: int, negatives: Features | None, device: torch.device) -> Groups:
        """How the global batch from position ``first`` is compared.

        Args:
            first: of the batch.
            negatives: real samples of any class, (L, locations, C) by level.
            device: where the comparison is made.
        """
        if negatives is None:
            return Groups(self.num_groups)
        # computed there: nothing is copied
        starts = torch.arange(self.num_groups, device=device) * self.num + first
        num = len(next(iter(negatives.values())))
        weights = unconditional_weight(self.guidance(starts), self.num, num)
        return Groups(self.num_groups, negatives, weights)
