"""Exponential moving average of weights, its half-life measured in images."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from dinogen.config import EmaConfig


def ema_decay(batch: int, nimg: float, config: EmaConfig) -> float:
    """Decay of one step: 0.5 ** (batch / half-life), the half-life ramped up from the start.

    As in Karras et al. 2020, "Training Generative Adversarial Networks with Limited Data"
    (appendix C): the half-life is at most ``rampup`` times the images seen.

    Args:
        batch: images of the step, over all ranks.
        nimg: images seen since the average began.
    """
    halflife = min(config.halflife_kimg * 1000, config.rampup * nimg)
    decay: float = 0.5 ** (batch / max(halflife, 1e-8))
    return decay


class Ema:
    """Averaged copies of some networks, in eval mode and without gradients."""

    def __init__(self, networks: Mapping[str, nn.Module], config: EmaConfig) -> None:
        self.config = config
        self.sources = dict(networks)
        self.networks: dict[str, nn.Module] = {
            name: copy.deepcopy(network).eval().requires_grad_(False)
            for name, network in networks.items()
        }

    @torch.no_grad()
    def update(self, batch: int, nimg: float) -> None:
        """Move the averages towards the weights; buffers are copied.

        Args:
            batch: images of the step, over all ranks.
            nimg: images seen since the average began, this step's included.
        """
        decay = ema_decay(batch, nimg, self.config)
        for name, average in self.networks.items():
            source = self.sources[name]
            targets: list[Tensor] = list(average.parameters())
            torch._foreach_lerp_(targets, [p.detach() for p in source.parameters()], 1 - decay)
            for a, b in zip(average.buffers(), source.buffers(), strict=True):
                a.copy_(b)
