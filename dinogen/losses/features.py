"""Losses against a target: pyramids of guide features, CLIP embeddings, reconstructions."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

Level = TypeVar("Level")


def pyramid_mse(
    generated: Mapping[Level, Tensor], real: Mapping[Level, Tensor], keep: Tensor | None = None
) -> Tensor:
    """Mean squared error of two pyramids, each level counting the same.

    With generated and real images independent, its expectation is at least the mean over levels
    of ``tr Cov(real) / (g*g*C)``: E|f(G(z)) - f(x)|^2 = E|f(G(z)) - mu|^2 + tr Cov f(x). The best
    generator therefore makes the same features for every z; see :func:`collapse_floor`.

    Args:
        generated: by level, (B, grid*grid, C).
        real: the same levels and shapes.
        keep: (B,) bool; the others count 0 in a mean over all samples. All are kept without it.

    Returns:
        Scalar float32.
    """
    levels = [(generated[g].float() - real[g].float()).square().mean((1, 2)) for g in real]
    each = torch.stack(levels).mean(0)
    return (each if keep is None else each * keep).mean()


def alignment(tokens: Tensor, features: Tensor) -> Tensor:
    """Mean cosine between projected hidden tokens and features at the same places.

    Yu et al. 2024, "Representation Alignment for Generation: Training Diffusion Transformers Is
    Easier Than You Think", equation 8, whose loss is its negative.

    Args:
        tokens: (B, g * g, A).
        features: (B, g * g, A), of any float type; they take no gradient.

    Returns:
        Scalar float32 in [-1, 1]; a vector of zeros counts 0.
    """
    return F.cosine_similarity(tokens.float(), features.float().detach(), dim=-1).mean()


def collapse_floor(total_variances: list[float]) -> float:
    """The least :func:`pyramid_mse` that a generator independent of the target can reach.

    Args:
        total_variances: per level, the variance of real features averaged over locations and
            channels.
    """
    return sum(total_variances) / len(total_variances)


def mean_pairwise_distance(features: Tensor) -> float:
    """Mean Euclidean distance over all pairs of different samples.

    Args:
        features: (N, ...), N at least 2; flattened per sample.
    """
    flat = features.flatten(1).double()
    return float(torch.pdist(flat).mean())


def clip_loss(generated: Tensor, condition: Tensor, keep: Tensor) -> Tensor:
    """Mean over all samples of 1 - cos between images and their conditions.

    Args:
        generated: (B, E) embeddings of generated images.
        condition: (B, E) embeddings of images or captions.
        keep: (B,) bool; False: no condition, which counts 0.

    Returns:
        Scalar float32, from 0 to 2.
    """
    likeness = F.cosine_similarity(generated.float(), condition.float(), dim=1)
    return ((1 - likeness) * keep).mean()


def pseudo_text(embedding: Tensor, eps: Tensor, xi: float) -> Tensor:
    """Image embeddings moved about as far as their captions are: h' in place of a text's.

    LAFITE's fixed perturbations: h' = h + xi |h| eps / |eps|, brought to length 1.
    The cosine of h' with h is (1 + xi c) / sqrt(1 + 2 xi c + xi^2), c the cosine of h with eps.

    Args:
        embedding: (B, E) image embeddings h.
        eps: (B, E) standard normal.
        xi: length of the noise over that of the embedding; 0 leaves it as it is.

    Returns:
        (B, E) float32 of length 1.
    """
    h = embedding.float()
    noise = F.normalize(eps.float(), dim=1) * h.norm(dim=1, keepdim=True)
    return F.normalize(h + xi * noise, dim=1)


def squared_error(generated: Tensor, real: Tensor) -> Tensor:
    """Squared error summed over all values of a sample.

    Half of it is, up to a constant, the negative log likelihood of the real image under a
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
        mean: (B, latent) or (B, latent, s, s).
        log_variance: of the same shape.

    Returns:
        (B,) float32, not negative.
    """
    mean, log_variance = mean.float(), log_variance.float()
    # expm1: near the prior exp(v) - 1 - v is a difference of nearly equal numbers
    return 0.5 * (mean.square() + torch.expm1(log_variance) - log_variance).flatten(1).sum(1)


def reparameterize(mean: Tensor, log_variance: Tensor, noise: Tensor) -> Tensor:
    """A draw of the posterior that can be differentiated to it (Kingma and Welling 2014, 2.4).

    Args:
        mean: (B, latent) or (B, latent, s, s).
        log_variance: of the same shape.
        noise: of the same shape, standard normal.

    Returns:
        Of the same shape.
    """
    return mean + (0.5 * log_variance).exp() * noise


def perceptual_distance(generated: Sequence[Tensor], real: Sequence[Tensor]) -> Tensor:
    """Mean squared difference of each feature map, summed over the maps.

    Johnson et al. 2016, "Perceptual Losses for Real-Time Style Transfer" (equation 2).

    Args:
        generated: maps (B, C, H, W) of one network's layers.
        real: those of other images, alike in number and shapes.

    Returns:
        (B,) float32.
    """
    distances = [
        (a.float() - b.float()).square().flatten(1).mean(1)
        for a, b in zip(generated, real, strict=True)
    ]
    return torch.stack(distances).sum(0)


def psnr(mean_squared_error: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of images in [-1, 1], whose peak is 2.

    Args:
        mean_squared_error: (B,), over the values of each image.

    Returns:
        (B,); a perfect image has infinitely many.
    """
    return 20 * math.log10(2) - 10 * mean_squared_error.log10()
