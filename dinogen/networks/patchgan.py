"""The PatchGAN discriminator: one logit for each overlapping patch of an image, at many scales.

Isola et al. 2017, "Image-to-Image Translation with Conditional Adversarial Networks" (section
3.2.2 and appendix 6.1.2), with group norm in place of batch norm; several scales as in Wang et al.
2018, "High-Resolution Image Synthesis and Semantic Manipulation with Conditional GANs" (section
3.2).
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from dinogen.networks.casts import cast_together, conv
from dinogen.networks.layers import GroupNorm

LEAK = 0.2
WIDEST = 8  # most channels, in base channels
CHANNELS_PER_GROUP = 8
INIT_STD = 0.02  # of all convolutions, in the paper


class PatchDiscriminator(nn.Module):
    """4x4 convolutions, ``num_layers`` of stride 2 and two of stride 1, LeakyReLU between.

    With batch norm an image's logits depend on the rest of the batch, so that D could tell a
    batch of fakes by its statistics, and the cut of a batch into parts and ranks would change the
    loss. Instance norm takes each map's own mean and contrast away, by which much of a fake is
    known, and has nothing left to normalise where maps shrink to a single location. Group norm does
    neither. As in the paper the first layer has none.

    Args:
        num_layers: convolutions of stride 2; 1, 2, 3 see patches of 16, 34, 70 pixels.
        base_channels: channels behind the first layer; doubled by each, at most eightfold. A
            multiple of 8.
    """

    def __init__(self, num_layers: int = 3, base_channels: int = 64) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(3, base_channels, 4, 2, 1), nn.LeakyReLU(LEAK)]
        num_in = base_channels
        for i in range(1, num_layers + 1):
            num_out = base_channels * min(WIDEST, 1 << i)
            layers += [
                nn.Conv2d(num_in, num_out, 4, 2 if i < num_layers else 1, 1),
                GroupNorm(num_out // CHANNELS_PER_GROUP, num_out),
                nn.LeakyReLU(LEAK),
            ]
            num_in = num_out
        self.layers = nn.Sequential(*layers, nn.Conv2d(num_in, 1, 4, 1, 1))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=INIT_STD)

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, 3, R, R) in [-1, 1] -> logits (B, P, P) float32, P = R / 2**num_layers - 2.

        Positive means real.
        """
        own = iter(cast_together(*self.layers))
        x = images
        for layer in self.layers:
            if isinstance(layer, nn.Conv2d):
                x = conv(layer, x, next(own))
            elif isinstance(layer, GroupNorm):
                x = layer.normalized(x, *next(own))
            else:
                x = layer(x)
        return x.squeeze(1).float()


class MultiScalePatchDiscriminator(nn.Module):
    """Alike discriminators, each of the image at half the size of the one before.

    The coarsest sees most of the image, the finest its texture. Sizes are halved by exact means
    of 2x2 pixels, where the paper's code takes overlapping 3x3.

    Args:
        num_scales: discriminators.
        num_layers: of each, see :class:`PatchDiscriminator`.
        base_channels: of each.
    """

    def __init__(self, num_scales: int = 3, num_layers: int = 3, base_channels: int = 64) -> None:
        super().__init__()
        self.scales = nn.ModuleList(
            PatchDiscriminator(num_layers, base_channels) for _ in range(num_scales)
        )

    def forward(self, images: Tensor) -> list[Tensor]:
        """Images (B, 3, R, R) in [-1, 1] -> logits (B, P, P) float32 of each scale, finest first.

        P = ``num_patches(R / 2**i, num_layers)`` at scale i.
        """
        logits = []
        for number, scale in enumerate(self.scales):
            images = F.avg_pool2d(images, 2) if number else images
            logits.append(scale(images))
        return logits


def num_patches(resolution: int, num_layers: int) -> int:
    """P, the logits along one side of an image of this resolution; none fit if below 1."""
    return (resolution >> num_layers) - 2
