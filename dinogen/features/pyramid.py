"""Pyramids: the patch features of pictures at several grids, pooled or native."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from dinogen.features.base import Guide
from dinogen.features.resize import pool2x2, shrink_area, to_guide

BASE_GRID = 16


def pooled_pyramid(
    guide: Guide, images: Tensor, grids: Sequence[int] = (4, 8, 16)
) -> dict[int, Tensor]:
    """The 16x16 map of the picture, and its exact 2x2 means; differentiable to the pixels.

    Args:
        guide: frozen feature network.
        images: (B, 3, R, R), RGB in [-1, 1], resized to ``guide.input_size(16)``.
        grids: sides wanted, each 16, 8, 4, 2 or 1.

    Returns:
        ``{grid: (B, grid * grid, C)}`` float32, places row by row.

    Raises:
        ValueError: a grid that 2x2 means of a 16x16 map do not reach.
    """
    _check_pooled(grids)
    features = guide(to_guide(images, guide.input_size(BASE_GRID)))
    levels = {}
    for halving in range(BASE_GRID.bit_length()):
        grid = BASE_GRID >> halving
        if grid in grids:
            levels[grid] = tokens(features)
        if grid > min(grids):
            features = pool2x2(features)
    return {grid: levels[grid] for grid in grids}


def native_pyramid(guide: Guide, images: Tensor, grids: Sequence[int]) -> dict[int, Tensor]:
    """Per grid, the features of the picture shrunk to grid x grid pixels; differentiable.

    It is what a generated picture of grid x grid pixels goes through, so a generator can reach
    these features, while pooled features of a large picture are out of its reach.

    Args:
        guide: frozen feature network.
        images: (B, 3, R, R), RGB in [-1, 1], R a multiple of every grid.
        grids: sides wanted.

    Returns:
        ``{grid: (B, grid * grid, C)}`` float32, places row by row.

    Raises:
        ValueError: R is not a multiple of a grid.
    """
    return {
        grid: tokens(guide(to_guide(shrink_area(images, grid), guide.input_size(grid))))
        for grid in grids
    }


def tokens(features: Tensor) -> Tensor:
    """(B, C, g, g) -> (B, g * g, C), places row by row."""
    return features.flatten(2).transpose(1, 2)


def _check_pooled(grids: Sequence[int]) -> None:
    reachable = [BASE_GRID >> halving for halving in range(BASE_GRID.bit_length())]
    wrong = [grid for grid in grids if grid not in reachable]
    if wrong or not grids:
        raise ValueError(f"pooled grids {list(grids)}: each has to be one of {reachable}")
