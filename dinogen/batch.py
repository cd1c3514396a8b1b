"""What one training step passes around: a batch, losses by name, features by level."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from shards.read import types as shards

# Losses, or values that are only reported, by name.
Scalars = dict[str, Tensor]
# The losses that are trained on, summed; and what is only reported.
Losses = tuple[Scalars, Scalars]
# Features by level, such as "p8" or "pixels.p8": (N, places, C).
Features = dict[str, Tensor]


class Batch(shards.Batch, total=False):
    """What is read of B samples, and what a training step adds to it.

    Images are augmented. On the device, all but ``position``, which stays on the CPU.

    Attributes:
        bank: further samples that a step reads, levels alone; see ``Inputs.bank``.
        gradient_cache: of a microbatch whose losses look at the whole global batch; see
            :class:`GradientCache`.
    """

    bank: Batch
    gradient_cache: GradientCache


@dataclass(frozen=True)
class GradientCache:
    """What losses that compare distributions come to over a global batch.

    Attributes:
        gradients: of the summed losses to each feature of some samples.
        losses: by the terms' titles.
        report: what else is worth a curve.
    """

    gradients: Features
    losses: Scalars
    report: Scalars

    def rows(self, first: int, end: int) -> GradientCache:
        """The same of some of the samples."""
        part = {level: gradient[first:end] for level, gradient in self.gradients.items()}
        return GradientCache(part, self.losses, self.report)
