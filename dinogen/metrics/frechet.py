"""The Frechet distance of two normal distributions: FID, FID-768 and FD-DINOv2.

Heusel et al., "GANs Trained by a Two Time-Scale Update Rule Converge to a Local Nash Equilibrium",
2017, equation 6.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dinogen.metrics.collect import Moments
from dinogen.metrics.value import halves, standard_deviation

_EPSILON = 2.0**-52  # of float64
_BLOCK = 1024


def frechet_distance(mean_a: Tensor, cov_a: Tensor, mean_b: Tensor, cov_b: Tensor) -> float:
    """|mean_a - mean_b|^2 + tr(cov_a + cov_b - 2 (cov_a cov_b)^(1/2)).

    The trace of the root is the sum of singular values of A^T B, where cov_a = A A^T and
    cov_b = B B^T: unlike eigenvalues of cov_a cov_b, whose roots blow rounding errors of 1e-16 up
    to 1e-8 each, these are exact for singular covariances too. Nothing is added to a diagonal.

    Args:
        mean_a: (C,) float64.
        cov_a: (C, C) float64, symmetric, of any rank.
        mean_b: (C,) float64.
        cov_b: (C, C) float64.
    """
    roots = torch.linalg.svdvals(_factor(cov_a).T @ _factor(cov_b)).sum()
    traces = cov_a.trace() + cov_b.trace()
    return float((mean_a - mean_b).square().sum() + traces - 2 * roots)


def frechet_of(generated: Moments, reference: Moments) -> float:
    """Frechet distance of two sets of rows, whose moments these are.

    Raises:
        ValueError: fewer than two rows on one side.
    """
    return frechet_distance(
        generated.mean(), generated.covariance(), reference.mean(), reference.covariance()
    )


def frechet_spread(generated: Tensor, reference: Moments, num: int, seed: int) -> float | None:
    """Standard error of :func:`frechet_of` over random halves of the generated rows.

    Args:
        generated: (N, C), all generated rows.
        reference: of the real rows, which stay as they are.
        num: halves; see :func:`dinogen.metrics.value.halves`.
        seed: of the halves.

    Returns:
        None where there are too few rows, or fewer than two halves are requested.
    """
    chosen = halves(len(generated), num, seed)
    if not chosen:
        return None
    center, covariance = reference.mean(), reference.covariance()
    factor = _factor(covariance)
    member = torch.zeros(len(chosen), len(generated), dtype=torch.bool)
    for line, half in zip(member, chosen, strict=True):
        line[half] = True
    # Of each half only what the reference's r directions hold is summed, r x r: a spread need not
    # be exact to 1e-8, and this is a fraction of a decomposition of C x C each.
    held = factor.new_zeros(len(chosen), factor.shape[1], factor.shape[1])
    totals = factor.new_zeros(len(chosen), len(center))
    squares = factor.new_zeros(len(chosen))
    for rows, inside in zip(generated.split(_BLOCK), member.split(_BLOCK, 1), strict=True):
        exact = rows.to(factor) - center
        projected = exact @ factor
        for number, mask in enumerate(inside):
            held[number].addmm_(projected[mask].T, projected[mask])
            totals[number] += exact[mask].sum(0)
            squares[number] += exact[mask].square().sum()
    count = len(chosen[0])
    values = []
    for number in range(len(chosen)):
        apart = totals[number] / count  # from the reference's mean
        along = apart @ factor
        product = (held[number] - count * torch.outer(along, along)) / (count - 1)
        roots = torch.linalg.eigvalsh(product).clamp(min=0).sqrt().sum()
        trace = (squares[number] - count * apart.square().sum()) / (count - 1)
        values.append(float(apart.square().sum() + covariance.trace() + trace - 2 * roots))
    return standard_deviation(values)


def _factor(covariance: Tensor) -> Tensor:
    """(C, r) float64 whose product with its transpose is the covariance of rank r."""
    values, vectors = torch.linalg.eigh(covariance.double())
    least = values[-1].clamp(min=0) * _EPSILON * len(values)
    kept = values > least
    factor: Tensor = vectors[:, kept] * values[kept].sqrt()
    return factor
