"""Distances between rows and nearest neighbours, a block at a time: memory is bounded."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

BLOCK = (1024, 4096)  # distances that are in memory at a time


def distance_blocks(a: Tensor, b: Tensor) -> Iterator[tuple[slice, slice, Tensor]]:
    """Euclidean distances of rows of ``a`` to rows of ``b``, block by block.

    Yields:
        Which rows of ``a``, which of ``b``, and their distances (n, m) float64: in float32
        |a|^2 + |b|^2 - 2 a.b cancels where two rows are near each other.
    """
    height, width = BLOCK
    for start in range(0, len(a), height):
        rows = slice(start, min(start + height, len(a)))
        exact_a = a[rows].double()
        squares_a = exact_a.square().sum(1)[:, None]
        for place in range(0, len(b), width):
            columns = slice(place, min(place + width, len(b)))
            exact_b = b[columns].double()
            squared = torch.addmm(exact_b.square().sum(1)[None], exact_a, exact_b.T, alpha=-2)
            yield rows, columns, squared.add_(squares_a).clamp_(min=0).sqrt_()


def nearest(a: Tensor, b: Tensor, num: int, same: bool = False) -> tuple[Tensor, Tensor]:
    """Of each row of ``a`` the nearest rows of ``b``.

    Args:
        a: (N, C).
        b: (M, C).
        num: k; at most M, or M - 1 of the same rows.
        same: ``b`` is ``a``, and a row is not its own neighbour.

    Returns:
        Distances (N, k) float64, ascending, and row numbers (N, k) int64, on the rows' device.
    """
    distances = torch.full((len(a), num), torch.inf, dtype=torch.float64, device=a.device)
    numbers = torch.zeros(len(a), num, dtype=torch.int64, device=a.device)
    for rows, columns, block in distance_blocks(a, b):
        here = torch.arange(columns.start, columns.stop, device=a.device).expand(len(block), -1)
        if same:
            own = torch.arange(rows.start, rows.stop, device=a.device)[:, None]
            block = block.masked_fill(here == own, torch.inf)
        few, places = block.topk(min(num, block.shape[1]), largest=False)
        joined = torch.cat([distances[rows], few], 1)
        best, places_joined = joined.topk(num, largest=False)
        distances[rows] = best
        both = torch.cat([numbers[rows], here.gather(1, places)], 1)
        numbers[rows] = both.gather(1, places_joined)
    return distances, numbers
