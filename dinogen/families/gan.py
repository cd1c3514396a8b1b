"""What the GANs here share: G and D, latents drawn by position, the opinion of D."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor, nn

from dinogen.batch import Batch, Losses
from dinogen.config import Config, Section, StageConfig
from dinogen.distributed import rng
from dinogen.families.base import Family, Inputs, Networks, Phase, judged_alone
from dinogen.losses.adversarial import bce_d, bce_g


class Gan(Family):
    """A generator and a discriminator that take turns, by the non-saturating loss.

    A family builds ``G`` and ``D`` behind this ``__init__``, and overrides what it does otherwise.
    """

    class Options(Section):
        """Keys of ``family:`` that every GAN has."""

        z_dim: int = Field(512, ge=1, description="size of the latent")

    options: Options
    G: nn.Module
    D: nn.Module

    def __init__(self, config: Config, stage: StageConfig, device: torch.device) -> None:
        super().__init__(config, stage, device)
        self.options = self.Options(**config.family.options)

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
        """Images alone."""
        return Inputs(image_size=self.stage.resolution)

    def latents(self, indices: Tensor, seed: int) -> Tensor:
        """z (N, z_dim)."""
        return rng.normal(seed, "sample", indices, (self.options.z_dim,), self.device)

    def realism(self, images: Tensor) -> Tensor:
        """D's logits, by its running statistics if it has any."""
        return judged_alone(self.D, images)

    def first_layer(self, networks: Networks) -> Tensor:
        """The dense layer to 4x4."""
        dense = networks["G"].dense
        assert isinstance(dense, nn.Linear)
        return dense.weight.detach()

    def layers(self, network: str) -> list[set[str]]:
        """D's, up to the one before its logits."""
        return layers_of(self.D) if network == "D" else []

    def _d_losses(self, batch: Batch) -> Losses:
        # Apart: statistics over a batch, or a group of it, are all real or all generated.
        real, fake = self.D(self._real(batch)), self.D(self._generate(batch, "z/D"))
        return {"bce": bce_d(real, fake)}, {"real": real.mean(), "fake": fake.mean()}

    def _g_losses(self, batch: Batch) -> Losses:
        return {"bce": bce_g(self.D(self._generate(batch, "z/G")))}, {}

    def _real(self, batch: Batch) -> Tensor:
        """Real images as D is shown them."""
        return batch["image"]

    def _generate(self, batch: Batch, purpose: str) -> Tensor:
        """An image for each sample of the batch, from a latent by its position."""
        shape = (self.options.z_dim,)
        z = rng.normal(self.config.seed, purpose, batch["position"], shape, self.device)
        images: Tensor = self.G(z)
        return images


def layers_of(discriminator: nn.Module) -> list[set[str]]:
    """Names of the parameters of each layer but the last, from the image inwards.

    A layer is a convolution or dense layer, with the norms and factors between it and the next.

    Args:
        discriminator: has made its modules in the order in which images pass through them.
    """
    owned: dict[str, dict[str, nn.Parameter]] = {}
    for name, parameter in discriminator.named_parameters():
        module = name.partition(".parametrizations.")[0]
        owner = module if module != name else name.rpartition(".")[0]
        owned.setdefault(owner, {})[name] = parameter
    layers: list[set[str]] = []
    for parameters in owned.values():
        if not layers or any(one.dim() > 1 for one in parameters.values()):
            layers.append(set())
        layers[-1] |= parameters.keys()
    return layers[:-1]
