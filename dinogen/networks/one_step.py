"""The diffusion transformer as a generator that makes an image of noise in one pass."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from dinogen.networks.dit import DiT

# Deviation of the pixels of an image at the start.
CONTRAST = 0.1


class OneStepDiT(nn.Module):
    """Noise -> images: a DiT whose time is always 0 (Deng et al. 2026, "Generative Modeling via
    Drifting", as public re-implementations have it).

    Its images begin near grey, and differ. With the zeros that a DiT otherwise begins with they
    would be one image, where all samples have one drift: of eight modes on a circle a small one
    then found a single one in 400 steps.

    Args:
        resolution: side of the images.
        patch: side of a patch, which is one token.
        width: of the tokens.
        depth: number of blocks.
        num_heads: of each attention.
        num_registers: tokens that belong to no patch.
        qk_norm: normalise queries and keys.
        num_classes: 0 for none.
        guidance_input: it is told a guidance strength.

    Raises:
        ValueError: as :class:`~dinogen.networks.dit.DiT`.
    """

    def __init__(
        self,
        resolution: int,
        patch: int,
        width: int,
        depth: int,
        num_heads: int,
        num_registers: int = 0,
        qk_norm: bool = True,
        num_classes: int = 0,
        guidance_input: bool = False,
    ) -> None:
        super().__init__()
        self.dit = DiT(
            resolution,
            patch,
            width,
            depth,
            num_heads,
            num_registers,
            qk_norm,
            num_classes=num_classes,
            guidance_input=guidance_input,
        )
        # the tokens that it multiplies are normalised, so it is the deviation of pixels
        nn.init.normal_(self.dit.out.weight, std=CONTRAST / math.sqrt(width))

    def forward(
        self, z: Tensor, label: Tensor | None = None, guidance: Tensor | None = None
    ) -> Tensor:
        """Noise (B, 3, R, R) -> images (B, 3, R, R) float32, near [-1, 1] when trained.

        Args:
            z: standard normal.
            label: (B,) int64, if it has classes.
            guidance: (B,) float32, if it is told one.
        """
        found = self.dit(z, torch.zeros_like(z[:, 0, 0, 0]), label, guidance=guidance)
        assert isinstance(found, Tensor)
        return found


class OneStepImages(nn.Module):
    """What samples are of a :class:`OneStepDiT`, with one strength for all."""

    def __init__(self, G: OneStepDiT) -> None:
        super().__init__()
        self.G = G

    def forward(
        self, z: Tensor, label: Tensor | None = None, guidance: Tensor | None = None
    ) -> Tensor:
        """z (B, 3, R, R), label (B,), guidance () -> images (B, 3, R, R) in [-1, 1]."""
        strengths = None if guidance is None else guidance.expand(z.shape[0])
        images: Tensor = self.G(z, label, strengths)
        return images.clamp(-1, 1)
