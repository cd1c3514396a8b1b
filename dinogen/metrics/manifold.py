"""Precision, recall, density and coverage: whose neighbourhoods of features hold whose pictures.

Kynkaanniemi et al., "Improved Precision and Recall Metric for Assessing Generative Models", 2019,
equations 1 and 2; Naeem et al., "Reliable Fidelity and Diversity Metrics for Generative Models",
2020, equations 3 and 4.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from dinogen.metrics.bootstrap import Estimate, halves, standard_deviation
from dinogen.metrics.neighbours import distance_blocks, nearest

K_PRECISION = 3  # neighbours; the papers' own numbers
K_DENSITY = 5
# Of so many neighbours among all rows, fewer than three are in a random half once in 8 million.
_NUM_REMEMBERED = 32


@dataclass(frozen=True)
class Manifold:
    """The four figures, each with its standard error over halves of the generated rows.

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
    """All four figures in one pass over the distances, in bounded memory.

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
