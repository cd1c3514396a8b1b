"""Residual generator and critic of WGAN-GP and SAGAN.

Gulrajani et al. 2017, "Improved Training of Wasserstein GANs" (appendix C, residual networks), and
Zhang et al. 2019, "Self-Attention Generative Adversarial Networks": blocks with pre-activation,
nearest upsampling in the generator and mean pooling in the critic, a shortcut around each.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dinogen.networks.casts import Weights, cast_together, conv
from dinogen.networks.layers import (
    GroupNorm,
    InstanceNorm,
    SelfAttention,
    leaky_relu,
    nearest_conv,
    spectral_norm,
)

GeneratorNorm = Literal["batch", "group"]
CriticNorm = Literal["instance", "spectral"]
LEAK = 0.2
CHANNELS_PER_GROUP = 16


class ResnetGenerator(nn.Module):
    """z -> dense to 4x4 -> residual blocks, each doubling -> norm, ReLU, 3x3 to RGB -> tanh.

    Args:
        resolution: side of the images, a power of two from 8.
        z_dim: size of the latent.
        channels: channels at the full resolution, doubled at each halving ...
        channel_max: ... and at most this.
        norm: batch norm (WGAN-GP), or group norm over 16 neighbouring channels, with which an
            image does not depend on the others of its batch.
        attention: sizes of the maps that go through self-attention.
        spectral: spectral norm of all weights too (SAGAN, section 4.1).
    """

    def __init__(
        self,
        resolution: int,
        z_dim: int = 128,
        channels: int = 64,
        channel_max: int = 512,
        norm: GeneratorNorm = "batch",
        attention: tuple[int, ...] = (),
        spectral: bool = False,
    ) -> None:
        super().__init__()
        widths = _widths(resolution, channels, channel_max, attention)
        self.dense = nn.Linear(z_dim, 16 * widths[4], bias=False)
        layers: list[nn.Module] = []
        for size, width in widths.items():
            if size > 4:
                layers.append(UpBlock(widths[size // 2], width, norm))
            if size in attention:
                layers.append(SelfAttention(width))
        self.layers = nn.Sequential(*layers)
        self.norm = _norm(norm, widths[resolution])
        self.to_rgb = nn.Conv2d(widths[resolution], 3, 3, padding=1)
        _initialise(self)
        if spectral:
            _normalise(self.dense, *self.layers.modules(), self.to_rgb)

    def forward(self, z: Tensor) -> Tensor:
        """Latents (B, z_dim) -> images (B, 3, R, R) in [-1, 1]."""
        x = self.layers(self.dense(z).unflatten(1, (-1, 4, 4)))
        own = iter(cast_together(self.norm, self.to_rgb))
        x = F.relu(_normalised(self.norm, x, own))
        return torch.tanh(conv(self.to_rgb, x, next(own)).float())


class ResnetCritic(nn.Module):
    """3x3 from RGB -> residual blocks, each halving, down to 4x4 -> one linear map of it all.

    For a Wasserstein loss the last map has no bias, which the loss would cancel, and no spectral
    norm: the gradient penalty requires a slope of 1, and a chain of layers of norm 1 with LeakyReLU
    between them is always flatter, so one free factor has to make up for it. For a hinge loss,
    whose margins are absolute, it has both.

    Args:
        resolution: side of the images, a power of two from 8.
        channels: channels at the full resolution, doubled at each halving ...
        channel_max: ... and at most this.
        norm: instance norm, which mixes no samples as the gradient penalty demands (section 4 of
            WGAN-GP, which took layer norm), or spectral norm of all weights but the last.
        attention: sizes of the maps that go through self-attention.
        hinge: the last map has a bias, and spectral norm where the others have it.
    """

    def __init__(
        self,
        resolution: int,
        channels: int = 64,
        channel_max: int = 512,
        norm: CriticNorm = "instance",
        attention: tuple[int, ...] = (),
        hinge: bool = False,
    ) -> None:
        super().__init__()
        widths = _widths(resolution, channels, channel_max, attention)
        self.from_rgb = nn.Conv2d(3, widths[resolution], 3, padding=1)
        layers: list[nn.Module] = []
        for size, width in reversed(widths.items()):
            if size in attention:
                layers.append(SelfAttention(width))
            if size > 4:
                layers.append(DownBlock(width, widths[size // 2], norm))
        self.layers = nn.Sequential(*layers)
        self.linear = nn.Linear(16 * widths[4], 1, bias=hinge)
        _initialise(self)
        if norm == "spectral":
            _normalise(self.from_rgb, *self.layers.modules())
            if hinge:
                _normalise(self.linear)

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, 3, R, R) -> scores (B,)."""
        x = conv(self.from_rgb, images, *cast_together(self.from_rgb))
        x = leaky_relu(self.layers(x), LEAK)
        scores: Tensor = self.linear(x.flatten(1)).flatten()
        return scores


class UpBlock(nn.Module):
    """Norm, ReLU, upsample, 3x3, norm, ReLU, 3x3; the shortcut is upsampled and 1x1."""

    def __init__(self, in_channels: int, out_channels: int, norm: GeneratorNorm) -> None:
        super().__init__()
        self.norm0 = _norm(norm, in_channels)
        self.conv0 = nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False)
        self.norm1 = _norm(norm, out_channels)
        self.conv1 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.shortcut = _shortcut(in_channels, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """(B, I, R, R) -> (B, O, 2R, 2R)."""
        own = iter(cast_together(self.norm0, self.norm1, self.conv1, self.shortcut))
        y = nearest_conv(F.relu(_normalised(self.norm0, x, own)), self.conv0.weight)
        y = F.relu(_normalised(self.norm1, y, own))
        y = conv(self.conv1, y, next(own))
        # 1x1 and nearest upsampling commute; in this order it is a quarter of the work
        if isinstance(self.shortcut, nn.Conv2d):
            x = conv(self.shortcut, x, next(own))
        # CUDA's autocast would upsample in float32, and leave all that follows so
        with torch.autocast(x.device.type, enabled=False):
            return y + F.interpolate(x, scale_factor=2, mode="nearest")


class DownBlock(nn.Module):
    """(Norm,) LeakyReLU, 3x3, (norm,) LeakyReLU, 3x3, mean pool; the shortcut is pooled and 1x1."""

    def __init__(self, in_channels: int, out_channels: int, norm: CriticNorm) -> None:
        super().__init__()
        instance = norm == "instance"
        self.norm0 = _norm(norm, in_channels)
        self.conv0 = nn.Conv2d(in_channels, in_channels, 3, padding=1, bias=not instance)
        self.norm1 = _norm(norm, in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.shortcut = _shortcut(in_channels, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """(B, I, R, R) -> (B, O, R/2, R/2)."""
        own = iter(cast_together(self.norm0, self.conv0, self.norm1, self.conv1, self.shortcut))
        y = x
        for norm, layer in ((self.norm0, self.conv0), (self.norm1, self.conv1)):
            y = leaky_relu(_normalised(norm, y, own), LEAK)
            y = conv(layer, y, next(own))
        x = F.avg_pool2d(x, 2)
        if isinstance(self.shortcut, nn.Conv2d):
            x = conv(self.shortcut, x, next(own))
        return x + F.avg_pool2d(y, 2)


def _widths(
    resolution: int, channels: int, channel_max: int, attention: tuple[int, ...]
) -> dict[int, int]:
    """Channels of the maps from 4 to the resolution."""
    if resolution < 8 or resolution & (resolution - 1):
        raise ValueError(f"resolution {resolution} is not a power of two from 8")
    sizes = [4 << i for i in range((resolution // 4).bit_length())]
    if not set(attention) <= set(sizes):
        raise ValueError(f"attention at {attention}: the maps have sizes {sizes}")
    return {size: min(channel_max, channels * resolution // size) for size in sizes}


def _norm(norm: GeneratorNorm | CriticNorm, channels: int) -> nn.Module:
    if norm == "batch":
        return nn.BatchNorm2d(channels)
    if norm == "instance":
        return InstanceNorm(channels)
    if norm == "group":
        # 16, or as many as divide an odd width
        return GroupNorm(channels // math.gcd(channels, CHANNELS_PER_GROUP), channels)
    return nn.Identity()  # spectral norm is one of weights


def _normalised(norm: nn.Module, x: Tensor, own: Iterator[Weights]) -> Tensor:
    """The norm of x, with the next of the weights if it has some that are cast."""
    if isinstance(norm, (GroupNorm, InstanceNorm)):
        return norm.normalized(x, *next(own))
    y: Tensor = norm(x)
    return y


def _shortcut(in_channels: int, out_channels: int) -> nn.Module:
    if in_channels == out_channels:
        return nn.Identity()
    return nn.Conv2d(in_channels, out_channels, 1, bias=False)


def _initialise(network: nn.Module) -> None:
    """He's for what ReLU follows, unit gain for shortcuts and attention; biases 0."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            relu = module.kernel_size == (3, 3)
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu" if relu else "linear")
        elif isinstance(module, nn.Linear):
            nn.init.kaiming_normal_(module.weight, nonlinearity="linear")
        if isinstance(module, (nn.Conv2d, nn.Linear)) and module.bias is not None:
            nn.init.zeros_(module.bias)


def _normalise(*modules: nn.Module) -> None:
    """Spectral norm of the weights of convolutions and linear maps among the modules."""
    for module in modules:
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            # all singular values begin as 1, so no signal is lost on the way
            nn.init.orthogonal_(module.weight)
            spectral_norm(module)
