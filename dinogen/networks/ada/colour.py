"""Colour transforms of the augmentation pipeline, as matrices over homogeneous (r, g, b, 1).

Karras et al. 2020, "Training Generative Adversarial Networks with Limited Data", appendix B.
Matrices are (B, 4, 4) float64 on the CPU; pictures are in [-1, 1].
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dinogen.networks.ada.rng import TransformDraws

# the axis of grey
LUMA = torch.tensor([1.0, 1.0, 1.0, 0.0], dtype=torch.float64) / math.sqrt(3)


def color_matrices(draws: TransformDraws, p: float) -> Tensor:
    """Brightness, contrast, luma flip, hue rotation, saturation."""
    matrix = brightness(0.2 * draws.normal("brightness") * draws.happens("brightness", p))
    matrix = contrast(2 ** (0.5 * draws.normal("contrast") * draws.happens("contrast", p))) @ matrix
    flipped = draws.happens("luma_flip", p) & (draws.uniform("luma_flip") < 0.5)
    matrix = luma_flip(flipped.double()) @ matrix
    angle = (2 * draws.uniform("hue") - 1) * math.pi
    matrix = hue(angle * draws.happens("hue", p)) @ matrix
    strength = 2 ** (draws.normal("saturation") * draws.happens("saturation", p))
    return saturation(strength) @ matrix


def color(images: Tensor, matrices: Tensor) -> Tensor:
    """Apply matrices (B, 4, 4) to the colours of pictures (B, 3, R, R)."""
    if bool((matrices == torch.eye(4)).all()):
        return images
    m = matrices.to(images)
    return (m[:, :3, :3] @ images.flatten(2) + m[:, :3, 3:]).view_as(images)


def brightness(amount: Tensor) -> Tensor:
    """Add (B,) amounts to all colours."""
    matrix = torch.eye(4, dtype=torch.float64).repeat(len(amount), 1, 1)
    matrix[:, :3, 3] = amount[:, None]
    return matrix


def contrast(factor: Tensor) -> Tensor:
    """Multiply all colours by (B,) factors."""
    return torch.diag_embed(torch.stack([factor, factor, factor, torch.ones_like(factor)], -1))


def luma_flip(flipped: Tensor) -> Tensor:
    """Turn light into dark where (B,) is 1, leaving hue and saturation: a Householder matrix."""
    return _identity() - 2 * torch.outer(LUMA, LUMA) * flipped[:, None, None]


def hue(angle: Tensor) -> Tensor:
    """Rotate colours about the axis of grey by (B,) radians (Rodrigues' formula)."""
    x, y, z, _ = LUMA.tolist()
    cross = torch.zeros(4, 4, dtype=torch.float64)
    cross[:3, :3] = torch.tensor([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    sin, cos = angle.sin()[:, None, None], angle.cos()[:, None, None]
    return _identity() + sin * cross + (1 - cos) * (cross @ cross)


def saturation(factor: Tensor) -> Tensor:
    """Multiply what is not grey in a colour by (B,) factors."""
    grey = torch.outer(LUMA, LUMA)
    grey[3, 3] = 1
    return grey + (_identity() - grey) * factor[:, None, None]


def _identity() -> Tensor:
    return torch.eye(4, dtype=torch.float64)
