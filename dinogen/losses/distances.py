"""Distances between the samples of two sets, for objectives that compare distributions."""

from __future__ import annotations

import math

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
    # Differences are small beside a mean that all share, and matrix products would lose them.
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
