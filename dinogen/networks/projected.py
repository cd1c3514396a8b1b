"""The projected discriminator: small trained heads on the maps of a frozen guide's layers.

Sauer et al. 2021, "Projected GANs Converge Faster" (section 3), and Sauer et al. 2023, "StyleGAN-T:
Unlocking the Power of GANs for Fast Large-Scale Text-to-Image Synthesis" (section 3.2).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor, nn

from dinogen.networks.layers import spectral_norm

LEAK = 0.2
CHANNELS_PER_GROUP = 8


class Head(nn.Module):
    """1x1 convolution, a residual 3x3, 1x1 to a logit per location; all spectrally normalised.

    As StyleGAN-T's, but over the locations of the map instead of the row of tokens. Group norm
    replaces its batch norm over small groups of samples, which would make an image's logits
    depend on its neighbours, and the loss on how a batch is split over parts and ranks.

    Args:
        num_in: channels of the map.
        width: channels inside; a multiple of 8.
    """

    def __init__(self, num_in: int, width: int) -> None:
        super().__init__()
        self.enter = _block(num_in, width, 1)
        self.residual = _block(width, width, 3)
        self.logit = _convolution(width, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, g, g) -> logits (B, g, g) float32."""
        x = self.enter(x)
        x = (x + self.residual(x)) * math.sqrt(0.5)
        logits: Tensor = self.logit(x)
        return logits.squeeze(1).float()


class ProjectedHeads(nn.Module):
    """One head for each layer of a guide.

    Spectral norms iterate in :func:`dinogen.networks.layers.update_spectral_norms` alone, once per
    step.

    Args:
        num_channels: of each layer's map.
        width: channels inside each head; a multiple of 8.
    """

    def __init__(self, num_channels: Sequence[int], width: int = 128) -> None:
        super().__init__()
        self.heads = nn.ModuleList(Head(num_in, width) for num_in in num_channels)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Maps (B, C, g, g), one per layer -> as many logits (B, g, g) float32.

        Positive means real.

        Raises:
            ValueError: more or fewer maps than heads.
        """
        return [head(x) for head, x in zip(self.heads, maps, strict=True)]


def _block(num_in: int, num_out: int, kernel: int) -> nn.Sequential:
    norm = nn.GroupNorm(num_out // CHANNELS_PER_GROUP, num_out)
    return nn.Sequential(_convolution(num_in, num_out, kernel), norm, nn.LeakyReLU(LEAK))


def _convolution(num_in: int, num_out: int, kernel: int) -> nn.Module:
    convolution = nn.Conv2d(num_in, num_out, kernel, padding=kernel // 2)
    # all singular values begin as 1, so no signal is lost on the way
    nn.init.orthogonal_(convolution.weight)
    assert convolution.bias is not None
    nn.init.zeros_(convolution.bias)
    return spectral_norm(convolution)
