"""Family `wgan_gp`: a residual GAN with the Wasserstein loss and a gradient penalty."""

from __future__ import annotations

from typing import Any

import torch
from pydantic import Field

from dinogen.batch import Batch, Losses
from dinogen.config import Config, ConfigError, StageConfig
from dinogen.distributed import rng
from dinogen.families.base import Phase
from dinogen.families.gan import Gan
from dinogen.losses.adversarial import gradient_penalty, wasserstein_d, wasserstein_g
from dinogen.networks.resnet_gan import ResnetCritic, ResnetGenerator


class WganGp(Gan):
    """Gulrajani et al. 2017: D, the critic, has an update in every step, G in every n-th.

    A step shows its batch to the critic once, so `nimg` counts what the critic saw. G has batch
    norm: on any number of ranks its statistics are those of the global batch, but each microbatch
    of a rank has its own.
    """

    class Options(Gan.Options):
        """Keys of ``family:`` for ``name: wgan_gp``."""

        z_dim: int = Field(128, ge=1, description="size of the latent")
        channels: int = Field(
            64, ge=1, description="channels at the full resolution, doubled at each halving ..."
        )
        channel_max: int = Field(512, ge=1, description="... and at most this")
        n_critic: int = Field(2, ge=1, description="critic updates per update of G")
        gp_weight: float = Field(10.0, gt=0, description="weight of the gradient penalty")

    options: Options

    def __init__(self, config: Config, stage: StageConfig, device: torch.device) -> None:
        super().__init__(config, stage, device)
        if stage.resolution < 8:
            raise ConfigError(
                f"stages: {config.family.name} makes images from 8 pixels, not {stage.resolution}"
            )
        self.G = ResnetGenerator(**self.arguments("G")).to(device)
        self.D = ResnetCritic(**self.arguments("D")).to(device)

    @property
    def phases(self) -> tuple[Phase, ...]:
        """One update of D, and in every n-th step one of G."""
        return (
            Phase("D", "D", self._d_losses, second_order=True),
            Phase("G", "G", self._g_losses, every=self.options.n_critic),
        )

    @property
    def main_loss(self) -> str:
        """D, whose negated loss estimates the distance to be minimised (the paper's figure 3)."""
        return "D"

    def arguments(self, network: str) -> dict[str, Any]:
        """Of G or D."""
        common = {
            "resolution": self.stage.resolution,
            "channels": self.options.channels,
            "channel_max": self.options.channel_max,
        }
        return common | ({"z_dim": self.options.z_dim} if network == "G" else {})

    def _d_losses(self, batch: Batch) -> Losses:
        images, seed = batch["image"], self.config.seed
        generated = self._generate(batch, "z/D")
        real, fake = self.D(torch.cat([images, generated])).chunk(2)
        eps = rng.uniform(seed, "eps/D", batch["position"], (1, 1, 1), self.device)
        penalty = gradient_penalty(self.D, images, generated, eps)
        distance = wasserstein_d(real, fake)
        losses = {"wasserstein": distance, "penalty": self.options.gp_weight * penalty}
        return losses, {"real": real.mean(), "fake": fake.mean()}

    def _g_losses(self, batch: Batch) -> Losses:
        return {"wasserstein": wasserstein_g(self.D(self._generate(batch, "z/G")))}, {}
