"""How well pictures fit their prompts, from CLIP's embeddings of both: score and retrieval."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

WEIGHT = 2.5


def clip_score(images: Tensor, texts: Tensor) -> float:
    """Mean of 2.5 max(cos, 0) over pictures and their own texts.

    Hessel et al. 2021, "CLIPScore: A Reference-free Evaluation Metric for Image Captioning",
    equation 1. torchmetrics' figure of the same name has 100 in place of 2.5, and takes the maximum
    after the mean.

    Args:
        images: (N, E), of any length but zero.
        texts: (N, E), row by row those of ``images``.

    Returns:
        From 0 to 2.5; higher is better. Figures of two CLIPs do not compare.

    Raises:
        ValueError: no rows, or shapes that differ.
    """
    if images.shape != texts.shape or not len(images):
        raise ValueError(f"pictures {tuple(images.shape)} against texts {tuple(texts.shape)}")
    cosines = F.cosine_similarity(images.double(), texts.double(), dim=1)
    return float(WEIGHT * cosines.clamp(min=0).mean())


def retrieval_accuracy(images: Tensor, prompts: Tensor, own: Tensor) -> float:
    """Share of pictures that are nearer to their own prompt than to any other.

    CLIP R-precision of Park et al. 2021, "Benchmark for Compositional Text-to-Image Synthesis",
    with all P prompts as candidates. A tie is a miss, so that a CLIP or a generator that
    tells nothing apart gets 0.

    Args:
        images: (N, E), of any length but zero.
        prompts: (P, E), P at least 2, no two alike.
        own: (N,) int64, each picture's row of ``prompts``.

    Returns:
        From 0 to 1; 1 / P by chance.

    Raises:
        ValueError: no pictures, or a single prompt.
    """
    if not len(images) or len(prompts) < 2:
        raise ValueError(f"{len(images)} pictures and {len(prompts)} prompts: nothing to find")
    cosines = F.normalize(images.double(), dim=1) @ F.normalize(prompts.double(), dim=1).T
    mine = cosines.gather(1, own[:, None].to(cosines.device))
    others = cosines.scatter(1, own[:, None].to(cosines.device), -torch.inf)
    return float((mine[:, 0] > others.amax(1)).double().mean())
