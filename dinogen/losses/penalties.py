"""Penalties on gradients: WGAN-GP, R1 and R2 of D, path length of G."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

Discriminator = Callable[[Tensor], Tensor]


def gradient_penalty(D: Discriminator, real: Tensor, fake: Tensor, eps: Tensor) -> Tensor:
    """Mean of (|grad D(x)| - 1)^2 between real and generated pictures.

    Gulrajani et al. 2017, "Improved Training of Wasserstein GANs", equation 3, without lambda:
    x = eps * real + (1 - eps) * fake.

    Args:
        D: pictures (B, ...) -> logits, each of its own picture alone.
        real: pictures (B, ...).
        fake: pictures of the same shape; no gradient flows to them.
        eps: uniform in (0, 1), one number per sample, such as (B, 1, 1, 1).

    Returns:
        Scalar float32.
    """
    with torch.autocast(real.device.type, enabled=False):
        between = torch.lerp(fake.detach().float(), real.detach().float(), eps)
        gradient, logits = _gradient(D, between)
        # vector_norm and not sqrt of a sum: it has a finite gradient where the norm is zero
        norm: Tensor = torch.linalg.vector_norm(gradient.flatten(1), dim=1)
        return (norm - 1).square().mean() + 0 * logits.sum()


def r1_penalty(D: Discriminator, real: Tensor) -> Tensor:
    """Mean of |grad D(x)|^2 over real pictures.

    Mescheder et al. 2018, "Which Training Methods for GANs do actually Converge?", equation 9,
    without its factor gamma / 2. Of generated pictures it is R2 (their section 4.1).

    Args:
        D: pictures (B, ...) -> logits.
        real: pictures (B, ...), or features that D begins with; no gradient flows to them.

    Returns:
        Scalar float32.
    """
    with torch.autocast(real.device.type, enabled=False):
        gradient, logits = _gradient(D, real.detach().float())
        return gradient.square().flatten(1).sum(1).mean() + 0 * logits.sum()


def _gradient(D: Discriminator, images: Tensor) -> tuple[Tensor, Tensor]:
    """(D's gradient at the pictures, its logits there), both differentiable."""
    images = images.requires_grad_()
    # a guide's attention may be a part of D, and the fused kernels have no second derivative
    with sdpa_kernel(SDPBackend.MATH):
        logits = D(images).float()
    (gradient,) = torch.autograd.grad(logits.sum(), images, create_graph=True)
    return gradient, logits


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
