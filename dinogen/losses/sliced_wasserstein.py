"""Sliced Wasserstein distance between sets of features."""

from __future__ import annotations

import torch
from torch import Tensor


def sliced_wasserstein(generated: Tensor, real: Tensor, directions: Tensor) -> Tensor:
    """Mean over directions of the squared 2-Wasserstein distance of the projections.

    Bonneel et al. 2015, "Sliced and Radon Wasserstein Barycenters of Measures", eq. 4; in one
    dimension the best plan joins quantiles. Where the sets differ in size, reals are interpolated
    at the generated samples' quantiles. It is 0 for equal sets; of two draws from one distribution
    it is not, by about 1/N + 1/M.

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
    places = (middles * size - 0.5).clamp(0, size - 1)
    below = places.floor().long()
    above = (below + 1).clamp(max=size - 1)
    share = (places - below)[:, None]
    return values[:, below] * (1 - share) + values[:, above] * share
