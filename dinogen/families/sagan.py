"""Family `sagan`: a residual GAN with self-attention, by the hinge loss or by WGAN-GP's."""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch.nn.utils import parametrize

from dinogen.batch import Batch, Losses
from dinogen.config import Config, ConfigError, StageConfig
from dinogen.families.base import Phase
from dinogen.families.wgan_gp import WganGp
from dinogen.losses.adversarial import hinge_d, hinge_g
from dinogen.networks.layers import update_spectral_norms


class Sagan(WganGp):
    """Zhang et al. 2019, "Self-Attention Generative Adversarial Networks", without classes.

    ``loss: hinge`` is the paper's (equation 4): spectral norm of all weights of G and D, batch norm
    in G. ``loss: wasserstein`` puts the networks under WGAN-GP's losses, with spectral norm in the
    critic and group norm in G, which makes an image independent of the others of its batch: there
    microbatches change nothing and the averaged generator needs no statistics. Spectral norms
    iterate once per step.
    """

    class Options(WganGp.Options):
        """Keys of ``family:`` for ``name: sagan``."""

        loss: Literal["wasserstein", "hinge"] = Field(
            "wasserstein",
            description="hinge: the paper's, with spectral norm in G too; wasserstein: WGAN-GP's, "
            "with its gradient penalty",
        )
        attention: tuple[int, ...] = Field(
            (16,), description="sizes of the maps that go through self-attention, in G and D"
        )

        @model_validator(mode="after")
        def _check(self) -> Sagan.Options:
            default = type(self).model_fields["gp_weight"].default
            if self.loss == "hinge" and self.gp_weight != default:
                raise ValueError("gp_weight: loss hinge has no gradient penalty: leave it out")
            return self

    options: Options

    def __init__(self, config: Config, stage: StageConfig, device: torch.device) -> None:
        sizes = [4 << i for i in range((stage.resolution // 4).bit_length())]
        attention = self.Options(**config.family.options).attention
        wrong = [size for size in attention if size not in sizes]
        if wrong:
            raise ConfigError(
                f"family.attention: {wrong[0]} is the size of no map of a {stage.resolution}x"
                f"{stage.resolution} image: choose from {', '.join(map(str, sizes))}"
            )
        super().__init__(config, stage, device)

    @property
    def phases(self) -> tuple[Phase, ...]:
        """One update of D, and in every n-th step one of G."""
        if self.options.loss == "wasserstein":
            return super().phases
        every = self.options.n_critic
        return Phase("D", "D", self._hinge_d), Phase("G", "G", self._hinge_g, every=every)

    def arguments(self, network: str) -> dict[str, Any]:
        """Of G or D."""
        arguments = super().arguments(network) | {"attention": list(self.options.attention)}
        if self.options.loss == "hinge":
            own = {
                "G": {"norm": "batch", "spectral": True},
                "D": {"norm": "spectral", "hinge": True},
            }
            return arguments | own[network]
        return arguments | {"norm": "group" if network == "G" else "spectral"}

    def _d_losses(self, batch: Batch) -> Losses:
        # The penalty sees the same weights as the scores: each is divided by its norm once.
        with parametrize.cached():
            return super()._d_losses(batch)

    def after_step(self, nimg: int) -> None:
        """One power iteration of every spectral norm, however many forwards the step had."""
        for network in self.networks.values():
            update_spectral_norms(network)

    def _hinge_d(self, batch: Batch) -> Losses:
        real, fake = self.D(torch.cat([batch["image"], self._generate(batch, "z/D")])).chunk(2)
        return {"hinge": hinge_d(real, fake)}, {"real": real.mean(), "fake": fake.mean()}

    def _hinge_g(self, batch: Batch) -> Losses:
        return {"hinge": hinge_g(self.D(self._generate(batch, "z/G")))}, {}
