"""The discriminator that grows along with the progressive generator.

Karras et al. 2018, "Progressive Growing of GANs" (sections 2 and 3, figure 2): the generator's
blocks mirrored, a new one faded in at each resolution, minibatch standard deviation at 4x4.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dinogen.networks.layers import minibatch_std

LEAK = 0.2


class DownBlock(nn.Module):
    """Two 3x3 convolutions with LeakyReLU, then 2x2 means."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv0 = nn.Conv2d(in_channels, in_channels, 3, padding=1)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, I, R, R) -> (B, O, R/2, R/2)."""
        x = F.leaky_relu(self.conv0(x), LEAK)
        return F.avg_pool2d(F.leaky_relu(self.conv1(x), LEAK), 2)


class ProgressiveDiscriminator(nn.Module):
    """1x1 FromRGB -> blocks down to 4x4 -> minibatch std, 3x3, dense, dense.

    Built only from its resolution down. It holds the FromRGB of that resolution and of the one
    before, which is the other end of the fade-in.

    Args:
        resolution: side of the pictures, a power of two from 4.
        channel_base: channels at resolution R are ``channel_base / R``, at most ``channel_max``.
        channel_max: most channels at any resolution.
        group_size: samples over which the minibatch standard deviation is taken.
    """

    alpha: Tensor

    def __init__(
        self,
        resolution: int,
        channel_base: int = 16384,
        channel_max: int = 512,
        group_size: int = 4,
    ) -> None:
        super().__init__()
        if resolution < 4 or resolution & (resolution - 1):
            raise ValueError(f"resolution {resolution} is not a power of two from 4")
        self.resolution = resolution
        self.group_size = group_size
        sizes = [4 << i for i in reversed(range((resolution // 4).bit_length()))]
        channels = {size: max(1, min(channel_max, channel_base // size)) for size in sizes}
        self.from_rgb = nn.ModuleDict(
            {str(size): nn.Conv2d(3, channels[size], 1) for size in sizes[:2]}
        )
        self.blocks = nn.ModuleDict(
            {str(size): DownBlock(channels[size], channels[size // 2]) for size in sizes[:-1]}
        )
        self.conv = nn.Conv2d(channels[4] + 1, channels[4], 3, padding=1)
        self.dense = nn.Linear(16 * channels[4], channels[4])
        self.logit = nn.Linear(channels[4], 1)
        self.register_buffer("alpha", torch.ones(()))
        self.fading = False
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif name.startswith("logit"):
                nn.init.kaiming_normal_(parameter, nonlinearity="linear")
            else:
                nn.init.kaiming_normal_(parameter, a=LEAK)

    def new_parameters(self) -> set[str]:
        """Names of the parameters that this resolution adds: its block and its FromRGB."""
        prefixes = (f"blocks.{self.resolution}.", f"from_rgb.{self.resolution}.")
        return {name for name, _ in self.named_parameters() if name.startswith(prefixes)}

    def old_from_rgb(self) -> set[str]:
        """Names of the parameters of the FromRGB before, which is used only while fading in."""
        prefix = f"from_rgb.{self.resolution // 2}."
        return {name for name, _ in self.named_parameters() if name.startswith(prefix)}

    def set_fade(self, alpha: float, fading: bool) -> None:
        """Set the share of the new block (0 to 1), and whether it is fading in."""
        self.fading = fading
        self.alpha.fill_(alpha)

    def forward(self, images: Tensor) -> Tensor:
        """Pictures (B, 3, R, R) -> logits (B,)."""
        x = self._features(images, self.resolution)
        for size, block in self.blocks.items():
            x = block(x)
            if self.fading and size == str(self.resolution):
                old = self._features(F.avg_pool2d(images, 2), self.resolution // 2)
                # float32 by hand: lerp takes no two types, and alpha is float32
                x = torch.lerp(old.float(), x.float(), self.alpha).to(x.dtype)
        x = F.leaky_relu(self.conv(minibatch_std(x, self.group_size)), LEAK)
        x = F.leaky_relu(self.dense(x.flatten(1)), LEAK)
        logits: Tensor = self.logit(x).flatten()
        return logits

    def _features(self, images: Tensor, size: int) -> Tensor:
        """Pictures of side ``size`` as the features that its block takes."""
        return F.leaky_relu(self.from_rgb[str(size)](images), LEAK)
