"""Generative drifting: attraction to real and repulsion from generated features.

Deng et al. 2026, "Generative Modeling via Drifting" (arXiv 2602.04770).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dinogen.losses.distances import distances


def drift(generated: Tensor, real: Tensor, widths: Sequence[float]) -> tuple[Tensor, Tensor]:
    """Mean squared distance to where the drift fields of all widths, summed, carry each sample.

    Features are scaled so that samples are at a mean distance of the square root of D, and each
    field so that the mean square of its coordinates is 1 (appendix A.6), so the loss says nothing
    about how far training is: the fields' lengths before that do.

    Args:
        generated: (K, N, D), N at least 2: samples of each of K problems.
        real: (K, M, D).
        widths: of the kernels exp(-distance / width), in units of the mean distance.

    Returns:
        (loss; mean length of a field before it was scaled, per square root of D), scalars. Only
        the loss has a gradient.
    """
    with torch.no_grad():
        to_real, to_own = distances(generated, real), distances(generated, generated)
        num = generated.shape[1]
        scale = torch.cat([to_real, to_own], 2).sum((1, 2)) / (num * (real.shape[1] + num - 1))
        scale = scale.clamp(min=1e-8)[:, None, None]
        ours, theirs = generated / scale, real / scale
        goal, lengths = ours.clone(), []
        for width in widths:
            field = drift_field(ours, theirs, to_real / scale, to_own / scale, width)
            length = field.square().mean((1, 2), keepdim=True).sqrt()
            goal += field / length.clamp(min=1e-8)
            lengths.append(length.mean())
    loss = (generated / scale - goal).square().mean()
    return loss, torch.stack(lengths).mean()


def drift_field(
    generated: Tensor, real: Tensor, to_real: Tensor, to_own: Tensor, width: float
) -> Tensor:
    """Where samples are carried: to reals near them, away from generated ones near them.

    Algorithm 2 of the paper: the kernel is normalised over both sets and, geometrically averaged
    with that, over the generated samples. It is 0 in expectation where the distributions are the
    same, by antisymmetry.

    Args:
        generated: (K, N, D).
        real: (K, M, D).
        to_real: distances (K, N, M).
        to_own: distances (K, N, N); a sample does not repel itself.
        width: of the kernel, in units of the distances.

    Returns:
        (K, N, D).
    """
    num_real = real.shape[1]
    alone = torch.eye(generated.shape[1], dtype=torch.bool, device=generated.device)
    logits = torch.cat([to_real, to_own.masked_fill(alone, torch.inf)], 2) / -width
    weights = (logits.softmax(2) * logits.softmax(1)).sqrt()
    attracts, repels = weights[:, :, :num_real], weights[:, :, num_real:]
    pull = (attracts * repels.sum(2, keepdim=True)) @ real
    push = (repels * attracts.sum(2, keepdim=True)) @ generated
    return pull - push
