"""Family `dcgan`: a convolutional GAN with batch norm and binary cross-entropy."""

from __future__ import annotations

from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from dinogen.config import Config, ConfigError, StageConfig
from dinogen.families.base import Networks
from dinogen.families.gan import Gan
from dinogen.networks.dcgan import RESOLUTIONS, DcganDiscriminator, DcganGenerator


class Dcgan(Gan):
    """Radford et al. 2016: D and G take turns, each one update per step.

    Batch norm follows its batch: real and generated images go through D apart, and G's phase of
    D moves G's running statistics too, as both make images in training mode. On any number of
    ranks the statistics are those of the global batch; microbatches of one rank have each their
    own, so `engine.micro_batch` changes what is computed.
    """

    class Options(Gan.Options):
        """Keys of ``family:`` for ``name: dcgan``."""

        z_dim: int = Field(100, ge=1, description="size of the latent")
        ngf: int = Field(64, ge=1, description="G's channels at half the resolution")
        ndf: int = Field(64, ge=1, description="D's channels at half the resolution")

    options: Options

    def __init__(self, config: Config, stage: StageConfig, device: torch.device) -> None:
        super().__init__(config, stage, device)
        if stage.resolution not in RESOLUTIONS:
            raise ConfigError(
                f"stages: dcgan makes images of {', '.join(map(str, RESOLUTIONS))} pixels, "
                f"not {stage.resolution}"
            )
        self.G = DcganGenerator(**self.arguments("G")).to(device)
        self.D = DcganDiscriminator(**self.arguments("D")).to(device)

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
