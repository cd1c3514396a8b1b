"""Maximum mean discrepancy between sets of features, without bias, and their channel moments."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dinogen.losses.distances import mean_of_pairs, squared_distances


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
