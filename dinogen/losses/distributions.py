"""Losses between distributions of features: energy, MMD, sliced Wasserstein, drifting."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def distances(a: Tensor, b: Tensor) -> Tensor:
    """Euclidean distances per square root of the dimension: near 1.4 for unit normal features.

    Where two samples are the same the gradient is 0.

    Args:
        a: (K, N, D): N samples of each of K problems.
        b: (K, M, D).

    Returns:
        (K, N, M).
    """
    return squared_distances(a, b).clamp(min=1e-12).sqrt()


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


def energy(generated: Tensor, real: Tensor) -> Tensor:
    """2 E|g - r| - E|g - g'| over pairs of different samples, mean over problems.

    Its expectation is least, E|r - r'|, if and only if the two distributions are the same
    (Szekely and Rizzo 2013, "Energy statistics: A class of statistics based on distances", eq.
    2.5): one answer for every z costs E|r - r'| more than that, if not all reals are alike. See
    :func:`energy_floor`.

    Args:
        generated: (K, N, D), N at least 2: samples of each of K problems.
        real: (K, M, D).

    Returns:
        Scalar, distances as :func:`dinogen.losses.distributions.distances` scales them.
    """
    return 2 * distances(generated, real).mean() - energy_floor(generated)


def energy_floor(samples: Tensor) -> Tensor:
    """E|r - r'| over pairs of different samples (K, N, D): what a perfect generator reaches."""
    return mean_of_pairs(distances(samples, samples))


def mmd(generated: Tensor, real: Tensor, bandwidths: Sequence[float]) -> Tensor:
    """E k(g, g') - 2 E k(g, r) over pairs of different samples, mean over problems.

    The squared maximum mean discrepancy less E k(r, r'), which no generator changes (Gretton et
    al. 2012, "A Kernel Two-Sample Test", eq. 3). Gaussian kernels are characteristic: least if and
    only if the two distributions are the same.

    Args:
        generated: (K, N, D), N at least 2: samples of each of K problems.
        real: (K, M, D).
        bandwidths: of the Gaussians that are averaged, in units of a channel's deviation: squared
            distances are divided by D, so that they are near 2 for unit normal features.

    Returns:
        Scalar.
    """
    attraction = _kernel(squared_distances(generated, real), bandwidths).mean()
    return -mmd_floor(generated, bandwidths) - 2 * attraction


def mmd_floor(samples: Tensor, bandwidths: Sequence[float]) -> Tensor:
    """-E k(r, r') over pairs of different samples (K, N, D): what a perfect generator reaches."""
    return -mean_of_pairs(_kernel(squared_distances(samples, samples), bandwidths))


def moments(generated: Tensor, real: Tensor) -> Tensor:
    """Squared differences of the channels' means and standard deviations, mean over problems.

    Args:
        generated: (K, N, D), N at least 2.
        real: (K, M, D), M at least 2.

    Returns:
        Scalar; it has a bias of the order of 1/N + 1/M.
    """
    sides = []
    for samples in (generated, real):
        variance, mean = torch.var_mean(samples, 1)
        sides.append((mean, (variance + 1e-8).sqrt()))
    return sum(
        ((ours - theirs).square().mean() for ours, theirs in zip(*sides, strict=True)),
        start=generated.new_zeros(()),
    )


def _kernel(squares: Tensor, bandwidths: Sequence[float]) -> Tensor:
    total = torch.zeros_like(squares)
    for width in bandwidths:
        total = total + torch.exp(squares / (-2 * width**2))
    return total / len(bandwidths)


def sliced_wasserstein(generated: Tensor, real: Tensor, directions: Tensor) -> Tensor:
    """Mean over directions of the squared 2-Wasserstein distance of the projections.

    Bonneel et al. 2015, "Sliced and Radon Wasserstein Barycenters of Measures", eq. 4; in one
    dimension the best plan joins quantiles. Where the sets differ in size, reals are interpolated
    at the generated samples' quantiles. It is 0 for equal sets; for two samples of one distribution
    it is about 1/N + 1/M.

    Args:
        generated: (K, N, D): samples of each of K problems.
        real: (K, M, D).
        directions: (D, S), of any length but 0.

    Returns:
        Scalar.
    """
    unit: Tensor = directions / directions.norm(dim=0, keepdim=True)
    ours = (generated @ unit).sort(1).values
    theirs = _quantiles((real @ unit).sort(1).values, generated.shape[1])
    return (ours - theirs).square().mean()


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


def drift(generated: Tensor, real: Tensor, widths: Sequence[float]) -> tuple[Tensor, Tensor]:
    """Mean squared distance to where the drift fields of all widths, summed, carry each sample.

    Features are scaled so that samples are at a mean distance of the square root of D, and each
    field so that the mean square of its coordinates is 1 (appendix A.6), so the loss says nothing
    about how far training is: the fields' lengths before that do.

    Args:
        generated: (K, N, D), N at least 2: samples of each of K problems.
        real: (K, M, D).
        widths: of the kernels exp(-distance / width), in units of the mean distance.

    Returns:
        (loss; mean length of a field before it was scaled, per square root of D), scalars. Only
        the loss has a gradient.
    """
    with torch.no_grad():
        to_real, to_own = distances(generated, real), distances(generated, generated)
        num = generated.shape[1]
        scale = torch.cat([to_real, to_own], 2).sum((1, 2)) / (num * (real.shape[1] + num - 1))
        scale = scale.clamp(min=1e-8)[:, None, None]
        ours, theirs = generated / scale, real / scale
        goal, lengths = ours.clone(), []
        for width in widths:
            field = drift_field(ours, theirs, to_real / scale, to_own / scale, width)
            length = field.square().mean((1, 2), keepdim=True).sqrt()
            goal += field / length.clamp(min=1e-8)
            lengths.append(length.mean())
    loss = (generated / scale - goal).square().mean()
    return loss, torch.stack(lengths).mean()


def drift_field(
    generated: Tensor, real: Tensor, to_real: Tensor, to_own: Tensor, width: float
) -> Tensor:
    """Where samples move: towards nearby real ones, away from nearby generated ones.

    Algorithm 2 of the paper: the kernel is normalised over both sets and, geometrically averaged
    with that, over the generated samples. It is 0 in expectation where the distributions are the
    same, by antisymmetry.

    Args:
        generated: (K, N, D).
        real: (K, M, D).
        to_real: distances (K, N, M).
        to_own: distances (K, N, N); a sample does not repel itself.
        width: of the kernel, in units of the distances.

    Returns:
        (K, N, D).
    """
    num_real = real.shape[1]
    alone = torch.eye(generated.shape[1], dtype=torch.bool, device=generated.device)
    logits = torch.cat([to_real, to_own.masked_fill(alone, torch.inf)], 2) / -width
    weights = (logits.softmax(2) * logits.softmax(1)).sqrt()
    attracts, repels = weights[:, :, :num_real], weights[:, :, num_real:]
    pull = (attracts * repels.sum(2, keepdim=True)) @ real
    push = (repels * attracts.sum(2, keepdim=True)) @ generated
    return pull - push
