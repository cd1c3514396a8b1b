"""Family `progressive_gan`: the guided family's generator grown together with a discriminator."""

from __future__ import annotations

from typing import Any

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from dinogen.batch import Batch, Losses
from dinogen.config import Config, StageConfig
from dinogen.families.base import Networks, Phase
from dinogen.families.gan import Gan
from dinogen.losses.adversarial import bce_d, r1_penalty
from dinogen.networks.progressive import ProgressiveDiscriminator, ProgressiveGenerator


class ProgressiveGan(Gan):
    """Karras et al. 2018, with the non-saturating loss and R1 (Mescheder et al. 2018) in place of
    WGAN-GP and its drift term.

    R1 needs no extra critic updates, converges at the small batches of large images, and runs
    only in every n-th step (Karras et al. 2020, "Analyzing and Improving the Image Quality of
    StyleGAN", section 3.1). The generator is the guided family's own, so that the two differ in
    their guide alone. While a block fades in everything trains, as in the paper; in the guided
    family only what is new does, as its lower stages have reached a target that stays the same,
    whereas here D goes on moving.
    """

    class Options(Gan.Options):
        """Keys of ``family:`` for ``name: progressive_gan``."""

        channel_base: int = Field(16384, ge=4, description="channels at R are base / R ...")
        channel_max: int = Field(512, ge=1, description="... and at most this")
        group_size: int = Field(4, ge=1, description="samples per minibatch standard deviation")
        r1_gamma: float = Field(
            10.0, gt=0, description="gamma of R1 at 256x256; at R it is times (R / 256) squared"
        )
        r1_every: int = Field(16, ge=1, description="steps between updates by R1")

    options: Options
    G: ProgressiveGenerator
    D: ProgressiveDiscriminator

    def __init__(self, config: Config, stage: StageConfig, device: torch.device) -> None:
        super().__init__(config, stage, device)
        self.G = ProgressiveGenerator(**self.arguments("G")).to(device)
        self.D = ProgressiveDiscriminator(**self.arguments("D")).to(device)

    @property
    def phases(self) -> tuple[Phase, ...]:
        """One update of D, now and then one by R1, one of G."""
        return (
            Phase("D", "D", self._d_losses),
            Phase("D_reg", "D", self._r1, every=self.options.r1_every, second_order=True),
            Phase("G", "G", self._g_losses),
        )

    def optimizer_scale(self, network: str) -> float:
        """k / (k + 1) for D, which has k + 1 updates in k steps."""
        every = self.options.r1_every
        return every / (every + 1) if network == "D" else 1.0

    def arguments(self, network: str) -> dict[str, Any]:
        """Of G or D."""
        own = "z_dim" if network == "G" else "group_size"
        return {
            "resolution": self.stage.resolution,
            "channel_base": self.options.channel_base,
            "channel_max": self.options.channel_max,
            own: getattr(self.options, own),
        }

    def new_parameters(self, network: str) -> set[str]:
        """The block and ToRGB or FromRGB of the stage's resolution."""
        return self.G.new_parameters() if network == "G" else self.D.new_parameters()

    def trainable(self, network: str) -> set[str]:
        """All that is in use: ToRGB and FromRGB of the stage before only while fading in."""
        names = super().trainable(network)
        if network == "G":
            return names if self.G.fading else names - self.G.old_to_rgb()
        return names if self.D.fading else names - self.D.old_from_rgb()

    def layers(self, network: str) -> list[set[str]]:
        """D's; FromRGB of the stage before is none, as it serves the fade-in alone."""
        old = self.D.old_from_rgb()
        return [rest for one in super().layers(network) if (rest := one - old)]

    def set_fade(self, networks: Networks, alpha: float, fading: bool) -> None:
        """Set alpha in every copy of G and D."""
        for network in networks.values():
            if isinstance(network, (ProgressiveGenerator, ProgressiveDiscriminator)):
                network.set_fade(alpha, fading)

    def _d_losses(self, batch: Batch) -> Losses:
        if self.device.type == "cpu":
            # a tenth faster apart: a cache holds more of one batch than of two
            return super()._d_losses(batch)
        images = torch.cat([self._real(batch), self._generate(batch, "z/D")])
        real, fake = self.D(images, num_batches=2).chunk(2)
        return {"bce": bce_d(real, fake)}, {"real": real.mean(), "fake": fake.mean()}

    def _r1(self, batch: Batch) -> Losses:
        penalty = r1_penalty(self.D, self._real(batch))
        # The more pixels share a change of the image, the smaller is D's gradient at each. With
        # the gamma of 256x256, R1's gradient at 4x4 was 150 times that of the loss.
        gamma = self.options.r1_gamma * (self.stage.resolution / 256) ** 2
        weight = gamma / 2 * self.options.r1_every
        return {"r1": weight * penalty}, {"penalty": penalty.detach()}

    def _real(self, batch: Batch) -> Tensor:
        """Real images, as far between the two resolutions as G's are (section 2)."""
        images: Tensor = batch["image"]
        if not self.D.fading:
            return images
        coarse = F.interpolate(F.avg_pool2d(images, 2), scale_factor=2, mode="nearest")
        return torch.lerp(coarse, images, self.D.alpha)
