"""Losses over CLIP embeddings: likeness to the condition, and stand-ins for texts.

After Zhou et al. 2022, "Towards Language-Free Training for Text-to-Image Generation" (LAFITE).
Embeddings are (B, E), of any length but zero.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def clip_loss(generated: Tensor, condition: Tensor, keep: Tensor) -> Tensor:
    """Mean over all samples of 1 - cos between pictures and what they were asked to be.

    Args:
        generated: (B, E) embeddings of generated pictures.
        condition: (B, E) embeddings of pictures or captions.
        keep: (B,) bool; False: asked for nothing, which counts 0.

    Returns:
        Scalar float32, from 0 to 2.
    """
    likeness = F.cosine_similarity(generated.float(), condition.float(), dim=1)
    return ((1 - likeness) * keep).mean()


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
