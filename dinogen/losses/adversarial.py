"""Adversarial losses over logits, and the penalties on gradients of D and G that go with them."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel


def bce_d(real: Tensor, fake: Tensor) -> Tensor:
    """D's cross-entropy (Goodfellow et al. 2014, equation 1), from logits."""
    return F.softplus(-real.float()).mean() + F.softplus(fake.float()).mean()


def bce_g(fake: Tensor) -> Tensor:
    """G's non-saturating loss, -log D(G(z)) (Goodfellow et al. 2014, section 3)."""
    return F.softplus(-fake.float()).mean()


def wasserstein_d(real: Tensor, fake: Tensor) -> Tensor:
    """The critic's loss (Arjovsky et al. 2017, equation 3): lower means a larger distance."""
    return fake.float().mean() - real.float().mean()


def wasserstein_g(fake: Tensor) -> Tensor:
    """G's loss against a critic (Arjovsky et al. 2017, theorem 3)."""
    return -fake.float().mean()


def hinge_d(real: Tensor, fake: Tensor) -> Tensor:
    """D's hinge loss (Miyato et al. 2018, equation 16)."""
    return F.relu(1 - real.float()).mean() + F.relu(1 + fake.float()).mean()


def hinge_g(fake: Tensor) -> Tensor:
    """G's loss against a hinge D (Miyato et al. 2018, equation 17)."""
    return -fake.float().mean()


def relativistic_d(real: Tensor, fake: Tensor) -> Tensor:
    """D's loss over pairs of a real and a generated image: the real one should score higher.

    log(1 + exp(D(G(z)) - D(x))), the pairing loss of Jolicoeur-Martineau 2019, "The relativistic
    discriminator", as Huang et al. 2024, "The GAN is dead; long live the GAN! A Modern GAN
    Baseline" (section 2) use it; they show that it needs R1 and R2 to converge. The
    logits have the same shape; each is paired with the one at the same index.
    """
    return F.softplus(fake.float() - real.float()).mean()


def relativistic_g(real: Tensor, fake: Tensor) -> Tensor:
    """G's loss over the same pairs, in the opposite order (see :func:`relativistic_d`)."""
    return F.softplus(real.float() - fake.float()).mean()


Discriminator = Callable[[Tensor], Tensor]


def gradient_penalty(D: Discriminator, real: Tensor, fake: Tensor, eps: Tensor) -> Tensor:
    """Mean of (|grad D(x)| - 1)^2 between real and generated images.

    Gulrajani et al. 2017, "Improved Training of Wasserstein GANs", equation 3, without lambda:
    x = eps * real + (1 - eps) * fake.

    Args:
        D: images (B, ...) -> logits, each depending on its own image alone.
        real: images (B, ...).
        fake: images of the same shape; no gradient flows to them.
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
    """Mean of |grad D(x)|^2 over real images.

    Mescheder et al. 2018, "Which Training Methods for GANs do actually Converge?", equation 9,
    without its factor gamma / 2. Of generated images it is R2 (their section 4.1).

    Args:
        D: images (B, ...) -> logits.
        real: images (B, ...), or features that D begins with; no gradient flows to them.

    Returns:
        Scalar float32.
    """
    with torch.autocast(real.device.type, enabled=False):
        gradient, logits = _gradient(D, real.detach().float())
        return gradient.square().flatten(1).sum(1).mean() + 0 * logits.sum()


def _gradient(D: Discriminator, images: Tensor) -> tuple[Tensor, Tensor]:
    """(D's gradient at the images, its logits there), both differentiable."""
    images = images.requires_grad_()
    # a guide's attention may be a part of D, and the fused kernels have no second derivative
    with sdpa_kernel(SDPBackend.MATH):
        logits = D(images).float()
    (gradient,) = torch.autograd.grad(logits.sum(), images, create_graph=True)
    return gradient, logits


def path_lengths(images: Tensor, ws: Tensor, noise: Tensor) -> Tensor:
    """|J' y| of each sample: how far the image moves with w, seen along random directions y.

    Karras et al. 2020, "Analyzing and Improving the Image Quality of StyleGAN", equation 4, where
    J is the Jacobian of the image with respect to w. Differentiable itself, so all of it must
    be computed in float32.

    Args:
        images: (B, C, H, W), computed from ``ws``.
        ws: (B, L, w_dim), one w for each of L layers; lengths are their root mean square.
        noise: standard normal, of the images' shape.

    Returns:
        (B,) float32.
    """
    directions = noise / math.sqrt(images.shape[2] * images.shape[3])
    (gradient,) = torch.autograd.grad((images * directions).sum(), ws, create_graph=True)
    return gradient.square().sum(2).mean(1).sqrt()
