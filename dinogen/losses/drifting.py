"""Drifting within groups: samples of other groups repel too, and problems share their scales."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dinogen.losses.distributions import Coordinates, with_known_gradients

# As in the other losses: samples no further apart are the same, fields no longer are none.
_SAME = 1e-12
_SHORTEST = 1e-8
# Pairs of samples that are compared at once: 256 MB of distances.
_MOST_PAIRS = 2**26


@dataclass(frozen=True)
class Negatives:
    """Further samples that generated ones move away from.

    Attributes:
        samples: (K, L, D).
        weights: (K,), those of one of them in each problem; a generated sample has weight 1.
    """

    samples: Tensor
    weights: Tensor

    def rows(self, chosen: slice) -> Negatives:
        """Those of some problems."""
        return Negatives(self.samples[chosen], self.weights[chosen])


def unconditional_weight(guidance: Tensor, num_generated: int, num_negatives: int) -> Tensor:
    """Weight of each unconditional real sample among the negatives, for a strength of guidance.

    Deng et al. 2026, "Generative Modeling via Drifting", as public re-implementations have it: the
    negatives are (1 - gamma) q(x | c) + gamma p(x), so the fixed point is q(x | c) =
    alpha p(x | c) - (alpha - 1) p(x) with alpha = 1 / (1 - gamma). A sample does not repel itself,
    so N - 1 generated ones of weight 1 and L others of weight w have gamma = L w / (N - 1 + L w),
    hence w = (N - 1) (alpha - 1) / L.

    Args:
        guidance: alpha, 1 or more, of any shape.
        num_generated: N.
        num_negatives: L.
    """
    return (guidance - 1) * ((num_generated - 1) / num_negatives)


def grouped_drift(
    generated: Tensor,
    real: Tensor,
    widths: Sequence[float],
    negatives: Negatives | None = None,
    together: bool = False,
    coordinates: Coordinates | None = None,
    sum_over_ranks: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """As :func:`dinogen.losses.distributions.drift`, with negatives, and scales that are shared.

    The kernels of negatives are multiplied by their weights, after they were normalised, and so
    are their distances in the mean distance.

    Args:
        generated: (K, N, D), N at least 2: samples of each of K problems.
        real: (K, M, D).
        widths: of the kernels exp(-distance / width), in units of the mean distance.
        negatives: further samples that repel.
        together: whether the mean distance, and the mean square of a field's coordinates, are
            those of all K problems; else of each its own.
        coordinates: those of all samples, where D is spread over ranks.
        sum_over_ranks: of tensors of one shape, where problems are spread over ranks, of which K
            may be 0 on some; only with ``together``.

    Returns:
        (loss; mean length of a field before it was scaled, per square root of D), scalars. Only
        the loss has a gradient. Where coordinates or problems are spread, each is this rank's part.
    """
    with torch.no_grad():
        found = _Problems(generated, real, negatives, coordinates)
        spans, totals = found.spans()
        num_problems = spans.new_full((1,), len(generated))
        if together:
            sums = torch.stack([spans.sum(), totals.sum(), num_problems[0]])
            if sum_over_ranks is not None:
                sums = sum_over_ranks(sums)
            spans, totals, num_problems = sums.split(1)
        # (K,), or (1,) if it is shared: the mean distance per root of D
        scales = (spans / totals).clamp_(min=_SHORTEST)
        fields = found.fields(scales.expand(len(generated)), widths)
        size = found.num * found.total
        squares: Tensor = torch.linalg.vector_norm(fields, dim=(2, 3)).square_()
        if coordinates is not None:
            squares = coordinates.sum_over_ranks(squares)
        if together:
            squares = squares.sum(0, keepdim=True)
            if sum_over_ranks is not None:
                squares = sum_over_ranks(squares)
            squares = squares / num_problems
        # root mean squares of a field's coordinates, per mean distance
        lengths = (squares / size).sqrt_().div_(scales[:, None]).clamp_(min=_SHORTEST)
        # each field to a mean square of 1, and added up
        factors = (lengths * scales[:, None]).reciprocal_()
        factors = factors.expand(len(fields), -1)
        step = torch.bmm(factors[:, None], fields.flatten(2)).view_as(generated)
        count = num_problems * size
        loss: Tensor = (torch.linalg.vector_norm(step).square_() / count)[0]
        length: Tensor = lengths.mean()
        if coordinates is not None:
            length = length / coordinates.num_ranks
        elif sum_over_ranks is not None:
            length = (length * len(generated) / num_problems)[0]
        # d (scaled step)^2 / d features
        gradient = step.mul_((-2 / (count * scales))[:, None, None])
    if not generated.requires_grad:
        return loss, length
    return with_known_gradients(loss, [generated], [gradient]), length


class _Problems:
    """Generated samples against all: real ones, negatives, then generated ones.

    Attributes:
        num: N.
        total: D, on all ranks together.
    """

    def __init__(
        self,
        generated: Tensor,
        real: Tensor,
        negatives: Negatives | None,
        coordinates: Coordinates | None,
    ) -> None:
        self.num, self.num_real = generated.shape[1], real.shape[1]
        self.total = coordinates.total if coordinates else generated.shape[2]
        self._coordinates = coordinates
        self._generated, self._real, self._negatives = generated, real, negatives
        self._num_negatives = negatives.samples.shape[1] if negatives else 0
        num_pairs = self.num * (self.num_real + self._num_negatives + self.num)
        block = max(1, _MOST_PAIRS // num_pairs)
        starts = range(0, len(generated), block)
        self._blocks = [slice(start, start + block) for start in starts]
        self._kept: Tensor | None = None

    def spans(self) -> tuple[Tensor, Tensor]:
        """Sums of weighted distances (K,), and of the weights (K,), over pairs of two samples."""
        num, num_problems = self.num, len(self._generated)
        spans = self._generated.new_zeros(num_problems)
        for block in self._blocks:
            apart = self._apart(self._both(block))
            self._kept = apart if len(self._blocks) == 1 else None
            spans[block] = self._weighted(apart, block).sum((1, 2))
        totals = torch.full_like(spans, num * (self.num_real + num - 1))
        if self._negatives is not None:
            totals += self._negatives.weights * (num * self._num_negatives)
        return spans, totals

    def fields(self, scales: Tensor, widths: Sequence[float]) -> Tensor:
        """The fields (K, widths, N, D), in units of the features.

        Args:
            scales: (K,), mean distances per root of D.
            widths: of the kernels, in mean distances.
        """
        shape = (len(self._generated), len(widths), *self._generated.shape[1:])
        fields = self._generated.new_empty(shape)
        for block in self._blocks:
            both = self._both(block)
            apart = self._apart(both) if self._kept is None else self._kept
            # a sample does not repel itself
            apart[:, :, -self.num :].diagonal(dim1=1, dim2=2).fill_(torch.inf)
            apart = apart / scales[block, None, None]
            for i, width in enumerate(widths):
                torch.bmm(self._weights(apart / -width, block), both, out=fields[block, i])
        return fields

    def _both(self, block: slice) -> Tensor:
        """All samples of some problems (k, M + L + N, D), less the mean of the generated ones."""
        parts = [self._real[block], self._generated[block]]
        if self._negatives is not None:
            parts.insert(1, self._negatives.samples[block])
        # Differences are small compared with the common mean: matrix products would lose them.
        return torch.cat(parts, 1).sub_(parts[-1].mean(1, keepdim=True))

    def _apart(self, both: Tensor) -> Tensor:
        """Distances (k, N, M + L + N) per root of D; 0 from a sample to itself."""
        own = both[:, -self.num :]
        squares: Tensor = torch.linalg.vector_norm(both, dim=2).square_()
        found = squares[:, -self.num :, None] + squares[:, None, :]
        found.baddbmm_(own, both.mT, alpha=-2).div_(self.total)
        if self._coordinates is not None:
            found = self._coordinates.sum_over_ranks(found)
        found.clamp_(min=_SAME).sqrt_()
        found[:, :, -self.num :].diagonal(dim1=1, dim2=2).fill_(0)
        return found

    def _weighted(self, values: Tensor, block: slice) -> Tensor:
        """Values of pairs (k, N, M + L + N), those of negatives times their weights."""
        if self._negatives is None:
            return values
        weights = torch.ones_like(values[:, :1])
        end = self.num_real + self._num_negatives
        weights[:, 0, self.num_real : end] = self._negatives.weights[block, None]
        return values * weights

    def _weights(self, logits: Tensor, block: slice) -> Tensor:
        """Weights (k, N, M + L + N) of all samples in each sample's drift; a row's sum is 0."""
        kernel = (logits.softmax(2) * logits.softmax(1)).sqrt_()
        kernel = self._weighted(kernel, block)
        attracts, repels = kernel[:, :, : self.num_real], kernel[:, :, self.num_real :]
        attraction, repulsion = attracts.sum(2, keepdim=True), repels.sum(2, keepdim=True)
        return torch.cat([attracts * repulsion, repels * -attraction], 2)
