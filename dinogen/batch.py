"""What one training step passes on: a batch, losses by name, features by level."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from shards.read import batch as shards

# Losses, or values that are only reported, by name.
Scalars = dict[str, Tensor]
# The losses that are trained on, summed; and what is only reported.
Losses = tuple[Scalars, Scalars]
# Features by level, such as "p8" or "pixels.p8": (N, locations, C).
Features = dict[str, Tensor]


class Batch(shards.Batch, total=False):
    """What is read of B samples, and what a training step adds to it.

    Images are augmented. On the device, all but ``position``, which stays on the CPU.

    Attributes:
        flipped: (B,) bool, which images are mirrored; absent if ``augment.flip`` is 0. Levels are
            of the images as they are stored.
        reference_batch: further samples that a step reads, their levels only; see
            ``Inputs.reference_batch``.
        gradient_cache: of a microbatch whose losses are computed over the whole global batch; see
            :class:`GradientCache`.
    """

    flipped: Tensor
    reference_batch: Batch
    gradient_cache: GradientCache


@dataclass(frozen=True)
class GradientCache:
    """Losses that compare distributions over a global batch, and their gradients.

    Attributes:
        gradients: of the summed losses with respect to the features of some samples.
        losses: by the titles of the objectives.
        report: other values to plot.
    """

    gradients: Features
    losses: Scalars
    report: Scalars

    def rows(self, first: int, end: int) -> GradientCache:
        """The same, with the gradients of samples ``first`` to ``end - 1``."""
        part = {level: gradient[first:end] for level, gradient in self.gradients.items()}
        return GradientCache(part, self.losses, self.report)
