"""Adaptive discriminator augmentation: the pipeline, and the probability that it follows.

Karras et al. 2020, "Training Generative Adversarial Networks with Limited Data", section 3 and
appendix B. What D sees, real or generated, goes through the same pipeline; it is differentiable
twice, so that G and R1 see through it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dinogen.networks.ada.transforms import (
    TransformDraws,
    add_noise,
    amplify,
    band_gains,
    blit,
    blit_matrices,
    color,
    color_matrices,
    cut_out,
    geometry_matrices,
    warp,
)

# steps between two changes of p, as in section 3
INTERVAL = 4


@dataclass(frozen=True)
class Strengths:
    """What p is multiplied with for each group of transforms; 0 leaves a group out.

    The paper settles on pixel blitting, geometry and colour ("bgc", section 2.3).
    """

    blit: float = 1.0
    geometry: float = 1.0
    color: float = 1.0
    filter: float = 0.0
    corruption: float = 0.0


def augment(
    images: Tensor, p: float, seed: int, purpose: str, positions: Tensor, strengths: Strengths
) -> Tensor:
    """Each transform of the pipeline, each with probability p (times its strength) per sample.

    Args:
        images: (B, 3, R, R) in [-1, 1].
        p: probability, 0 to 1; at 0 the images are returned unchanged.
        seed: the run's seed.
        purpose: what the images are for; other purposes give independent random numbers.
        positions: (B,) int64 on the CPU, places of the samples in the global order.
        strengths: of the groups.

    Returns:
        (B, 3, R, R) float32; generated and noisy images leave [-1, 1].
    """
    draws = TransformDraws(seed, purpose, positions)
    with torch.autocast(images.device.type, enabled=False):
        x, size = images.float(), images.shape[-1]
        x = blit(x, blit_matrices(draws, p * strengths.blit, size))
        x = warp(x, geometry_matrices(draws, p * strengths.geometry, size))
        x = color(x, color_matrices(draws, p * strengths.color))
        x = amplify(x, band_gains(draws, p * strengths.filter))
        x = add_noise(x, draws, p * strengths.corruption)
        return cut_out(x, draws, p * strengths.corruption)


class AugmentProbability(nn.Module):
    """p and what decides it: r_t = E[sign(D(real))], over the last few steps.

    Where D overfits, its logits of real images are ever more often positive; p follows, so that
    r_t stays near its target (section 3). All of it is in buffers, so a resumed run goes on
    exactly.
    """

    p: Tensor
    sign_sum: Tensor
    num_steps: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("p", torch.zeros(()))
        self.register_buffer("sign_sum", torch.zeros(()))
        self.register_buffer("num_steps", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def update(self, sign: Tensor, batch: int, target: float, kimg: float) -> None:
        """Take in one step, and move p after every :data:`INTERVAL` of them.

        Args:
            sign: mean sign of D's logits of the real images of a global batch.
            batch: size of the global batch.
            target: of r_t.
            kimg: thousands of images in which p can go from 0 to 1.
        """
        self.sign_sum += sign
        self.num_steps += 1
        if self.num_steps < INTERVAL:
            return
        excess = torch.sign(self.sign_sum / INTERVAL - target)
        self.p.add_(excess * (batch * INTERVAL / (kimg * 1000))).clamp_(0, 1)
        self.sign_sum.zero_()
        self.num_steps.zero_()
