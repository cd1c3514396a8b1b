"""The convolutional variational autoencoder: images to means and log variances, latents back.

Kingma and Welling 2014, "Auto-Encoding Variational Bayes" (section 3). The decoder upsamples and
convolves: a transposed convolution covers its output unevenly and leaves checkerboards (Odena et
al. 2016, "Deconvolution and Checkerboard Artifacts").
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dinogen.networks.casts import cast_together, conv
from dinogen.networks.layers import GroupNorm, nearest_conv

LEAK = 0.2
SMALLEST = 4  # side of the map between convolutions and latent
WIDEST = 8  # most channels, in base channels
MAX_GROUPS = 8
CHANNELS_PER_GROUP = 8  # at least; a group of one would lose its map's contrast
# Posteriors begin near the prior and images near grey: the first steps do not start from noise.
HEAD_GAIN = 0.1


class ConvNorm(nn.Sequential):
    """Convolution, group norm, LeakyReLU.

    Group norm (Wu and He 2018), as it knows nothing of the batch: an image's latent and a
    latent's image do not depend on the rest of the batch.
    """

    def __init__(self, num_in: int, num_out: int, kernel: int, stride: int = 1) -> None:
        super().__init__(
            nn.Conv2d(num_in, num_out, kernel, stride, padding=(kernel - 1) // 2),
            GroupNorm(min(MAX_GROUPS, num_out // CHANNELS_PER_GROUP), num_out),
            nn.LeakyReLU(LEAK),
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, I, H, W) -> (B, O, H / stride, W / stride)."""
        layer, norm, leak = self
        assert isinstance(layer, nn.Conv2d) and isinstance(norm, GroupNorm)
        own = cast_together(layer, norm)
        y: Tensor = leak(norm.normalized(conv(layer, x, own[0]), *own[1]))
        return y


class UpConv(nn.Module):
    """Nearest upsample, then two 3x3 convolutions."""

    def __init__(self, num_in: int, num_out: int) -> None:
        super().__init__()
        self.conv0 = ConvNorm(num_in, num_out, 3)
        self.conv1 = ConvNorm(num_out, num_out, 3)

    def forward(self, x: Tensor) -> Tensor:
        """(B, I, R, R) -> (B, O, 2R, 2R)."""
        up, norm0, leak = self.conv0
        conv1, norm1, _ = self.conv1
        assert isinstance(up, nn.Conv2d) and isinstance(conv1, nn.Conv2d)
        assert isinstance(norm0, GroupNorm) and isinstance(norm1, GroupNorm)
        own = cast_together(norm0, conv1, norm1)
        x = leak(norm0.normalized(nearest_conv(x, up.weight, up.bias), *own[0]))
        x = norm1.normalized(conv(conv1, x, own[1]), *own[2])
        y: Tensor = leak(x)
        return y


class Residual(nn.Module):
    """x plus two 3x3 convolutions of it, each behind group norm and LeakyReLU.

    He et al. 2016, "Identity Mappings in Deep Residual Networks". What is added to is not
    normalized, so the colours and the contrast of an image reach its latent.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        groups = min(MAX_GROUPS, channels // CHANNELS_PER_GROUP)
        self.norm0 = GroupNorm(groups, channels)
        self.conv0 = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm1 = GroupNorm(groups, channels)
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> the same shape."""
        own = cast_together(self.norm0, self.conv0, self.norm1, self.conv1)
        y = F.leaky_relu(self.norm0.normalized(x, *own[0]), LEAK)
        y = conv(self.conv0, y, own[1])
        y = F.leaky_relu(self.norm1.normalized(y, *own[2]), LEAK)
        return x + conv(self.conv1, y, own[3])


class Upsample(nn.Conv2d):
    """Nearest upsample, then a 3x3 convolution."""

    def __init__(self, num_in: int, num_out: int) -> None:
        super().__init__(num_in, num_out, 3)

    def forward(self, x: Tensor) -> Tensor:
        """(B, I, H, W) -> (B, O, 2H, 2W)."""
        return nearest_conv(x, self.weight, self.bias)


def latent_sides(resolution: int) -> list[int]:
    """Sides that a spatial latent of images of this resolution can have, the smallest first."""
    return [side for side in (4, 8, 16, 32, 64, 128) if side < resolution]


class Autoencoder(nn.Module):
    """Encoder and decoder; called as a whole it decodes, like any other generator.

    The encoder halves the image down to 4x4 by 4x4 convolutions of stride 2, each followed by a
    3x3 convolution, with ``base_channels`` at half the resolution, twice as many at the next, at
    most eight times as many. The decoder is its mirror. Between them dense layers make a vector.

    With ``latent_side`` the encoder stops at maps of that side, and 1x1 convolutions take the
    place of the dense layers: the latent is a small image of ``latent`` channels (Rombach et al.
    2022, "High-Resolution Image Synthesis with Latent Diffusion Models"). As theirs, such a network
    is residual. It has no weights that depend on the resolution.

    Args:
        resolution: side of the images, a power of two from 16 to 256.
        latent: size of the latent; with ``latent_side``, its channels.
        base_channels: channels of the widest maps, a multiple of 8.
        latent_side: side s of a spatial latent, a power of two from 4 to half the resolution; 0
            for a vector.

    Attributes:
        shape: of one latent, (latent,) or (latent, s, s).

    Raises:
        ValueError: another resolution or side.
    """

    def __init__(
        self,
        resolution: int,
        latent: int = 256,
        base_channels: int = 64,
        latent_side: int = 0,
    ) -> None:
        super().__init__()
        if resolution not in (16, 32, 64, 128, 256):
            raise ValueError(f"resolution {resolution} is not a power of two from 16 to 256")
        if latent_side and latent_side not in latent_sides(resolution):
            raise ValueError(
                f"latent_side {latent_side} is not a power of two from {SMALLEST} to half the "
                f"resolution {resolution}"
            )
        self.resolution, self.latent_side = resolution, latent_side
        self.shape = (latent, latent_side, latent_side) if latent_side else (latent,)
        depth = (resolution // (latent_side or SMALLEST)).bit_length() - 1
        channels = [base_channels * min(WIDEST, 1 << i) for i in range(depth)]
        build = self._build_spatial if latent_side else self._build
        build(channels, latent)
        self.to_rgb = nn.Conv2d(channels[0], 3, 3, padding=1)
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.kaiming_normal_(module.weight, a=LEAK)
                nn.init.zeros_(_bias(module))
        if latent_side:
            self._keep_scale()
        for head in (self.to_posterior, self.to_rgb):
            nn.init.xavier_normal_(head.weight, HEAD_GAIN)

    def _build(self, channels: list[int], latent: int) -> None:
        """Layers around a vector."""
        down: list[nn.Module] = []
        for num_in, num_out in itertools.pairwise([3, *channels]):
            down += [ConvNorm(num_in, num_out, 4, stride=2), ConvNorm(num_out, num_out, 3)]
        self.down = nn.Sequential(*down)
        num_values = channels[-1] * SMALLEST**2
        self.to_posterior: nn.Conv2d | nn.Linear = nn.Linear(num_values, 2 * latent)
        self.from_latent: nn.Conv2d | nn.Linear = nn.Linear(latent, num_values)
        mirrored = [*channels[::-1], channels[0]]
        self.up = nn.Sequential(*(UpConv(i, o) for i, o in itertools.pairwise(mirrored)))

    def _build_spatial(self, channels: list[int], latent: int) -> None:
        """Layers around a small image."""
        down: list[nn.Module] = []
        for num_in, num_out in itertools.pairwise([3, *channels]):
            down += [nn.Conv2d(num_in, num_out, 4, stride=2, padding=1), Residual(num_out)]
        self.down = nn.Sequential(*down)
        self.to_posterior = nn.Conv2d(channels[-1], 2 * latent, 1)
        self.from_latent = nn.Conv2d(latent, channels[-1], 1)
        up: list[nn.Module] = [Residual(channels[-1])]
        for num_in, num_out in itertools.pairwise([*channels[::-1], channels[0]]):
            up += [Upsample(num_in, num_out), Residual(num_out)]
        self.up = nn.Sequential(*up)

    def _keep_scale(self) -> None:
        """Let each block begin near its skip, between layers that no LeakyReLU follows."""
        for module in (*self.down, *self.up, self.from_latent):
            if isinstance(module, Residual):
                nn.init.xavier_normal_(module.conv1.weight, HEAD_GAIN)
            elif isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="linear")

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images (B, 3, R, R) in [-1, 1] -> mean and log variance, each (B, *shape) float32."""
        x = self.down(images)
        posterior = self.to_posterior(x if self.latent_side else x.flatten(1)).float()
        mean, log_variance = posterior.chunk(2, dim=1)
        return mean, log_variance

    def decode(self, z: Tensor) -> Tensor:
        """Latents (B, *shape) -> images (B, 3, R, R) float32 in [-1, 1]."""
        x = self.from_latent(z)
        if not self.latent_side:
            x = F.leaky_relu(x.unflatten(1, (-1, SMALLEST, SMALLEST)), LEAK)
        rgb = self.to_rgb(self.up(x))
        return torch.tanh(rgb.float())

    def forward(self, z: Tensor) -> Tensor:
        """As :meth:`decode`."""
        return self.decode(z)


def _bias(module: nn.Conv2d | nn.Linear) -> Tensor:
    assert module.bias is not None
    return module.bias
