"""Differentiable augmentation of fixed strength: colour, translation, cutout.

Zhao et al. 2020, "Differentiable Augmentation for Data-Efficient GAN Training" (section 3), of the
parts of the ADA pipeline. Each transform happens to every image. Two differences to the paper:
what a translation uncovers is a mirror image and not black, and contrast changes about mid grey
and not about the image's mean.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from dinogen.networks.ada.transforms import (
    Step,
    TransformDraws,
    apply,
    blit,
    brightness,
    color,
    contrast,
    cut_out,
    saturation,
    translation,
)

Transform = Literal["color", "translation", "cutout"]
MOST_SHIFT = 0.125  # of the side


def diff_augment(
    images: Tensor, seed: int, purpose: str, positions: Tensor, transforms: Sequence[Transform]
) -> Tensor:
    """The chosen transforms, each with a strength drawn by the sample's position.

    Colour adds -0.5 to 0.5 to all values, multiplies what is not grey by 0 to 2 and contrast by
    0.5 to 1.5; translation is by whole pixels, up to an eighth of the side each way; cutout makes
    a square of half the side grey. It is differentiable twice.

    Args:
        images: (B, 3, R, R) in [-1, 1].
        seed: the run's seed.
        purpose: what the images are for; other purposes give independent random numbers.
        positions: (B,) int64 on the CPU, places of the samples in the global order.
        transforms: which of them; with none the images are returned unchanged.

    Returns:
        (B, 3, R, R) float32; colours leave [-1, 1].
    """
    if not transforms:
        return images
    draws = TransformDraws(seed, purpose, positions)
    with torch.autocast(images.device.type, enabled=False):
        x = images.float()
        steps: list[Step | None] = []
        if "color" in transforms:
            matrices = brightness(draws.uniform("brightness") - 0.5)
            matrices = saturation(2 * draws.uniform("saturation")) @ matrices
            steps.append(color(x, (contrast(0.5 + draws.uniform("contrast")) @ matrices)[None]))
        if "translation" in transforms:
            most = MOST_SHIFT * x.shape[-1]
            shift = ((2 * draws.uniform("translate_whole", i) - 1) * most for i in range(2))
            steps.append(blit(x, translation(*(pixels.round() for pixels in shift))[None]))
        if "cutout" in transforms:
            steps.append(cut_out(x, draws, torch.ones(1, 1)))
        return apply(x, steps)
