"""The identity guide: the RGB values of the image at grid x grid pixels."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dinogen.config import GuideConfig
from dinogen.features.base import GuideError, GuideInfo
from dinogen.files import weights_sha256

DEFAULT_PATH = None  # there are no weights
NUM_CHANNELS = 3


class PixelsGuide(nn.Module):
    """The identity: keeps colours, which feature networks may ignore. Its info names no weights."""

    info = GuideInfo(
        name="pixels",
        path="RGB",
        revision=None,
        weights_sha256=weights_sha256({}),
        num_channels=NUM_CHANNELS,
        layer=-1,
        random=False,
    )

    def input_size(self, grid: int) -> int:
        """Side in pixels of the image whose map is exactly grid x grid: the grid's own."""
        return grid

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, g, g) RGB in [-1, 1] -> the same, float32."""
        return images.float()


def load(config: GuideConfig, device: torch.device) -> PixelsGuide:
    """The guide; it ignores ``path`` and ``revision`` of the config.

    Raises:
        GuideError: a layer other than -1 is requested.
    """
    if config.layer != -1:
        raise GuideError(f"guide.layer: {config.layer}: pixels have no layers: leave it out")
    return PixelsGuide().to(device)


def layer_channels(config: GuideConfig) -> tuple[int, ...]:
    """Three."""
    return (NUM_CHANNELS,)
