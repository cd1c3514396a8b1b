"""Adaptive discriminator augmentation: the pipeline, and the probability that it follows.

Karras et al. 2020, "Training Generative Adversarial Networks with Limited Data", section 3 and
appendix B. What D sees, real or generated, goes through the same pipeline; it is differentiable
twice, so that G and R1 see through it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dinogen.networks.ada.transforms import (
    TransformDraws,
    add_noise,
    amplify,
    apply,
    band_gains,
    blit,
    blit_matrices,
    color,
    color_matrices,
    cut_out,
    geometry_matrices,
    warp,
)
from dinogen.transfer import Arrivals, to_device

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
    images: Tensor,
    p: float | tuple[float, ...],
    seed: int,
    purpose: str,
    positions: Tensor,
    strengths: Strengths,
    choice: Tensor | None = None,
) -> Tensor:
    """Each transform of the pipeline, each with probability p (times its strength) per sample.

    Args:
        images: (B, 3, R, R) in [-1, 1].
        p: probability, 0 to 1; at 0 the images are returned unchanged. Or several of which the
            device knows the right one.
        seed: the run's seed.
        purpose: what the images are for; other purposes give independent random numbers.
        positions: (B,) int64 on the CPU, places of the samples in the global order.
        strengths: of the groups.
        choice: () int64 on the images' device, which of several p holds.

    Returns:
        (B, 3, R, R) float32; generated and noisy images leave [-1, 1].
    """
    draws = TransformDraws(seed, purpose, positions)
    several = torch.tensor(p, dtype=torch.float64).view(-1, 1)
    with torch.autocast(images.device.type, enabled=False):
        x, size = images.float(), images.shape[-1]
        steps = (
            blit(x, blit_matrices(draws, several * strengths.blit, size)),
            warp(x, geometry_matrices(draws, several * strengths.geometry, size)),
            color(x, color_matrices(draws, several * strengths.color)),
            amplify(x, band_gains(draws, several * strengths.filter)),
            add_noise(x, draws, several * strengths.corruption),
            cut_out(x, draws, several * strengths.corruption),
        )
        return apply(x, steps, choice)


class AugmentProbability(nn.Module):
    """p and what decides it: r_t = E[sign(D(real))], over the last few steps.

    Where D overfits, its logits of real images are ever more often positive; p follows, so that
    r_t stays near its target (section 3). All of it is in buffers, so a resumed run goes on
    exactly.

    The device computes p, and the host needs it for its matrices without waiting. What p became in
    a step arrives at the beginning of the next one. Until then the host knows that it may have
    moved by one step up or down, and :meth:`candidates` are these.
    """

    p: Tensor
    sign_sum: Tensor
    num_steps: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("p", torch.zeros(()))
        self.register_buffer("sign_sum", torch.zeros(()))
        self.register_buffer("num_steps", torch.zeros((), dtype=torch.int64))
        # what the host read last, p and num_steps, and by how much an update since then moves p
        self._read = (0.0, 0)
        self._pending: float | None = None
        self._arrivals: Arrivals[None] | None = None
        self._candidates: tuple[tuple[float, ...], Tensor | None] | None = None
        self.register_load_state_dict_post_hook(_read_now)

    @property
    def on_host(self) -> bool:
        """Whether reading p waits for nothing."""
        return self.p.device.type == "cpu"

    @torch.no_grad()
    def update(self, sign: Tensor, batch: int, target: float, kimg: float) -> None:
        """Take in one step, and move p after every :data:`INTERVAL` of them.

        Args:
            sign: mean sign of D's logits of the real images of a global batch.
            batch: size of the global batch.
            target: of r_t.
            kimg: thousands of images in which p can go from 0 to 1.
        """
        change = batch * INTERVAL / (kimg * 1000)
        sign_sum, num_steps = self.sign_sum + sign, self.num_steps + 1
        full = num_steps >= INTERVAL
        excess = torch.sign(sign_sum / INTERVAL - target) * full
        self.p.add_(excess * change).clamp_(0, 1)
        self.sign_sum.copy_(sign_sum.masked_fill(full, 0))
        self.num_steps.copy_(num_steps.masked_fill(full, 0))
        self._pending = change

    def candidates(self, begins: bool) -> tuple[tuple[float, ...], Tensor | None]:
        """What p can be, and which of that it is: () int64 on its device, None if there is one.

        Args:
            begins: whether a step begins here, which is when p as of the last one is here.
        """
        if self.on_host:
            return (float(self.p),), None
        if begins and self._pending is not None:
            self._receive()
        if self._pending is None:
            return (self._read[0],), None
        if self._candidates is None:
            # Not in the update: what it did is taken back where D's update was not finite.
            self._arrivals = Arrivals(self.p.device)
            self._arrivals.send(None, {"p": self.p, "num_steps": self.num_steps})
            self._candidates = self._moved(self._pending)
        return self._candidates

    def _receive(self) -> None:
        if self._arrivals is None:
            _read_now(self)
            return
        _, numbers = self._arrivals.receive()
        self._read = numbers["p"], int(numbers["num_steps"])
        self._pending = self._arrivals = self._candidates = None

    def _moved(self, change: float) -> tuple[tuple[float, ...], Tensor | None]:
        p, num_steps = self._read
        if num_steps + 1 < INTERVAL:
            return (p,), None
        # the device's arithmetic, to the bit
        moved = torch.tensor(p) + torch.tensor([-1.0, 0.0, 1.0]) * change
        values = moved.clamp(0, 1).unique()
        between = to_device((values[1:] + values[:-1]) / 2, self.p.device)
        return tuple(values.tolist()), torch.bucketize(self.p, between)


def _read_now(ada: AugmentProbability, *_: Any) -> None:
    """Wait for p and read it; outside of steps."""
    ada._read = float(ada.p), int(ada.num_steps)
    ada._pending = ada._arrivals = ada._candidates = None
