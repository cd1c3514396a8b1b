"""Objectives between pyramids of guide features."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

import torch
from torch import Tensor

Level = TypeVar("Level")


def pyramid_mse(
    generated: Mapping[Level, Tensor], real: Mapping[Level, Tensor], keep: Tensor | None = None
) -> Tensor:
    """Mean squared error of two pyramids, each level counting the same.

    With generated and real pictures independent, its expectation is at least the mean over levels
    of ``tr Cov(real) / (g*g*C)``: E|f(G(z)) - f(x)|^2 = E|f(G(z)) - mu|^2 + tr Cov f(x). The best
    generator therefore makes the same features for every z; see :func:`collapse_floor`.

    Args:
        generated: by level, (B, grid*grid, C).
        real: the same levels and shapes.
        keep: (B,) bool; the others count 0 in a mean over all samples. All are kept without it.

    Returns:
        Scalar float32.
    """
    levels = [(generated[g].float() - real[g].float()).square().mean((1, 2)) for g in real]
    each = torch.stack(levels).mean(0)
    return (each if keep is None else each * keep).mean()


def collapse_floor(total_variances: list[float]) -> float:
    """The least :func:`pyramid_mse` that a generator independent of the target can reach.

    Args:
        total_variances: per level, the variance of real features averaged over places and
            channels.
    """
    return sum(total_variances) / len(total_variances)


def mean_pairwise_distance(features: Tensor) -> float:
    """Mean Euclidean distance over all pairs of different samples.

    Args:
        features: (N, ...), N at least 2; flattened per sample.
    """
    flat = features.flatten(1).double()
    return float(torch.pdist(flat).mean())
