"""What is done to pictures before they are learnt from, drawn from (seed, position)."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from dinogen.config import AugmentConfig
from dinogen.distributed import rng

# Rec. 601, as Pillow and torchvision turn RGB into grey
_LUMA = (0.299, 0.587, 0.114)


def augment(images: Tensor, positions: Tensor, seed: int, config: AugmentConfig) -> Tensor:
    """Mirrored, turned and recoloured pictures, in this order; what is 0 is left out.

    Args:
        images: (B, 3, R, R) in [-1, 1].
        positions: (B,) int64, places in the global order: the same picture is changed otherwise
            in each epoch, and alike on any number of ranks.
        seed: of the run.
        config: how much.

    Returns:
        (B, 3, R, R) in [-1, 1].
    """

    def drawn(purpose: str) -> Tensor:
        return rng.uniform(seed, f"augment/{purpose}", positions, device=images.device)

    if config.flip:
        images = flip(images, drawn("flip") < config.flip)
    if config.rotate:
        images = rotate(images, (2 * drawn("rotate") - 1) * config.rotate)
    if config.brightness:
        images = brightness(images, 1 + (2 * drawn("brightness") - 1) * config.brightness)
    if config.contrast:
        images = contrast(images, 1 + (2 * drawn("contrast") - 1) * config.contrast)
    if config.saturation:
        images = saturation(images, 1 + (2 * drawn("saturation") - 1) * config.saturation)
    return images


def flip(images: Tensor, chosen: Tensor) -> Tensor:
    """The mirror images of those chosen, (B,) bool."""
    return torch.where(chosen[:, None, None, None], images.flip(3), images)


def rotate(images: Tensor, degrees: Tensor) -> Tensor:
    """Turned counter-clockwise about the centre by (B,) degrees; the border is mirrored."""
    angle = degrees * (math.pi / 180)
    cos, sin, zero = torch.cos(angle), torch.sin(angle), torch.zeros_like(angle)
    rows = [torch.stack([cos, -sin, zero], 1), torch.stack([sin, cos, zero], 1)]
    grid = F.affine_grid(torch.stack(rows, 1), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="reflection", align_corners=False)


def brightness(images: Tensor, factor: Tensor) -> Tensor:
    """Intensities in [0, 1] times (B,) factors."""
    return _blend(images, -torch.ones_like(images), factor)


def contrast(images: Tensor, factor: Tensor) -> Tensor:
    """Drawn away from each picture's mean grey by (B,) factors."""
    return _blend(images, _grey(images).mean((2, 3), keepdim=True), factor)


def saturation(images: Tensor, factor: Tensor) -> Tensor:
    """Drawn away from each pixel's grey by (B,) factors."""
    return _blend(images, _grey(images), factor)


def _grey(images: Tensor) -> Tensor:
    weights = torch.tensor(_LUMA, device=images.device)[None, :, None, None]
    return (images * weights).sum(1, keepdim=True)


def _blend(images: Tensor, other: Tensor, factor: Tensor) -> Tensor:
    return (other + (images - other) * factor[:, None, None, None]).clamp(-1, 1)
