"""Kernel distance: the unbiased MMD^2 of a cubic kernel, over all pairs, in bounded memory.

Binkowski et al., "Demystifying MMD GANs", 2018, section 4 (KID); Gretton et al., "A Kernel
Two-Sample Test", 2012, equation 3.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dinogen.metrics.value import Estimate, halves, standard_deviation


def kernel_distance(
    generated: Tensor, reference: Tensor, num: int = 0, seed: int = 0, block: int = 1024
) -> Estimate:
    """Unbiased MMD^2 with k(x, y) = (x.y / C + 1)^3; may be slightly negative.

    All pairs count once, where the paper averages over random subsets of 1,000: the same
    expectation without their noise.

    Args:
        generated: (N, C) of any float type; computed in float64, a block at a time.
        reference: (M, C).
        num: halves of the generated rows for the spread, which costs no further kernels.
        seed: of the halves.
        block: rows of a block; block x block kernel values are in memory.

    Returns:
        MMD^2 and its standard error over halves of the generated rows.

    Raises:
        ValueError: fewer than two rows on one side.
    """
    num_rows, num_real = len(generated), len(reference)
    if num_rows < 2 or num_real < 2:
        raise ValueError(f"{num_rows} against {num_real} rows: it takes 2 on each side")
    chosen = halves(num_rows, num, seed)
    weights = torch.zeros(num_rows, 1 + len(chosen), dtype=torch.float64)
    weights[:, 0] = 1
    for column, rows in enumerate(chosen, 1):
        weights[rows, column] = 1
    weights = weights.to(generated.device)
    ones = torch.ones(num_real, 1, dtype=torch.float64, device=reference.device)
    inside = _without_diagonal(generated, weights, block)
    across = _sums(generated, weights, reference, ones.expand(-1, weights.shape[1]), block)
    real = _without_diagonal(reference, ones, block)
    counts = weights.sum(0)
    found = (
        inside / (counts * (counts - 1))
        + real / (num_real * (num_real - 1))
        - 2 * across / (counts * num_real)
    ).tolist()
    return Estimate(found[0], standard_deviation(found[1:]))


def _without_diagonal(rows: Tensor, weights: Tensor, block: int) -> Tensor:
    """(W,) sum of weighted kernels of all pairs of different rows."""
    own = torch.cat([_cubed(part.double().square().sum(1), rows) for part in rows.split(block)])
    return _sums(rows, weights, rows, weights, block) - own @ weights.square()


def _sums(a: Tensor, weights_a: Tensor, b: Tensor, weights_b: Tensor, block: int) -> Tensor:
    """(W,) sum over i, j of weights_a[i] k(a_i, b_j) weights_b[j]."""
    total = torch.zeros_like(weights_a[0])
    for part_a, weight_a in zip(a.split(block), weights_a.split(block), strict=True):
        exact = part_a.double()
        for part_b, weight_b in zip(b.split(block), weights_b.split(block), strict=True):
            kernel = _cubed(exact @ part_b.double().T, a)
            total += (weight_a * (kernel @ weight_b)).sum(0)
    return total


def _cubed(products: Tensor, rows: Tensor) -> Tensor:
    base = products / rows.shape[1] + 1
    return base * base * base
