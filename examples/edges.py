"""A guide of one's own: Sobel's edges of the brightness, in the direction and in strength.

dinogen prepare PHOTOS data/faces guide.file=edges.py
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dinogen.config import GuideConfig
from dinogen.features import GuideError, GuideInfo
from dinogen.files import weights_sha256

DEFAULT_PATH = None  # guide.path where the config gives none; None: there are no weights
CELL = 4  # pixels per location


class Edges(nn.Module):
    """Three channels: the change to the right, the change downwards, and the length of both."""

    kernels: Tensor

    def __init__(self) -> None:
        super().__init__()
        across = torch.tensor([[-1.0, 0.0, 1.0], [-2.0, 0.0, 2.0], [-1.0, 0.0, 1.0]]) / 8
        self.register_buffer("kernels", torch.stack([across, across.T])[:, None])
        self.info = GuideInfo(
            name="edges",
            path="Sobel",
            revision=None,
            weights_sha256=weights_sha256({"kernels": self.kernels}),
            num_channels=3,
            layer=-1,
            random=False,
        )

    def input_size(self, grid: int) -> int:
        """Side in pixels of the image whose map is exactly grid x grid."""
        return CELL * grid

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, S, S) RGB in [-1, 1] -> (B, 3, S / 4, S / 4)."""
        grey = images.float().mean(1, keepdim=True)
        edges = F.conv2d(F.pad(grey, (1, 1, 1, 1), mode="replicate"), self.kernels)
        length = (edges.square().sum(1, keepdim=True) + 1e-6).sqrt()
        return F.avg_pool2d(torch.cat([edges, length], 1), CELL)


def load(config: GuideConfig, device: torch.device) -> Edges:
    """The guide, on a device."""
    if config.layer != -1:
        raise GuideError(f"guide.layer: {config.layer}: edges have no layers: leave it out")
    return Edges().to(device)


def layer_channels(config: GuideConfig) -> tuple[int, ...]:
    """C of each layer of the config, without loading the guide."""
    return (3,)
