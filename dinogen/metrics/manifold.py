"""Precision, recall, density and coverage, by nearest neighbours in blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from dinogen.metrics.value import Estimate, halves, standard_deviation

K_PRECISION = 3  # neighbours; the papers' own numbers
K_DENSITY = 5
# Of 32 neighbours among all rows, fewer than three are in a random half once in 8 million.
_NUM_REMEMBERED = 32


@dataclass(frozen=True)
class Manifold:
    """The four metric values, each with its standard error over halves of the generated rows.

    Attributes:
        precision: share of generated rows within a ball about a real one, to its third neighbour.
        recall: share of real rows within such a ball about a generated one.
        density: mean number of balls about real rows, to their fifth neighbour, that a generated
            row lies in, over 5; may be above 1.
        coverage: share of those balls with a generated row in it.
    """

    precision: Estimate
    recall: Estimate
    density: Estimate
    coverage: Estimate


def manifold(generated: Tensor, reference: Tensor, num: int = 0, seed: int = 0) -> Manifold:
    """All four metric values in one pass over the distances, in bounded memory.

    Args:
        generated: (N, C) of any float type; distances are in float64.
        reference: (M, C).
        num: halves of the generated rows for the spreads.
        seed: of the halves.

    Raises:
        ValueError: too few rows for the neighbours.
    """
    num_rows, num_real = len(generated), len(reference)
    if num_rows <= K_PRECISION or num_real <= K_DENSITY:
        raise ValueError(
            f"{num_rows} against {num_real} rows: it takes {K_PRECISION + 1} generated and "
            f"{K_DENSITY + 1} real ones"
        )
    place = generated.device
    chosen = [torch.arange(num_rows), *halves(num_rows, num, seed)]
    member = torch.zeros(len(chosen), num_rows, dtype=torch.bool)
    for line, half in zip(member, chosen, strict=True):
        line[half] = True
    member = member.to(place)
    radii = _radii(generated, member)
    real, _ = nearest(reference, reference, K_DENSITY, same=True)
    near, far = real[:, K_PRECISION - 1], real[:, K_DENSITY - 1]

    precise = torch.zeros(num_rows, dtype=torch.float64, device=place)
    dense = torch.zeros_like(precise)
    recalled = torch.zeros(len(chosen), num_real, dtype=torch.bool, device=place)
    inhabited = torch.zeros(len(chosen), num_real, dtype=torch.float64, device=place)
    share = member.double()
    for rows, columns, distances in distance_blocks(generated, reference):
        held = (distances <= near[columns]).any(1).double()
        precise[rows] = torch.maximum(precise[rows], held)
        inside = (distances <= far[columns]).double()
        dense[rows] += inside.sum(1)
        inhabited[:, columns] += share[:, rows] @ inside
        for line, radius in zip(recalled, radii, strict=True):
            line[columns] |= (distances <= radius[rows, None]).any(0)

    def over(values: Callable[[int], Tensor]) -> Estimate:
        found = [float(values(index)) for index in range(len(chosen))]
        return Estimate(found[0], standard_deviation(found[1:]))

    return Manifold(
        precision=over(lambda index: precise[member[index]].mean()),
        recall=over(lambda index: recalled[index].double().mean()),
        density=over(lambda index: dense[member[index]].mean() / K_DENSITY),
        coverage=over(lambda index: (inhabited[index] > 0).double().mean()),
    )


def _radii(rows: Tensor, member: Tensor) -> list[Tensor]:
    """(N,) of each set of members: distance to the third nearest of them; -1 of others.

    Neighbours are found once, among all rows; in a half they are the first three that are in it.
    """
    distances, numbers = nearest(rows, rows, min(_NUM_REMEMBERED, len(rows) - 1), same=True)
    found = []
    for inside in member:
        rank = inside[numbers].cumsum(1)
        # the last one remembered stands in where a half has fewer than three of them
        place = (rank < K_PRECISION).sum(1, keepdim=True).clamp(max=distances.shape[1] - 1)
        radius = distances.gather(1, place)[:, 0]
        found.append(torch.where(inside, radius, -1.0))
    return found


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
