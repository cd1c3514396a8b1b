"""The progressive generator: 4x4 upwards, a new block faded in at each resolution.

Growth and fade-in follow Karras et al. 2018, "Progressive Growing of GANs" (section 2, figure 2).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dinogen.networks.latent_table import LatentTable

LEAK = 0.2
# Pictures begin near grey: noise of full contrast drives tanh flat before the mean is learnt.
TO_RGB_GAIN = 0.1


class UpBlock(nn.Module):
    """Nearest upsample, then two 3x3 convolutions with LeakyReLU."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv0 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.conv1 = nn.Conv2d(out_channels, out_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, I, R, R) -> (B, O, 2R, 2R)."""
        x = F.interpolate(x, scale_factor=2, mode="nearest")
        x = F.leaky_relu(self.conv0(x), LEAK)
        return F.leaky_relu(self.conv1(x), LEAK)


class ProgressiveGenerator(nn.Module):
    """z -> dense to 4x4 -> blocks up to ``resolution`` -> 1x1 ToRGB -> tanh.

    Built only up to its resolution. It holds the ToRGB of that resolution and of the one before,
    which is the other end of the fade-in. ``alpha`` is a buffer, so a snapshot taken in the midst
    of a fade-in gives the pictures that training saw.

    Args:
        resolution: side of the pictures, a power of two from 4.
        z_dim: size of the latent.
        channel_base: channels at resolution R are ``channel_base / R``, at most ``channel_max``.
        channel_max: most channels at any resolution.
        num_latents: rows of ``table``: one learnt latent per training picture; there is
            no table if 0.
        latent_rate: see :class:`LatentTable`.
    """

    alpha: Tensor

    def __init__(
        self,
        resolution: int,
        z_dim: int = 512,
        channel_base: int = 16384,
        channel_max: int = 512,
        num_latents: int = 0,
        latent_rate: float = 10.0,
    ) -> None:
        super().__init__()
        if resolution < 4 or resolution & (resolution - 1):
            raise ValueError(f"resolution {resolution} is not a power of two from 4")
        self.resolution = resolution
        self.z_dim = z_dim
        sizes = [4 << i for i in range((resolution // 4).bit_length())]
        channels = {size: max(1, min(channel_max, channel_base // size)) for size in sizes}
        self.dense = nn.Linear(z_dim, channels[4] * 16)
        self.blocks = nn.ModuleDict(
            {str(size): UpBlock(channels[size // 2], channels[size]) for size in sizes[1:]}
        )
        self.to_rgb = nn.ModuleDict(
            {str(size): nn.Conv2d(channels[size], 3, 1) for size in sizes[-2:]}
        )
        self.register_buffer("alpha", torch.ones(()))
        self.fading = False
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif name.startswith("to_rgb"):
                nn.init.xavier_normal_(parameter, TO_RGB_GAIN)
            else:
                nn.init.kaiming_normal_(parameter, a=LEAK)
        self.table = LatentTable(num_latents, z_dim, latent_rate) if num_latents else None

    def new_parameters(self) -> set[str]:
        """Names of the parameters that this resolution adds: its block and its ToRGB."""
        prefixes = (f"blocks.{self.resolution}.", f"to_rgb.{self.resolution}.")
        return {name for name, _ in self.named_parameters() if name.startswith(prefixes)}

    def old_to_rgb(self) -> set[str]:
        """Names of the parameters of the ToRGB before, which is used only while fading in."""
        prefix = f"to_rgb.{self.resolution // 2}."
        return {name for name, _ in self.named_parameters() if name.startswith(prefix)}

    def set_fade(self, alpha: float, fading: bool) -> None:
        """Set the share of the new block in the picture (0 to 1), and whether it is fading in."""
        self.fading = fading
        self.alpha.fill_(alpha)

    def forward(self, z: Tensor) -> Tensor:
        """Latents (B, z_dim) -> pictures (B, 3, R, R) in [-1, 1]."""
        x = F.leaky_relu(self.dense(z).unflatten(1, (-1, 4, 4)), LEAK)
        before = x
        for block in self.blocks.values():
            before, x = x, block(x)
        rgb = self.to_rgb[str(self.resolution)](x).float()
        if self.fading:
            old = self.to_rgb[str(self.resolution // 2)](before)
            # float32 by hand: CUDA's autocast upsamples in float32, and lerp takes no two types.
            old = F.interpolate(old.float(), scale_factor=2, mode="nearest")
            # Blended before tanh: while alpha is small the new block overshoots, and a picture of
            # its own would be driven to where tanh is flat and nothing is learned any more.
            rgb = torch.lerp(old, rgb, self.alpha)
        return torch.tanh(rgb)
