"""Losses over CLIP embeddings: likeness to the condition, and stand-ins for texts.

After Zhou et al. 2022, "Towards Language-Free Training for Text-to-Image Generation" (LAFITE).
Embeddings are (B, E), of any length but zero.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def clip_loss(generated: Tensor, condition: Tensor) -> Tensor:
    """Mean of 1 - cos between pictures and what they were asked to be.

    Args:
        generated: (B, E) embeddings of generated pictures.
        condition: (B, E) embeddings of pictures or captions.

    Returns:
        Scalar float32, from 0 to 2.
    """
    return 1 - F.cosine_similarity(generated.float(), condition.float(), dim=1).mean()


def pseudo_text(embedding: Tensor, eps: Tensor, xi: float) -> Tensor:
    """Image embeddings moved about as far as their captions are: h' in the place of a text's.

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


def contrastive_loss(images: Tensor, conditions: Tensor, temperature: float) -> Tensor:
    """Each condition has to find its own picture among those of the batch.

    LAFITE's L_ConG, or L_ConD for a discriminator's features:
    -tau log softmax_j(cos(x_j, h_i) / tau) at j = i, here the mean over i in place of the sum. (The
    authors' code takes the exponential twice, and says so; this is the paper's formula.) It
    compares the samples of a batch with each other, so it has to be given the whole global batch.

    Args:
        images: (B, E) embeddings of generated pictures x.
        conditions: (B, E) what each was asked to be, h.
        temperature: tau.

    Returns:
        Scalar float32, at least 0; tau log B where nothing is told apart.
    """
    x, h = F.normalize(images.float(), dim=1), F.normalize(conditions.float(), dim=1)
    # autocast would make the products half precision
    with torch.autocast(x.device.type, enabled=False):
        logits = h @ x.T / temperature
    return temperature * F.cross_entropy(logits, torch.arange(len(x), device=x.device))
