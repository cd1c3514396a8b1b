"""Path length regularisation: a step in w should change the picture as much everywhere."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def path_lengths(images: Tensor, ws: Tensor, noise: Tensor) -> Tensor:
    """|J' y| of each sample: how far the picture moves with w, seen along random directions y.

    Karras et al. 2020, "Analyzing and Improving the Image Quality of StyleGAN", equation 4, where
    J is the Jacobian of the picture with respect to w. Differentiable itself, so all of it has to
    be computed in float32.

    Args:
        images: (B, C, H, W), computed from ``ws``.
        ws: (B, L, w_dim), one w for each of L layers; lengths are their root mean square.
        noise: standard normal, of the pictures' shape.

    Returns:
        (B,) float32.
    """
    directions = noise / math.sqrt(images.shape[2] * images.shape[3])
    (gradient,) = torch.autograd.grad((images * directions).sum(), ws, create_graph=True)
    return gradient.square().sum(2).mean(1).sqrt()
