"""Pyramids: patch features of images at several grids, pooled or native, and their resizing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from dinogen.features.base import Guide

BASE_GRID = 16


def pooled_pyramid(
    guide: Guide,
    images: Tensor,
    grids: Sequence[int] = (4, 8, 16),
    base_grid: int = BASE_GRID,
    antialias: bool = True,
) -> dict[int, Tensor]:
    """The 16x16 map of the image, and its exact 2x2 means; differentiable to the pixels.

    Args:
        guide: frozen feature network.
        images: (B, 3, R, R), RGB in [-1, 1], resized to ``guide.input_size(base_grid)``.
        grids: requested sides, each ``base_grid`` or a half, a quarter, ... of it.
        base_grid: side of the map that the others are means of, a power of 2.
        antialias: as in :func:`dinogen.features.pyramid.to_guide`.

    Returns:
        ``{grid: (B, grid * grid, C)}`` float32, locations row by row.

    Raises:
        ValueError: a grid that 2x2 means of the map cannot give.
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
    """Per grid, the features of the image shrunk to grid x grid pixels; differentiable.

    A generated image of grid x grid pixels is processed in the same way, so a generator can match
    these features, which it cannot do with pooled features of a large image.

    Args:
        guide: frozen feature network.
        images: (B, 3, R, R), RGB in [-1, 1], R a multiple of every grid.
        grids: requested sides.
        antialias: as in :func:`dinogen.features.pyramid.to_guide`.

    Returns:
        ``{grid: (B, grid * grid, C)}`` float32, locations row by row.

    Raises:
        ValueError: R is not a multiple of a grid.
    """
    return {
        grid: tokens(guide(to_guide(shrink_area(images, grid), guide.input_size(grid), antialias)))
        for grid in grids
    }


def tokens(features: Tensor) -> Tensor:
    """(B, C, g, g) -> (B, g * g, C), locations row by row."""
    return features.flatten(2).transpose(1, 2)


def base_grid_of(prepare: Mapping[str, Any]) -> int:
    """Side of the map that the pooled levels of a dataset are averaged from.

    Args:
        prepare: what its manifest says about the preparation; 16 if it does not say.
    """
    base_grid: int = prepare.get("pyramids", {}).get("base_grid", BASE_GRID)
    return base_grid


def _check_pooled(grids: Sequence[int], base_grid: int) -> None:
    reachable = [base_grid >> halving for halving in range(base_grid.bit_length())]
    wrong = [grid for grid in grids if grid not in reachable]
    if wrong or not grids:
        raise ValueError(f"pooled grids {list(grids)}: each must be one of {reachable}")


# How images are resized for a guide, as stored in manifests and parts of pyramids.
RESIZE = "bicubic antialias"


def to_guide(images: Tensor, size: int, antialias: bool = True) -> Tensor:
    """Bicubic resize to the side that a guide needs, like Pillow.

    PyTorch's bicubic is Pillow's (cubic coefficient -0.5, weights renormalised at the edges) only
    with antialias, also when enlarging. It then differs from Pillow only by Pillow's rounding (0.3
    of 255 on average; without antialias 1 to 2), and takes half the time on a CPU.

    Args:
        images: (B, 3, R, R), RGB in [-1, 1].
        size: side of the result, pixels.
        antialias: False enlarges like earlier versions (coefficient -0.75, edges repeated), for
            features that have to match theirs; see :func:`resized_with_antialias`.

    Returns:
        (B, 3, size, size); bicubic overshoot beyond [-1, 1] is kept, because clamping would cut
        the gradient there.
    """
    if images.shape[-1] == size:
        return images
    return F.interpolate(
        images,
        size=(size, size),
        mode="bicubic",
        align_corners=False,
        antialias=antialias or images.shape[-1] > size,
    )


def resized_with_antialias(prepare: Mapping[str, Any]) -> bool:
    """Whether the images that a dataset's pyramids come from were enlarged with antialias.

    Args:
        prepare: what its manifest says about the preparation. Pyramids of an earlier version do
            not mention the resize; if there is no entry for pyramids at all, another program made
            them, and those use Pillow's bicubic.
    """
    pyramids = prepare.get("pyramids")
    return pyramids is None or pyramids.get("resize") == RESIZE


def pool2x2(features: Tensor) -> Tensor:
    """Mean of each 2x2 block: (B, C, 2g, 2g) -> (B, C, g, g).

    On CPUs it adds four slices, which is several times as fast as torch's pooling.

    Raises:
        ValueError: an odd side.
    """
    height, width = features.shape[-2:]
    if height % 2 or width % 2:
        raise ValueError(f"a {height}x{width} map has no 2x2 blocks")
    if features.is_cuda:  # slices take 3 launches, and 11 backward
        return F.avg_pool2d(features, 2)
    rows = features[..., 0::2, :] + features[..., 1::2, :]
    return (rows[..., 0::2] + rows[..., 1::2]) * 0.25


def shrink_area(images: Tensor, size: int) -> Tensor:
    """Exact area mean: every pixel of the result is the mean of the block it covers.

    For whole factors this is Pillow's ``BOX`` filter before its rounding to uint8, so an image
    shrunk here equals the shrunk training image.

    Args:
        images: (B, C, R, R) with R a multiple of ``size``.
        size: side of the result, pixels.

    Returns:
        (B, C, size, size).

    Raises:
        ValueError: R is not a multiple of ``size``.
    """
    side = images.shape[-1]
    if side % size or images.shape[-2] % size:
        raise ValueError(
            f"images of {images.shape[-2]}x{side} pixels cannot be shrunk to {size}x{size}: "
            f"the side must be a multiple of {size}"
        )
    if side == size:
        return images
    return F.avg_pool2d(images, side // size)
