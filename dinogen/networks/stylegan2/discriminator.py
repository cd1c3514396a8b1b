"""The discriminator of StyleGAN2: residual blocks, minibatch standard deviation, projection.

Karras et al. 2020, "Analyzing and Improving the Image Quality of StyleGAN" (figure 7c); labels as
in Karras et al. 2020, "Training GANs with Limited Data" (appendix D; Miyato and Koyama 2018).
"""

from __future__ import annotations

import math

from torch import Tensor, nn

from dinogen.networks.ada.pipeline import AugmentProbability
from dinogen.networks.layers import minibatch_std
from dinogen.networks.stylegan2.layers import (
    Conv,
    Dense,
    Mapping,
    autocast_if,
    channels_at,
    follows_autocast,
    sizes_up_to,
)

NUM_MAPPING_LAYERS = 8


class DiscriminatorBlock(nn.Module):
    """Two 3x3 convolutions, the second by 2 down, with a 1x1 skip.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        half: whether its convolutions follow autocast.
    """

    def __init__(self, in_channels: int, out_channels: int, half: bool) -> None:
        super().__init__()
        self.half_allowed = half
        self.conv0 = Conv(in_channels, in_channels, 3)
        # each is brought to half the variance before they are added, to stay in float16
        half_variance = math.sqrt(0.5)
        self.conv1 = Conv(in_channels, out_channels, 3, down=2, gain=half_variance)
        self.skip = Conv(in_channels, out_channels, 1, 2, active=False, gain=half_variance)

    def forward(self, x: Tensor) -> Tensor:
        """(B, I, R, R) -> (B, O, R / 2, R / 2)."""
        with autocast_if(self.half_allowed, x.device):
            x = x if self.half_allowed else x.float()
            y: Tensor = self.conv1(self.conv0(x)) + self.skip(x)
            return y


class StyleGAN2Discriminator(nn.Module):
    """Images -> logits.

    Args:
        resolution: side of the images, a power of two from 4.
        num_classes: labels are 0 to this less 1; 0 for no labels.
        channel_base: channels at R are ``channel_base / R``, at most ``channel_max``.
        channel_max: most channels at any resolution.
        num_half: number of the largest resolutions that follow autocast; the others are float32.
        group_size: samples per minibatch standard deviation.
    """

    def __init__(
        self,
        resolution: int,
        num_classes: int = 0,
        channel_base: int = 16384,
        channel_max: int = 512,
        num_half: int = 4,
        group_size: int = 4,
    ) -> None:
        super().__init__()
        self.resolution = resolution
        self.group_size = group_size
        sizes = sizes_up_to(resolution)[::-1]
        channels = {size: channels_at(size, channel_base, channel_max) for size in sizes}
        self.half_allowed = follows_autocast(resolution, resolution, num_half)
        self.from_rgb = Conv(3, channels[resolution], 1)
        self.blocks = nn.Sequential(
            *(
                DiscriminatorBlock(
                    channels[size],
                    channels[size // 2],
                    follows_autocast(size, resolution, num_half),
                )
                for size in sizes[:-1]
            )
        )
        self.conv = Conv(channels[4] + 1, channels[4], 3)
        self.dense = Dense(16 * channels[4], channels[4], active=True)
        out = channels[4] if num_classes else 1
        self.logit = Dense(channels[4], out)
        self.label = Mapping(0, out, NUM_MAPPING_LAYERS, num_classes) if num_classes else None
        # ADA's probability is measured on this network and trained against it, so it lives here
        self.ada = AugmentProbability()

    def forward(self, images: Tensor, label: Tensor | None = None) -> Tensor:
        """Images (B, 3, R, R) in [-1, 1], labels (B,) if it has classes -> logits (B,) float32.

        The logits of a group of contiguous samples depend on each other.
        """
        with autocast_if(self.half_allowed, images.device):
            x = self.from_rgb(images)
        x = self.blocks(x)
        with autocast_if(False, images.device):
            x = self.conv(minibatch_std(x.float(), self.group_size))
            logits: Tensor = self.logit(self.dense(x.flatten(1)))
            if self.label is not None:
                w = self.label(None, label)
                logits = (logits * w) / math.sqrt(w.shape[1])
            return logits.sum(1)
