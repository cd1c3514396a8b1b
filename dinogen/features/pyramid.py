"""Pyramids: the patch features of pictures at several grids, pooled or native."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from dinogen.features.base import Guide
from dinogen.features.resize import pool2x2, shrink_area, to_guide

BASE_GRID = 16


def pooled_pyramid(
    guide: Guide,
    images: Tensor,
    grids: Sequence[int] = (4, 8, 16),
    base_grid: int = BASE_GRID,
    antialias: bool = True,
) -> dict[int, Tensor]:
    """The 16x16 map of the picture, and its exact 2x2 means; differentiable to the pixels.

    Args:
        guide: frozen feature network.
        images: (B, 3, R, R), RGB in [-1, 1], resized to ``guide.input_size(base_grid)``.
        grids: sides wanted, each ``base_grid`` or a half, a quarter, ... of it.
        base_grid: side of the map that the others are means of, a power of 2.
        antialias: as in :func:`dinogen.features.resize.to_guide`.

    Returns:
        ``{grid: (B, grid * grid, C)}`` float32, places row by row.

    Raises:
        ValueError: a grid that 2x2 means of the map do not reach.
    """
    _check_pooled(grids, base_grid)
    features = guide(to_guide(images, guide.input_size(base_grid), antialias))
    levels = {}
    for halving in range(base_grid.bit_length()):
        grid = base_grid >> halving
        if grid in grids:
            levels[grid] = tokens(features)
        if grid > min(grids):
            features = pool2x2(features)
    return {grid: levels[grid] for grid in grids}


def native_pyramid(
    guide: Guide, images: Tensor, grids: Sequence[int], antialias: bool = True
) -> dict[int, Tensor]:
    """Per grid, the features of the picture shrunk to grid x grid pixels; differentiable.

    It is what a generated picture of grid x grid pixels goes through, so a generator can reach
    these features, while pooled features of a large picture are out of its reach.

    Args:
        guide: frozen feature network.
        images: (B, 3, R, R), RGB in [-1, 1], R a multiple of every grid.
        grids: sides wanted.
        antialias: as in :func:`dinogen.features.resize.to_guide`.

    Returns:
        ``{grid: (B, grid * grid, C)}`` float32, places row by row.

    Raises:
        ValueError: R is not a multiple of a grid.
    """
    return {
        grid: tokens(guide(to_guide(shrink_area(images, grid), guide.input_size(grid), antialias)))
        for grid in grids
    }


def tokens(features: Tensor) -> Tensor:
    """(B, C, g, g) -> (B, g * g, C), places row by row."""
    return features.flatten(2).transpose(1, 2)


def base_grid_of(prepare: Mapping[str, Any]) -> int:
    """Side of the map that the pooled levels of a dataset are means of.

    Args:
        prepare: what its manifest says about the preparation; silence means 16.
    """
    base_grid: int = prepare.get("pyramids", {}).get("base_grid", BASE_GRID)
    return base_grid


def _check_pooled(grids: Sequence[int], base_grid: int) -> None:
    reachable = [base_grid >> halving for halving in range(base_grid.bit_length())]
    wrong = [grid for grid in grids if grid not in reachable]
    if wrong or not grids:
        raise ValueError(f"pooled grids {list(grids)}: each has to be one of {reachable}")
