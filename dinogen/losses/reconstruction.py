"""What autoencoders are taught by: squared error, KL to the prior, distance of features.

All per sample, so that a family's means over samples do not depend on how a batch is cut.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def squared_error(generated: Tensor, real: Tensor) -> Tensor:
    """Squared error summed over all values of a sample.

    Half of it is, up to a constant, the negative log likelihood of the real picture under a
    Gaussian of unit variance about the generated one (Kingma and Welling 2014, appendix C.2).

    Args:
        generated: (B, ...).
        real: of the same shape.

    Returns:
        (B,) float32.
    """
    return (generated.float() - real.float()).square().flatten(1).sum(1)


def kl_to_standard_normal(mean: Tensor, log_variance: Tensor) -> Tensor:
    """KL(N(mean, exp(log_variance)) || N(0, 1)) summed over the latent, in nats.

    Kingma and Welling 2014, appendix B.

    Args:
        mean: (B, latent).
        log_variance: (B, latent).

    Returns:
        (B,) float32, not negative.
    """
    mean, log_variance = mean.float(), log_variance.float()
    # expm1: near the prior exp(v) - 1 - v is a difference of nearly equal numbers
    return 0.5 * (mean.square() + torch.expm1(log_variance) - log_variance).sum(1)


def reparameterize(mean: Tensor, log_variance: Tensor, noise: Tensor) -> Tensor:
    """A draw of the posterior that can be differentiated to it (Kingma and Welling 2014, 2.4).

    Args:
        mean: (B, latent).
        log_variance: (B, latent).
        noise: (B, latent), standard normal.

    Returns:
        (B, latent).
    """
    return mean + (0.5 * log_variance).exp() * noise


def perceptual_distance(generated: Sequence[Tensor], real: Sequence[Tensor]) -> Tensor:
    """Mean squared difference of each feature map, summed over the maps.

    Johnson et al. 2016, "Perceptual Losses for Real-Time Style Transfer" (equation 2).

    Args:
        generated: maps (B, C, H, W) of one network's layers.
        real: those of other pictures, alike in number and shapes.

    Returns:
        (B,) float32.
    """
    distances = [
        (a.float() - b.float()).square().flatten(1).mean(1)
        for a, b in zip(generated, real, strict=True)
    ]
    return torch.stack(distances).sum(0)


def psnr(mean_squared_error: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of pictures in [-1, 1], whose peak is 2.

    Args:
        mean_squared_error: (B,), over the values of each picture.

    Returns:
        (B,); a perfect picture has infinitely many.
    """
    return 20 * math.log10(2) - 10 * mean_squared_error.log10()
