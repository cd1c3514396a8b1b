"""Square parts of pictures at their native size, at drawn places or side by side."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dinogen import draws


def random_crops(images: Tensor, size: int, seed: int, purpose: str, positions: Tensor) -> Tensor:
    """A part of each picture, anywhere in it, at a place drawn by the sample's position.

    Args:
        images: (B, C, R, R), R at least ``size``; of R itself the very same pictures come back.
        size: side of the parts, pixels.
        seed: the run's seed.
        purpose: what the pictures are for; other purposes give independent places.
        positions: (B,) int64 on the CPU, places of the samples in the global order.

    Returns:
        (B, C, size, size).
    """
    room = images.shape[-1] - size
    if not room:
        return images
    corners = draws.integers(seed, f"{purpose}/crop", positions, (2,), high=room + 1).tolist()
    parts = [
        image[:, y : y + size, x : x + size] for image, (y, x) in zip(images, corners, strict=True)
    ]
    return torch.stack(parts)


def tiles(image: Tensor, size: int) -> Tensor:
    """As few parts of one picture (C, R, R) as cover it, spread evenly: (N, C, size, size)."""
    side = image.shape[-1]
    starts = torch.linspace(0, side - size, math.ceil(side / size)).round().long().tolist()
    return torch.stack([image[:, y : y + size, x : x + size] for y in starts for x in starts])
