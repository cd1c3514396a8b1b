"""The spread of a figure: its standard deviation over random halves of the generated rows.

A half of n rows drawn without putting back has the variance s^2 / (n / 2) * (1 - 1/2) = s^2 / n:
that of the whole. So the standard deviation over halves estimates the standard error of the whole
(delete-d jackknife, Shao and Wu, "A General Theory for Jackknife Variance Estimation", 1989). The
bootstrap proper draws rows twice, and a row that is its own nearest neighbour makes recall,
coverage and the unbiased kernel distance wrong.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dinogen import draws

FEWEST_ROWS = 20  # of which a half still says something


@dataclass(frozen=True)
class Estimate:
    """A figure and its standard error; None where that cannot be said."""

    value: float
    spread: float | None


def halves(num_rows: int, num: int, seed: int) -> list[Tensor]:
    """Random halves of rows, the same for the same arguments.

    Args:
        num_rows: N.
        num: how many halves.
        seed: of the draws.

    Returns:
        ``num`` sorted int64 tensors of N // 2 row numbers; none if there are fewer than
        ``FEWEST_ROWS`` rows or ``num`` is below 2, because nothing can be said of a spread.
    """
    if num_rows < FEWEST_ROWS or num < 2:
        return []
    rows = torch.arange(num_rows)
    found = []
    for number in range(num):
        order = draws.uniform(seed, f"halves/{number}", rows).argsort(stable=True)
        found.append(order[: num_rows // 2].sort().values)
    return found


def standard_deviation(values: Sequence[float]) -> float | None:
    """Of figures of :func:`halves`; None of fewer than two."""
    return statistics.stdev(values) if len(values) > 1 else None
