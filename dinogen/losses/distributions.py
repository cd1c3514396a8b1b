"""Losses between distributions of features: energy, MMD, sliced Wasserstein, drifting.

Their gradients to the generated samples are known in closed form, so no graph of (N, M) matrices is
kept. A gradient of pairs is weights (N, M) times differences, which are never stored: the sum over
j of w_ij (a_i - b_j) is one matrix product. The losses are differentiable once, to ``generated``.

The coordinates of all samples may be spread over ranks, see :class:`Coordinates`. Squared distances
and projections are sums over coordinates, so ranks add theirs up; all else is done by each rank for
its own coordinates, or for the small matrices of pairs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Samples at no greater a squared distance are the same: they neither attract nor repel.
_SAME = 1e-12
_SHORTEST = 1e-8


@dataclass(frozen=True)
class Coordinates:
    """Which coordinates of all samples this rank holds, where they are spread over ranks.

    A loss is then this rank's part, and the sum over ranks is the loss; its gradient is that of the
    whole loss to the coordinates held here.

    Attributes:
        total: D, on all ranks together.
        held: the coordinates of this rank, in the order in which it holds them.
        rank: of this process.
        num_ranks: over which they are spread.
        sum_over_ranks: of tensors of one shape; it may change its argument.
    """

    total: int
    held: tuple[slice, ...]
    rank: int
    num_ranks: int
    sum_over_ranks: Callable[[Tensor], Tensor]


def distances(a: Tensor, b: Tensor) -> Tensor:
    """Euclidean distances per square root of the dimension: near 1.4 for unit normal features.

    Where two samples are the same the gradient is 0.

    Args:
        a: (K, N, D): N samples of each of K problems.
        b: (K, M, D).

    Returns:
        (K, N, M).
    """
    return squared_distances(a, b).clamp(min=_SAME).sqrt()


def squared_distances(a: Tensor, b: Tensor) -> Tensor:
    """Squared Euclidean distances over the dimension: as :func:`distances`, squared."""
    # Differences are small compared with the common mean, and matrix products would lose them.
    middle = b.detach().mean(1, keepdim=True)
    a, b = (a - middle) / math.sqrt(a.shape[-1]), (b - middle) / math.sqrt(b.shape[-1])
    squares = a.square().sum(2)[:, :, None] + b.square().sum(2)[:, None, :]
    return torch.baddbmm(squares, a, b.transpose(1, 2), alpha=-2).clamp(min=0)


def mean_of_pairs(values: Tensor) -> Tensor:
    """Mean over problems and over all pairs of different samples, without the diagonal.

    Args:
        values: (K, N, N), N at least 2.
    """
    num = values.shape[1]
    diagonal = values.diagonal(dim1=1, dim2=2).sum()
    return (values.sum() - diagonal) / (len(values) * num * (num - 1))


def energy(generated: Tensor, real: Tensor, coordinates: Coordinates | None = None) -> Tensor:
    """2 E|g - r| - E|g - g'| over pairs of different samples, mean over problems.

    Its expectation is least, E|r - r'|, if and only if the two distributions are the same
    (Szekely and Rizzo 2013, "Energy statistics: A class of statistics based on distances", eq.
    2.5): one answer for every z costs E|r - r'| more than that, if not all reals are alike. See
    :func:`energy_floor`. Where two samples are the same the gradient of their distance is 0.

    Args:
        generated: (K, N, D), N at least 2: samples of each of K problems.
        real: (K, M, D).
        coordinates: those of ``generated`` and ``real``, where D is spread over ranks.

    Returns:
        Scalar, distances as :func:`dinogen.losses.distributions.distances` scales them.
    """
    pairs = _Pairs(generated, real, coordinates)
    to_real, to_own = pairs.split(pairs.squares.clamp_(min=_SAME).sqrt_())
    to_own.diagonal(dim1=1, dim2=2).fill_(0)
    loss = pairs.mean(to_real, 2, to_own, -1)
    if not _wants_gradient(generated):
        return loss
    # d |a - b| / da = (a - b) / |a - b|, and 0 where that is 0 / 0
    weights = pairs.squares.reciprocal_()
    weights.masked_fill_(weights > 0.99 / math.sqrt(_SAME), 0)
    return with_known_gradients(loss, [generated], [pairs.gradient(weights, 2, -2)])


def energy_floor(samples: Tensor) -> Tensor:
    """E|r - r'| over pairs of different samples (K, N, D): what a perfect generator reaches."""
    return mean_of_pairs(distances(samples, samples))


def mmd(
    generated: Tensor,
    real: Tensor,
    bandwidths: Sequence[float],
    coordinates: Coordinates | None = None,
) -> Tensor:
    """E k(g, g') - 2 E k(g, r) over pairs of different samples, mean over problems.

    The squared maximum mean discrepancy less E k(r, r'), which no generator changes (Gretton et
    al. 2012, "A Kernel Two-Sample Test", eq. 3). Gaussian kernels are characteristic: least if and
    only if the two distributions are the same.

    Args:
        generated: (K, N, D), N at least 2: samples of each of K problems.
        real: (K, M, D).
        bandwidths: of the Gaussians that are averaged, in units of a channel's deviation: squared
            distances are divided by D, so that they are near 2 for unit normal features.
        coordinates: those of ``generated`` and ``real``, where D is spread over ranks.

    Returns:
        Scalar.
    """
    pairs = _Pairs(generated, real, coordinates)
    squares = pairs.squares.clamp_(min=0)
    kernel, slope = _kernel(squares, bandwidths, _wants_gradient(generated))
    to_real, to_own = pairs.split(kernel)
    to_own.diagonal(dim1=1, dim2=2).fill_(0)
    loss = pairs.mean(to_real, -2, to_own, 1)
    if slope is None:
        return loss
    # d |a - b|^2 / da = 2 (a - b), which is 0 on the diagonal
    return with_known_gradients(loss, [generated], [pairs.gradient(slope, -4, 4)])


def mmd_floor(samples: Tensor, bandwidths: Sequence[float]) -> Tensor:
    """-E k(r, r') over pairs of different samples (K, N, D): what a perfect generator reaches."""
    return -mean_of_pairs(_kernel(squared_distances(samples, samples), bandwidths, False)[0])


def moments(generated: Tensor, real: Tensor, coordinates: Coordinates | None = None) -> Tensor:
    """Squared differences of the channels' means and standard deviations, mean over problems.

    Args:
        generated: (K, N, D), N at least 2.
        real: (K, M, D), M at least 2.
        coordinates: those of ``generated`` and ``real``, where D is spread over ranks.

    Returns:
        Scalar; it has a bias of the order of 1/N + 1/M.
    """
    if not generated.shape[2]:  # there are more ranks than locations
        return with_known_gradients(generated.new_zeros(()), [generated], [generated.detach()])
    num_values = len(generated) * (coordinates.total if coordinates else generated.shape[2])
    wanted = _wants_gradient(generated)
    with torch.no_grad():
        variance, mean = torch.var_mean(generated, 1, keepdim=True)
        deviation = variance.add_(1e-8).sqrt_()
        variance, real_mean = torch.var_mean(real, 1, keepdim=True)
        means = mean - real_mean
        deviations = deviation - variance.add_(1e-8).sqrt_()
        loss = (means.square().sum() + deviations.square().sum()) / num_values
        if not wanted:
            return loss
        num = generated.shape[1]
        steep = deviations.mul_(2 / (num_values * (num - 1))).div_(deviation)
        gradient = (generated - mean).mul_(steep).add_(means, alpha=2 / (num_values * num))
    return with_known_gradients(loss, [generated], [gradient])


def sliced_wasserstein(
    generated: Tensor, real: Tensor, directions: Tensor, coordinates: Coordinates | None = None
) -> Tensor:
    """Mean over directions of the squared 2-Wasserstein distance of the projections.

    Bonneel et al. 2015, "Sliced and Radon Wasserstein Barycenters of Measures", eq. 4; in one
    dimension the best plan joins quantiles. Where the sets differ in size, reals are interpolated
    at the generated samples' quantiles. It is 0 for equal sets; for two samples of one distribution
    it is about 1/N + 1/M.

    Args:
        generated: (K, N, D): samples of each of K problems.
        real: (K, M, D).
        directions: (D, S), of any length but 0; the same on all ranks.
        coordinates: those of ``generated`` and ``real``, where D is spread over ranks. Each rank
            then projects on all directions, and sorts along its share of them.

    Returns:
        Scalar.
    """
    wanted = _wants_gradient(generated)
    with torch.no_grad():
        length, num_slices = directions.norm(dim=0, keepdim=True), directions.shape[1]
        if coordinates is not None:
            directions = torch.cat([directions[chosen] for chosen in coordinates.held])
        unit = directions / length
        own = slice(0, num_slices)
        if coordinates is None:
            ours, theirs = generated @ unit, real @ unit
        else:
            both = coordinates.sum_over_ranks(torch.cat([real @ unit, generated @ unit], 1))
            rank, num_ranks = coordinates.rank, coordinates.num_ranks
            own = slice(num_slices * rank // num_ranks, num_slices * (rank + 1) // num_ranks)
            theirs, ours = both[..., own].split([real.shape[1], generated.shape[1]], 1)
        ours, ranking = ours.sort(1)
        apart = ours - _quantiles(theirs.sort(1).values, generated.shape[1])
        num_values = len(generated) * generated.shape[1] * num_slices
        loss: Tensor = apart.square().sum() / num_values
        if not wanted:
            return loss
        along = torch.empty_like(apart).scatter_(1, ranking, apart.mul_(2 / num_values))
        if coordinates is not None:
            # a rank that differentiates no direction adds zeros
            every = along.new_zeros(*along.shape[:2], num_slices)
            every[..., own] = along
            along = coordinates.sum_over_ranks(every)
        gradient = along @ unit.T
    return with_known_gradients(loss, [generated], [gradient])


def _quantiles(values: Tensor, num: int) -> Tensor:
    """Sorted (K, M, S), linearly interpolated at ``num`` evenly spaced quantiles (K, num, S)."""
    size = values.shape[1]
    if size == num:
        return values
    middles = (torch.arange(num, device=values.device) + 0.5) / num
    positions = (middles * size - 0.5).clamp(0, size - 1)
    below = positions.floor().long()
    above = (below + 1).clamp(max=size - 1)
    share = (positions - below)[:, None]
    return values[:, below] * (1 - share) + values[:, above] * share


def drift(
    generated: Tensor,
    real: Tensor,
    widths: Sequence[float],
    coordinates: Coordinates | None = None,
) -> tuple[Tensor, Tensor]:
    """Mean squared distance to where the drift fields of all widths, summed, carry each sample.

    A field (Deng et al. 2026, "Generative Modeling via Drifting", as public re-implementations have
    it) moves samples towards nearby real ones and away from nearby generated ones: the kernel is
    normalised over both sets and, geometrically averaged with that, over the generated samples. A
    field is 0 in expectation where the distributions are the same, by antisymmetry.

    Features are scaled so that samples are at a mean distance of the square root of D, and each
    field so that the mean square of its coordinates is 1, so the loss says nothing
    about how far training is: the fields' lengths before that do.

    Args:
        generated: (K, N, D), N at least 2: samples of each of K problems.
        real: (K, M, D).
        widths: of the kernels exp(-distance / width), in units of the mean distance.
        coordinates: those of ``generated`` and ``real``, where D is spread over ranks.

    Returns:
        (loss; mean length of a field before it was scaled, per square root of D), scalars. Only
        the loss has a gradient.
    """
    wanted = _wants_gradient(generated)
    pairs = _Pairs(generated, real, coordinates)
    with torch.no_grad():
        apart = pairs.squares.clamp_(min=_SAME).sqrt_()
        num_pairs = pairs.num * (pairs.num_real + pairs.num - 1)
        # the mean distance, times the number of pairs
        span = apart.sum((1, 2), keepdim=True).clamp_(min=_SHORTEST * num_pairs)
        # a sample does not repel itself
        pairs.split(apart)[1].diagonal(dim1=1, dim2=2).fill_(torch.inf)
        weights = _drift_weights(apart.div_(span), [width / num_pairs for width in widths], pairs)
        fields = torch.bmm(weights, pairs.both).unflatten(1, (len(widths), pairs.num))
        norms: Tensor = torch.linalg.vector_norm(fields, dim=(2, 3))
        if coordinates is not None:
            norms = pairs.sum(norms.square_()).sqrt_()
        # (K, widths); a field's length is its norm per root of its coordinates and mean distance
        root = math.sqrt(pairs.num * pairs.total)
        norms = norms.div_(span[:, 0]).clamp_(min=_SHORTEST * root / num_pairs)
        length = norms.mean() * (num_pairs / (root * pairs.num_ranks))
        # each field to a norm of 1, and added up
        factors = (norms * span[:, 0]).reciprocal_()
        step = torch.bmm(factors[:, None], fields.flatten(2)).view_as(generated)
        loss = torch.linalg.vector_norm(step).square_() / len(generated)
        if not wanted:
            return loss, length
        # d (scaled step)^2 / d features, the scaled step being the root times this one
        gradient = step.mul_(-2 * num_pairs / (len(generated) * root)).div_(span)
    return with_known_gradients(loss, [generated], [gradient]), length


def _drift_weights(apart: Tensor, widths: Sequence[float], pairs: _Pairs) -> Tensor:
    """Weights (K, widths * N, M + N) of all samples in each sample's drift.

    Args:
        apart: distances (K, N, M + N) to real and generated samples.
        widths: see :func:`drift`.
        pairs: of the samples.
    """
    logits = apart.new_empty(len(apart), len(widths), *apart.shape[1:])
    for i, width in enumerate(widths):
        torch.mul(apart, -1 / width, out=logits[:, i])
    weights = logits.softmax(3)
    weights.mul_(logits.softmax(2)).sqrt_()
    attracts, repels = weights.split([pairs.num_real, pairs.num], 3)
    attraction, repulsion = attracts.sum(3, keepdim=True), repels.sum(3, keepdim=True)
    attracts.mul_(repulsion)
    repels.mul_(attraction.neg_())
    return weights.flatten(1, 2)


def with_known_gradients(
    loss: Tensor, tensors: Sequence[Tensor], gradients: Sequence[Tensor]
) -> Tensor:
    """A loss of this value with these gradients, once differentiable.

    Args:
        loss: scalar, without a gradient of its own.
        tensors: what it is differentiated to.
        gradients: of the same shapes.
    """
    found: Tensor = _KnownGradients.apply(loss, *gradients, *tensors)
    return found


class _KnownGradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loss: Tensor, *both: Tensor) -> Tensor:
        ctx.save_for_backward(*both[: len(both) // 2])
        return loss.view_as(loss)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, factor: Tensor) -> tuple[Tensor | None, ...]:
        gradients = ctx.saved_tensors
        return (None, *(None for _ in gradients), *torch._foreach_mul(gradients, factor))


class _Pairs:
    """Generated samples against all: real ones first, then generated ones.

    Attributes:
        squares: squared distances (K, N, M + N) per dimension; a little below 0 at times.
        both: (K, M + N, D) samples, less the mean of the generated ones.
    """

    @torch.no_grad()
    def __init__(self, generated: Tensor, real: Tensor, coordinates: Coordinates | None) -> None:
        self.num, self.num_real = generated.shape[1], real.shape[1]
        self.coordinates = coordinates
        self.total = coordinates.total if coordinates else generated.shape[2]
        self.num_ranks = coordinates.num_ranks if coordinates else 1
        # Differences are small compared with the common mean, and matrix products would lose them.
        self.both = torch.cat([real, generated], 1).sub_(generated.mean(1, keepdim=True))
        self._own = self.both[:, self.num_real :]
        self._num_to_real = len(generated) * self.num * self.num_real
        self._num_to_own = len(generated) * self.num * (self.num - 1)
        lengths: Tensor = torch.linalg.vector_norm(self.both, dim=2)
        lengths.square_()
        squares = lengths[:, self.num_real :, None] + lengths[:, None, :]
        factors = {"beta": 1 / self.total, "alpha": -2 / self.total}
        torch.baddbmm(squares, self._own, self.both.mT, out=squares, **factors)
        self.squares = self.sum(squares)

    def sum(self, values: Tensor) -> Tensor:
        """The sum over the ranks that hold coordinates; it may change its argument."""
        return self.coordinates.sum_over_ranks(values) if self.coordinates else values

    def split(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """(K, N, M + N) as views (K, N, M) and (K, N, N), of pairs with real and generated ones."""
        to_real, to_own = values.split([self.num_real, self.num], 2)
        return to_real, to_own

    @torch.no_grad()
    def mean(
        self, to_real: Tensor, real_factor: float, to_own: Tensor, own_factor: float
    ) -> Tensor:
        """This rank's part of a weighted sum of the means over pairs of different samples.

        Args:
            to_real: (K, N, M).
            real_factor: of their mean.
            to_own: (K, N, N), 0 on the diagonal.
            own_factor: of their mean.
        """
        found = to_real.sum() * (real_factor / (self._num_to_real * self.num_ranks))
        return found.add_(to_own.sum(), alpha=own_factor / (self._num_to_own * self.num_ranks))

    @torch.no_grad()
    def gradient(self, weights: Tensor, real_factor: float, own_factor: float) -> Tensor:
        """Sums over j of w_ij (a_i - b_j), per dimension and number of pairs: (K, N, D).

        Args:
            weights: (K, N, M + N), changed in place.
            real_factor: of the weights of real samples.
            own_factor: of those of generated samples.
        """
        to_real, to_own = self.split(weights)
        to_real.mul_(real_factor / (self._num_to_real * self.total))
        to_own.mul_(own_factor / (self._num_to_own * self.total))
        found = self._own * weights.sum(2, keepdim=True)
        return torch.baddbmm(found, weights, self.both, alpha=-1, out=found)


def _kernel(
    squares: Tensor, bandwidths: Sequence[float], with_slope: bool
) -> tuple[Tensor, Tensor | None]:
    """The mean of Gaussians of squared distances and, if wanted, its derivative to them."""
    total = torch.zeros_like(squares)
    slope = torch.zeros_like(squares) if with_slope else None
    for width in bandwidths:
        one = torch.mul(squares, -0.5 / width**2).exp_()
        total.add_(one, alpha=1 / len(bandwidths))
        if slope is not None:
            slope.add_(one, alpha=-0.5 / (width**2 * len(bandwidths)))
    return total, slope


def _wants_gradient(generated: Tensor) -> bool:
    return generated.requires_grad and torch.is_grad_enabled()
