"""Family `guided`: a progressive generator taught by frozen guide features, no discriminator."""

from __future__ import annotations

import math
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from dinogen import draws
from dinogen.config import Config, ConfigError, Section, StageConfig
from dinogen.families.base import Batch, Family, Inputs, Networks, Phase, Scalars, Verdict
from dinogen.features.base import Guide, same_guide
from dinogen.features.load import load_guide
from dinogen.features.pyramid import native_pyramid, pooled_pyramid
from dinogen.losses.pyramid import collapse_floor, mean_pairwise_distance, pyramid_mse
from dinogen.networks.progressive import ProgressiveGenerator
from shards.dataset import Dataset

NATIVE_UP_TO = 16
COLLAPSING_BELOW = 0.5
COLLAPSED_BELOW = 0.1
COLLAPSED_NEAR_FLOOR = 1.02


class Guided(Family):
    """The original experiment: mean squared error between the guide's features of a generated
    picture and the stored pyramid of a random real one.

    That objective has one best answer, the same features for every z (see
    :func:`dinogen.losses.pyramid.pyramid_mse`), so each curve is drawn with its floor and each
    probe measures the diversity that is left.
    """

    class Options(Section):
        """Keys of ``family:`` for ``name: guided``."""

        objective: Literal["mse"] = Field("mse", description="how pyramids are compared")
        pyramid: Literal["native", "pooled"] = Field(
            "native",
            description="targets up to 16x16: features of the shrunk picture, or pooled features "
            "of the full one; above 16x16 always pooled",
        )
        z_dim: int = Field(512, ge=1, description="size of the latent")
        channel_base: int = Field(16384, ge=4, description="channels at R are base / R ...")
        channel_max: int = Field(512, ge=1, description="... and at most this")
        probe_samples: int = Field(64, ge=2, description="pictures per diversity probe")

    def __init__(self, config: Config, stage: StageConfig, device: torch.device) -> None:
        super().__init__(config, stage, device)
        self.options = self.Options(**config.family.options)
        self.G = ProgressiveGenerator(**self.arguments("G")).to(device)
        if stage.resolution <= NATIVE_UP_TO:
            self.grids: tuple[int, ...] = (stage.resolution,)
            kind = self.options.pyramid
        else:
            self.grids = (16, 8, 4)
            kind = "pooled"
        self.levels = tuple(f"{kind[0]}{grid}" for grid in self.grids)
        self.guide: Guide | None = None
        self.floor = float("nan")
        self.real_distance: dict[int, float] = {}

    @property
    def networks(self) -> dict[str, nn.Module]:
        """G alone."""
        return {"G": self.G}

    @property
    def phases(self) -> tuple[Phase, ...]:
        """One update of G."""
        return (Phase("G", "G", self._losses),)

    @property
    def inputs(self) -> Inputs:
        """Only the levels compared; no picture is decoded."""
        return Inputs(image_size=None, levels=self.levels)

    def begin(self, data: Dataset) -> None:
        """Load the guide, check that it made these shards, and measure how far reals differ."""
        self.guide = load_guide(self.config.guide, self.device)
        made_by, path = data.manifest.guide or {}, data.location
        if not made_by:
            raise ConfigError(
                f"{path}: its manifest does not say which guide made the pyramids, so none can be "
                "trusted to fit: run `dinogen prepare` again"
            )
        if not same_guide(made_by, self.guide.info):
            mine = self.guide.info.to_dict()
            other = ", ".join(
                f"{key} {mine[key]} instead of {made_by.get(key)}"
                for key in ("name", "path", "layer", "weights_sha256")
                if mine[key] != made_by.get(key)
            )
            raise ConfigError(
                f"guide: not the one that made the pyramids of {path} ({other}): use that one, or "
                "run `dinogen prepare` again"
            )
        self.floor = collapse_floor([data.total_variance(level) for level in self.levels])
        split = self.config.data.split
        num_real = data.num_samples(split)
        if num_real < 2:
            raise ConfigError(
                f"data.split: {path} has {num_real} samples in split {split}: "
                "two are the least that differ; prepare more photos or name another split"
            )
        chosen = np.linspace(0, num_real - 1, min(num_real, 2 * self.options.probe_samples))
        real = data.read(
            chosen.astype(int).tolist(),
            split=split,
            levels=self.levels,
            on_error=self.config.data.on_error,
        )
        self.real_distance = {g: mean_pairwise_distance(real["pyramid"][g]) for g in self.grids}
        if not all(self.real_distance.values()):
            raise ConfigError(
                f"data.path: the samples of {path} in split {split} are all the same: prepare "
                "photos that differ"
            )

    def latents(self, indices: Tensor, seed: int) -> Tensor:
        """z (N, z_dim)."""
        return draws.normal(seed, "sample", indices, (self.options.z_dim,), self.device)

    def first_layer(self, networks: Networks) -> Tensor:
        """The dense layer to 4x4."""
        G = networks["G"]
        assert isinstance(G, ProgressiveGenerator)
        return G.dense.weight.detach()

    def arguments(self, network: str) -> dict[str, Any]:
        """Of G."""
        return {
            "resolution": self.stage.resolution,
            "z_dim": self.options.z_dim,
            "channel_base": self.options.channel_base,
            "channel_max": self.options.channel_max,
        }

    def new_parameters(self, network: str) -> set[str]:
        """The block and ToRGB of the stage's resolution."""
        return self.G.new_parameters()

    def trainable(self, network: str) -> set[str]:
        """While fading in only what is new; afterwards all that is in use."""
        if self.G.fading:
            return self.G.new_parameters()
        return {name for name, _ in self.G.named_parameters()} - self.G.old_to_rgb()

    def set_fade(self, networks: Networks, alpha: float, fading: bool) -> None:
        """Set alpha in every copy of G."""
        for network in networks.values():
            if isinstance(network, ProgressiveGenerator):
                network.set_fade(alpha, fading)

    def constants(self) -> dict[str, float]:
        """The collapse floor of this stage's levels."""
        return {"floor": self.floor}

    def probe(self, networks: Networks, loss: float | None) -> Verdict:
        """Diversity of samples: mean pairwise feature distance over that of real pictures."""
        indices = torch.arange(self.options.probe_samples)
        pyramid = self._pyramid(self.sample(networks, indices, self.config.seed))
        ratios = [
            mean_pairwise_distance(pyramid[g].cpu()) / self.real_distance[g] for g in self.grids
        ]
        diversity = sum(ratios) / len(ratios)
        scalars = {"diversity": diversity}
        if loss is not None:
            scalars["loss_over_floor"] = loss / self.floor
        if not math.isfinite(diversity) or (loss is not None and not math.isfinite(loss)):
            return Verdict(scalars, "BROKEN", ("BROKEN: loss or samples are not finite",))
        share = f"samples differ {diversity:.1%} as much as real pictures"
        if diversity < COLLAPSED_BELOW:
            return Verdict(scalars, "COLLAPSED", (f"COLLAPSED: {share}",))
        if loss is not None and loss <= COLLAPSED_NEAR_FLOOR * self.floor:
            text = (
                f"COLLAPSED: loss {loss:.4g} is within 2 % of the floor {self.floor:.4g}; {share}"
            )
            return Verdict(scalars, "COLLAPSED", (text,))
        if diversity < COLLAPSING_BELOW:
            return Verdict(scalars, "COLLAPSING", (f"COLLAPSING: {share}",))
        return Verdict(scalars)

    def held_out(self, networks: Networks, batch: Batch) -> Scalars:
        """The objective against pyramids that were not trained on."""
        return {"mse": self._mse(networks["G"], batch, "z/held-out")}

    def describe(self) -> dict[str, Any]:
        """Which guide taught the run."""
        if self.guide is None:
            return {}
        info = self.guide.info
        return {"guide": info.to_dict(), "guide_label": info.label, "random_guide": info.random}

    def _pyramid(self, images: Tensor) -> dict[int, Tensor]:
        assert self.guide is not None, "begin() comes first"
        if self.stage.resolution <= NATIVE_UP_TO:
            return native_pyramid(self.guide, images, self.grids)
        return pooled_pyramid(self.guide, images, self.grids)

    def _losses(self, batch: Batch) -> tuple[Scalars, Scalars]:
        return {"mse": self._mse(self.G, batch, "z")}, {}

    def _mse(self, G: nn.Module, batch: Batch, purpose: str) -> Tensor:
        shape = (self.options.z_dim,)
        z = draws.normal(self.config.seed, purpose, batch["position"], shape, self.device)
        return pyramid_mse(self._pyramid(G(z)), batch["pyramid"])
