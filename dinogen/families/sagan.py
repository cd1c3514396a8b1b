"""Family `sagan`: WGAN-GP with self-attention, group norm in G and spectral norm in the critic."""

from __future__ import annotations

from typing import Any

import torch
from pydantic import Field

from dinogen.config import Config, ConfigError, StageConfig
from dinogen.families.wgan_gp import WganGp
from dinogen.networks.layers import update_spectral_norms


class Sagan(WganGp):
    """Zhang et al. 2019's networks under WGAN-GP's losses.

    Group norm makes an image independent of the others of its batch, so here microbatches change
    nothing and the averaged generator needs no statistics. Spectral norms iterate once per step.
    """

    class Options(WganGp.Options):
        """Keys of ``family:`` for ``name: sagan``."""

        attention: tuple[int, ...] = Field(
            (16,), description="sizes of the maps that go through self-attention, in G and D"
        )

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

    def arguments(self, network: str) -> dict[str, Any]:
        """Of G or D."""
        norm = "group" if network == "G" else "spectral"
        attention = list(self.options.attention)
        return super().arguments(network) | {"norm": norm, "attention": attention}

    def after_step(self, nimg: int) -> None:
        """One power iteration of every spectral norm, however many forwards the step had."""
        update_spectral_norms(self.D)
