"""The generator of StyleGAN2: mapping network, modulated convolutions, noise, skip connections.

Karras et al. 2020, "Analyzing and Improving the Image Quality of StyleGAN" (figure 2d for a layer,
figure 7b for the skips).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dinogen.networks.convolution import conv2d
from dinogen.networks.layers import binomial, conv_up, upsample
from dinogen.networks.stylegan2.layers import (
    CLAMP,
    Dense,
    Mapping,
    activate,
    autocast_if,
    channels_at,
    follows_autocast,
    in_float16,
    per_channel,
    sizes_up_to,
)


class ModulatedConv(nn.Module):
    """A convolution whose weights w (per sample) scales by input and brings back to unit norm.

    Equations 1 and 3 of the paper: w'_ijk = s_i w_ijk, w''_ijk = w'_ijk / |w'_j|. Instead of one
    kernel per sample, the input is scaled by s before one common convolution, and its output by
    1 / |w'_j| after it.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        size: of the kernel, 1 or 3.
        w_dim: size of w.
        up: whether the input is upsampled by 2 first.
        demodulate: False for ToRGB.
    """

    kernel: Tensor

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        size: int,
        w_dim: int,
        up: bool = False,
        demodulate: bool = True,
    ) -> None:
        super().__init__()
        # without demodulation the styles carry the scale of equalised learning rate
        gain = 1.0 if demodulate else 1 / math.sqrt(in_channels * size**2)
        self.affine = Dense(w_dim, in_channels, bias=1.0, gain=gain)
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels, size, size))
        self.up = up
        self.demodulate = demodulate
        # of sum 4, as three of four pixels are zeros before the filter
        self.register_buffer("kernel", 4 * binomial(), persistent=False)

    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        """x (B, I, H, W) and w (B, w_dim) -> (B, O, H, W), twice as large if ``up``."""
        styles: Tensor = self.affine(w)
        weight: Tensor = self.weight
        scale: Tensor | None = None
        if self.demodulate:
            # what equalised learning rate divides the weights by cancels too, but for the eps
            size = self.weight[0].numel()
            if in_float16(x.device):
                # Largest entries of known size, so that no sum leaves float16 (appendix D of the
                # ADA paper). The factors cancel in the demodulation, hence need no gradient.
                styles = styles / _largest(styles).clamp_(min=1e-8)
                weight, size = weight / (_largest(weight) * math.sqrt(size)), 1
            scale = _demodulation(styles, weight, 1e-8 * size)
        x = x * per_channel(styles, x)
        if self.up:
            x = conv_up(x, weight, self.kernel)
        else:
            x = conv2d(x, weight, padding=weight.shape[2] // 2)
        return x if scale is None else x * per_channel(scale, x)


def _demodulation(styles: Tensor, weight: Tensor, eps: float) -> Tensor:
    """1 / |w'_j| of each sample and output channel j, (B, O) float32."""
    with autocast_if(False, styles.device):
        squares = styles.square() @ weight.square().sum((2, 3)).T
        scale: Tensor = (squares + eps).rsqrt()
        return scale


def _largest(x: Tensor) -> Tensor:
    """The largest magnitude in each row of x (N, ...), (N, 1, ...) without a gradient."""
    dims = tuple(range(1, x.dim()))
    largest: Tensor = torch.linalg.vector_norm(x.detach(), math.inf, dims, keepdim=True)
    return largest


class SynthesisLayer(nn.Module):
    """Modulated 3x3 convolution, noise, bias and LeakyReLU.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        resolution: side of the output.
        w_dim: size of w.
        up: whether the input is half as large.
    """

    noise: Tensor

    def __init__(
        self, in_channels: int, out_channels: int, resolution: int, w_dim: int, up: bool
    ) -> None:
        super().__init__()
        self.conv = ModulatedConv(in_channels, out_channels, 3, w_dim, up)
        self.bias = nn.Parameter(torch.zeros(out_channels))
        # not a scalar: DeepSpeed cannot broadcast those
        self.noise_strength = nn.Parameter(torch.zeros(1))
        # the noise of every image that is given none
        self.register_buffer("noise", torch.randn(resolution, resolution))

    def forward(self, x: Tensor, w: Tensor, noise: Tensor | None) -> Tensor:
        """x (B, I, H, W), w (B, w_dim), noise (B, R * R) or None -> (B, O, R, R)."""
        x = self.conv(x, w)
        drawn = self.noise if noise is None else noise.view(-1, 1, *self.noise.shape)
        return activate(x + (drawn * self.noise_strength).to(x.dtype), self.bias)


class SynthesisBlock(nn.Module):
    """The layers of one resolution, and their addition to the image.

    Args:
        in_channels: channels of the input; 0 for 4x4, which starts from a learnt constant.
        out_channels: channels of the output.
        resolution: side of the output.
        w_dim: size of w.
        half: whether its convolutions follow autocast.
    """

    kernel: Tensor
    const: nn.Parameter

    def __init__(
        self, in_channels: int, out_channels: int, resolution: int, w_dim: int, half: bool
    ) -> None:
        super().__init__()
        self.half_allowed = half
        self.layers = nn.ModuleList()
        if in_channels:
            self.layers.append(SynthesisLayer(in_channels, out_channels, resolution, w_dim, True))
        else:
            self.const = nn.Parameter(torch.randn(out_channels, resolution, resolution))
        self.layers.append(SynthesisLayer(out_channels, out_channels, resolution, w_dim, False))
        self.to_rgb = ModulatedConv(out_channels, 3, 1, w_dim, demodulate=False)
        self.rgb_bias = nn.Parameter(torch.zeros(3))
        self.num_noise = len(self.layers) * resolution**2
        # of sum 4, as three of four pixels are zeros before the filter
        self.register_buffer("kernel", 4 * binomial(), persistent=False)

    def forward(
        self, x: Tensor | None, image: Tensor | None, ws: Tensor, noise: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """One block.

        Args:
            x: (B, I, R / 2, R / 2), None at 4x4.
            image: the image so far, (B, 3, R / 2, R / 2) float32, None at 4x4.
            ws: (B, layers + 1, w_dim), the last for ToRGB.
            noise: (B, num_noise) or None.

        Returns:
            (B, O, R, R), and the image (B, 3, R, R) float32.
        """
        x = self.const.expand(ws.shape[0], -1, -1, -1) if x is None else x
        noises = [None] * len(self.layers) if noise is None else noise.chunk(len(self.layers), 1)
        with autocast_if(self.half_allowed, ws.device):
            x = x if self.half_allowed else x.float()
            for layer, w, own in zip(self.layers, ws.unbind(1), noises, strict=False):
                x = layer(x, w, own)
            rgb = self.to_rgb(x, ws[:, -1])
        # hardtanh is clamp with a derivative in one launch
        rgb = F.hardtanh(rgb + self.rgb_bias[:, None, None], -CLAMP, CLAMP)
        if image is not None:
            with autocast_if(False, ws.device):
                rgb = rgb + upsample(image, self.kernel)
        return x, rgb


class Synthesis(nn.Module):
    """ws -> images.

    Args:
        resolution: side of the images.
        w_dim: size of w.
        channel_base: channels at R are ``channel_base / R``, at most ``channel_max``.
        channel_max: most channels at any resolution.
        num_half: number of the largest resolutions that follow autocast.
    """

    def __init__(
        self, resolution: int, w_dim: int, channel_base: int, channel_max: int, num_half: int
    ) -> None:
        super().__init__()
        self.blocks = nn.ModuleDict()
        # the w of a block's ToRGB is that of the next block's first layer too
        self.num_ws, self.num_noise = 1, 0
        channels = 0
        for size in sizes_up_to(resolution):
            before, channels = channels, channels_at(size, channel_base, channel_max)
            half = follows_autocast(size, resolution, num_half)
            block = SynthesisBlock(before, channels, size, w_dim, half)
            self.blocks[str(size)] = block
            self.num_ws += len(block.layers)
            self.num_noise += block.num_noise

    @property
    def noise_sides(self) -> tuple[int, ...]:
        """Sides of the maps of noise, in the order in which ``noise`` holds their values."""
        layers = (one for one in self.modules() if isinstance(one, SynthesisLayer))
        return tuple(one.noise.shape[0] for one in layers)

    def forward(self, ws: Tensor, noise: Tensor | None = None) -> Tensor:
        """ws (B, num_ws, w_dim), noise (B, num_noise) or None for constant noise.

        Returns:
            (B, 3, R, R) float32, about [-1, 1] but not bounded.
        """
        x: Tensor | None = None
        image: Tensor | None = None
        first_w = first_noise = 0
        for block in self.blocks.values():
            assert isinstance(block, SynthesisBlock)
            num = len(block.layers)
            own = noise
            if noise is not None:
                own = noise[:, first_noise : first_noise + block.num_noise]
            x, image = block(x, image, ws[:, first_w : first_w + num + 1], own)
            first_w, first_noise = first_w + num, first_noise + block.num_noise
        assert image is not None
        return image


class StyleGAN2Generator(nn.Module):
    """z -> w -> image.

    Args:
        resolution: side of the images, a power of two from 4.
        z_dim: size of the latent.
        w_dim: size of w.
        num_mapping_layers: dense layers from z to w.
        num_classes: labels are 0 to this less 1; 0 for no labels.
        channel_base: channels at R are ``channel_base / R``, at most ``channel_max``.
        channel_max: most channels at any resolution.
        num_half: number of the largest resolutions that follow autocast; the others are float32.
    """

    w_avg: Tensor
    path_mean: Tensor

    def __init__(
        self,
        resolution: int,
        z_dim: int = 512,
        w_dim: int = 512,
        num_mapping_layers: int = 2,
        num_classes: int = 0,
        channel_base: int = 16384,
        channel_max: int = 512,
        num_half: int = 4,
    ) -> None:
        super().__init__()
        self.resolution = resolution
        self.z_dim = z_dim
        self.mapping = Mapping(z_dim, w_dim, num_mapping_layers, num_classes)
        self.synthesis = Synthesis(resolution, w_dim, channel_base, channel_max, num_half)
        # what training remembers: the mean of w, and the mean path length
        self.register_buffer("w_avg", torch.zeros(w_dim))
        self.register_buffer("path_mean", torch.zeros(()))

    def truncate(self, w: Tensor, psi: float | Tensor) -> Tensor:
        """Move w towards its mean, all the way at psi 0 (Karras et al. 2019, section 2.3)."""
        return torch.lerp(self.w_avg, w, psi)

    def broadcast(self, w: Tensor) -> Tensor:
        """(B, w_dim) -> (B, num_ws, w_dim): the same w for every layer."""
        return w[:, None].expand(-1, self.synthesis.num_ws, -1)

    def forward(
        self,
        z: Tensor,
        label: Tensor | None = None,
        noise: Tensor | None = None,
        psi: float | Tensor = 1.0,
    ) -> Tensor:
        """Latents (B, z_dim) -> images (B, 3, R, R) float32, about [-1, 1] but not bounded.

        Args:
            z: latents.
            label: (B,) int64, if the network has classes.
            noise: (B, synthesis.num_noise) standard normal; None for the same in every image.
            psi: truncation, 1 for none.
        """
        w = self.truncate(self.mapping(z, label), psi)
        images: Tensor = self.synthesis(self.broadcast(w), noise)
        return images
