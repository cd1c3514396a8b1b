"""DCGAN: transposed convolutions with batch norm against mirrored strided ones.

Radford et al. 2016, "Unsupervised Representation Learning with Deep Convolutional Generative
Adversarial Networks", section 3. No layer has a bias: batch norm has its own, and before it a
convolution's gets no gradient but rounding, which Adam blows up.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

RESOLUTIONS = (16, 32, 64, 128)
LEAK = 0.2
INIT_STD = 0.02


class DcganGenerator(nn.Module):
    """z -> 4x4 -> doubled by each transposed convolution -> tanh.

    Args:
        resolution: side of the images, one of ``RESOLUTIONS``.
        z_dim: size of the latent.
        ngf: channels at half the resolution, doubled at each halving.
    """

    def __init__(self, resolution: int, z_dim: int = 100, ngf: int = 64) -> None:
        super().__init__()
        sizes, channels = _plan(resolution, ngf)
        layers: list[nn.Module] = [nn.ConvTranspose2d(z_dim, channels[4], 4, bias=False)]
        for size in sizes:
            layers += [nn.BatchNorm2d(channels[size]), nn.ReLU()]
            out = channels.get(2 * size, 3)
            layers.append(nn.ConvTranspose2d(channels[size], out, 4, 2, 1, bias=False))
        self.layers = nn.Sequential(*layers)
        _initialise(self)

    def forward(self, z: Tensor) -> Tensor:
        """Latents (B, z_dim) -> images (B, 3, R, R) in [-1, 1]."""
        return torch.tanh(self.layers(z[:, :, None, None]).float())


class DcganDiscriminator(nn.Module):
    """The generator mirrored: strided convolutions, batch norm but for the first, LeakyReLU.

    Args:
        resolution: side of the images, one of ``RESOLUTIONS``.
        ndf: channels at half the resolution, doubled at each halving.
    """

    def __init__(self, resolution: int, ndf: int = 64) -> None:
        super().__init__()
        sizes, channels = _plan(resolution, ndf)
        layers: list[nn.Module] = []
        for size in reversed(sizes):
            before = channels.get(2 * size, 3)
            layers.append(nn.Conv2d(before, channels[size], 4, 2, 1, bias=False))
            if 2 * size != resolution:
                layers.append(nn.BatchNorm2d(channels[size]))
            layers.append(nn.LeakyReLU(LEAK))
        layers.append(nn.Conv2d(channels[4], 1, 4, bias=False))
        self.layers = nn.Sequential(*layers)
        _initialise(self)

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, 3, R, R) -> logits (B,)."""
        logits: Tensor = self.layers(images).flatten()
        return logits


def _plan(resolution: int, width: int) -> tuple[list[int], dict[int, int]]:
    """(sizes of the maps from 4 to half the resolution, channels at each)."""
    if resolution not in RESOLUTIONS:
        raise ValueError(f"resolution {resolution} is not one of {RESOLUTIONS}")
    sizes = [4 << i for i in range((resolution // 4).bit_length() - 1)]
    return sizes, {size: width * resolution // (2 * size) for size in sizes}


def _initialise(network: nn.Module) -> None:
    """N(0, 0.02), batch norm's weights around 1 (section 4; the authors' code)."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight, 1.0, INIT_STD)
        elif isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
            nn.init.normal_(module.weight, 0.0, INIT_STD)
