"""Differentiable resizing between image sizes and feature grids."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor

# How images are resized for a guide, as manifests and parts of pyramids say it.
RESIZE = "bicubic antialias"


def to_guide(images: Tensor, size: int, antialias: bool = True) -> Tensor:
    """Bicubic resize to the side that a guide wants, as Pillow does it.

    PyTorch's bicubic is Pillow's (cubic coefficient -0.5, weights renormalised at the edges) only
    with antialias, also when enlarging. It then differs from Pillow by what Pillow rounds: 0.3 of
    255 on average, without 1 to 2, and takes half the time on a CPU.

    Args:
        images: (B, 3, R, R), RGB in [-1, 1].
        size: side of the result, pixels.
        antialias: False enlarges as earlier versions did (coefficient -0.75, edges repeated), for
            features that have to match theirs; see :func:`resized_with_antialias`.

    Returns:
        (B, 3, size, size); bicubic overshoot beyond [-1, 1] is kept, since clamping would cut
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
        prepare: what its manifest says about the preparation. Pyramids of an earlier version say
            nothing about the resize; where nothing is said about pyramids at all, other programs
            made them, and Pillow's bicubic is what these use.
    """
    pyramids = prepare.get("pyramids")
    return pyramids is None or pyramids.get("resize") == RESIZE


def pool2x2(features: Tensor) -> Tensor:
    """Mean of each 2x2 block: (B, C, 2g, 2g) -> (B, C, g, g).

    Adds four slices: an order of magnitude faster on CPUs than a mean over a reshaped view.

    Raises:
        ValueError: an odd side.
    """
    height, width = features.shape[-2:]
    if height % 2 or width % 2:
        raise ValueError(f"a {height}x{width} map has no 2x2 blocks")
    rows = features[..., 0::2, :] + features[..., 1::2, :]
    return (rows[..., 0::2] + rows[..., 1::2]) * 0.25


def shrink_area(images: Tensor, size: int) -> Tensor:
    """Exact area mean: every pixel of the result is the mean of the block it covers.

    For whole factors this is Pillow's ``BOX`` filter before its rounding to uint8, so a picture
    shrunk here equals the shrunk training picture.

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
            f"pictures of {images.shape[-2]}x{side} pixels cannot be shrunk to {size}x{size}: "
            f"the side has to be a multiple of {size}"
        )
    if side == size:
        return images
    return F.avg_pool2d(images, side // size)
