"""Family `dcgan`: a convolutional GAN with batch norm and binary cross-entropy."""

from __future__ import annotations

from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from dinogen.config import Config, ConfigError, Section, StageConfig
from dinogen.distributed import rng
from dinogen.families.base import (
    Batch,
    Family,
    Inputs,
    Networks,
    Phase,
    Scalars,
    judged_alone,
)
from dinogen.losses.adversarial import bce_d, bce_g
from dinogen.networks.dcgan import RESOLUTIONS, DcganDiscriminator, DcganGenerator


class Dcgan(Family):
    """Radford et al. 2016: D and G take turns, each one update per step.

    Batch norm follows its batch: real and generated pictures go through D apart, and G's phase of
    D moves G's running statistics too, as both make pictures in training mode. On any number of
    ranks the statistics are those of the global batch; microbatches of one rank have each their
    own, so `engine.micro_batch` changes what is computed.
    """

    class Options(Section):
        """Keys of ``family:`` for ``name: dcgan``."""

        z_dim: int = Field(100, ge=1, description="size of the latent")
        ngf: int = Field(64, ge=1, description="G's channels at half the resolution")
        ndf: int = Field(64, ge=1, description="D's channels at half the resolution")

    def __init__(self, config: Config, stage: StageConfig, device: torch.device) -> None:
        super().__init__(config, stage, device)
        self.options = self.Options(**config.family.options)
        if stage.resolution not in RESOLUTIONS:
            raise ConfigError(
                f"stages: dcgan makes pictures of {', '.join(map(str, RESOLUTIONS))} pixels, "
                f"not {stage.resolution}"
            )
        self.G = DcganGenerator(**self.arguments("G")).to(device)
        self.D = DcganDiscriminator(**self.arguments("D")).to(device)

    @property
    def networks(self) -> dict[str, nn.Module]:
        """G and D."""
        return {"G": self.G, "D": self.D}

    @property
    def phases(self) -> tuple[Phase, ...]:
        """One update of D, one of G."""
        return (Phase("D", "D", self._d_losses), Phase("G", "G", self._g_losses))

    @property
    def inputs(self) -> Inputs:
        """Pictures alone."""
        return Inputs(image_size=self.stage.resolution)

    def latents(self, indices: Tensor, seed: int) -> Tensor:
        """z (N, z_dim)."""
        return rng.normal(seed, "sample", indices, (self.options.z_dim,), self.device)

    def realism(self, images: Tensor) -> Tensor:
        """D's logits, by its running statistics."""
        return judged_alone(self.D, images)

    def first_layer(self, networks: Networks) -> Tensor:
        """The transposed convolution to 4x4, as a matrix."""
        G = networks["G"]
        assert isinstance(G, DcganGenerator)
        first = G.layers[0]
        assert isinstance(first, nn.ConvTranspose2d)
        return first.weight.detach().flatten(1).T

    def arguments(self, network: str) -> dict[str, Any]:
        """Of G or D."""
        own = {"ndf": self.options.ndf}
        if network == "G":
            own = {"z_dim": self.options.z_dim, "ngf": self.options.ngf}
        return {"resolution": self.stage.resolution} | own

    def _d_losses(self, batch: Batch) -> tuple[Scalars, Scalars]:
        real, fake = self.D(batch["image"]), self.D(self._generate(batch, "z/D"))
        return {"bce": bce_d(real, fake)}, {"real": real.mean(), "fake": fake.mean()}

    def _g_losses(self, batch: Batch) -> tuple[Scalars, Scalars]:
        return {"bce": bce_g(self.D(self._generate(batch, "z/G")))}, {}

    def _generate(self, batch: Batch, purpose: str) -> Tensor:
        shape = (self.options.z_dim,)
        z = rng.normal(self.config.seed, purpose, batch["position"], shape, self.device)
        images: Tensor = self.G(z)
        return images
