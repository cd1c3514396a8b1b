"""Alignment of a network's hidden tokens with stored features (REPA): options, checks, loss.

Yu et al. 2024, "Representation Alignment for Generation: Training Diffusion Transformers Is Easier
Than You Think". The encoder is not run in training: the shards hold its features.
"""

from __future__ import annotations

import logging
from dataclasses import asdict
from typing import Any

import torch
from pydantic import Field, field_validator
from torch import Tensor

from dinogen.batch import Batch
from dinogen.config import Config, ConfigError, Section
from dinogen.guidance.guides import check_features, facts_of_guide, stored_features
from dinogen.losses.features import alignment
from dinogen.networks.denoising import Alignment, DenoisingNetwork
from dinogen.transfer import to_device
from shards.format.sample import VECTORS, flipped_level, level_grid, level_guide, level_name
from shards.read.dataset import Dataset

_logger = logging.getLogger(__name__)


class RepaOptions(Section):
    """Keys of ``family.repa:``: hidden tokens are aligned with features that the shards hold."""

    layer: int = Field(
        ..., ge=1, description="block after which tokens are aligned; 1 is the first"
    )
    level: str = Field(
        "p16", description="stored features: p16 of guide:, NAME.p16 of one of guides:"
    )
    channels: int = Field(
        384, ge=1, description="channels of these features; 384 is DINOv2-small's number"
    )
    weight: float = Field(0.5, gt=0, description="of the loss, the negative mean cosine")
    hidden: int = Field(2048, ge=1, description="width of the projector's hidden layers")
    until_kimg: float | None = Field(
        None,
        gt=0,
        description="thousands of images of the run after which the weight is 0; default: never",
    )

    @field_validator("level")
    @classmethod
    def _a_grid(cls, level: str) -> str:
        if level_name(level) in VECTORS:
            raise ValueError(f"{level} is one vector of an image: use a level of a grid, as p16")
        return check_features(level)


class Repa:
    """What a family needs to align hidden tokens with stored features.

    Args:
        options: of the family.
        config: the whole run.
    """

    def __init__(self, options: RepaOptions, config: Config) -> None:
        self.options = options
        self.config = config
        self.guide: dict[str, Any] = {}

    @property
    def arguments(self) -> dict[str, int]:
        """The network's argument ``align``."""
        own = self.options
        return asdict(Alignment(own.layer, own.channels, own.hidden))

    @property
    def levels(self) -> tuple[str, ...]:
        """What is read of each sample: the level, and that of the mirrored image if some are."""
        level = self.options.level
        return (level, flipped_level(level)) if self.config.augment.flip else (level,)

    def check(self, network: DenoisingNetwork) -> None:
        """Make sure that the network's tokens lie on the grid of the features.

        Raises:
            ConfigError: they do not; it names the layers and levels that fit.
        """
        own, grids = self.options, network.grids
        side, found = level_grid(own.level), network.grid_of(own.layer)
        if found == side:
            return
        fitting = [number for number, grid in enumerate(grids, 1) if grid == side]
        raise ConfigError(
            f"family.repa.layer: after block {own.layer} there are {found}x{found} tokens, but "
            f"level {own.level} holds {side}x{side} features: use "
            + (f"block {_listed(fitting)}, or " if fitting else "")
            + f"a level of another grid, as {own.level.removesuffix(str(side))}{found}"
        )

    def check_data(self, data: Dataset) -> None:
        """Compare the options with the levels of the data.

        Raises:
            ConfigError: the data lack the level, or it has another number of channels.
        """
        own, there = self.options, data.manifest.levels
        for level in self.levels:
            if level not in there:
                raise ConfigError(
                    f"family.repa.level: {data.location} has no level {level}; its levels are "
                    f"{', '.join(there) or 'none'}"
                )
            channels = there[level].channels
            if channels != own.channels:
                raise ConfigError(
                    f"family.repa.channels: {own.channels}, but level {level} of {data.location} "
                    f"has {channels}: set it to {channels}"
                )

    def begin(self, data: Dataset) -> None:
        """Take note of the guide that made the features, as the data name it."""
        name, manifest = level_guide(self.options.level), data.manifest
        self.guide = manifest.guides.get(name, {}) if name else manifest.guide
        if not self.guide:
            _logger.warning(
                "%s: its manifest does not say which guide made level %s, so neither will the run",
                data.location,
                self.options.level,
            )
        if self.config.augment.rotate:
            _logger.warning(
                "augment.rotate: %g turns images, but not the features that they are aligned with",
                self.config.augment.rotate,
            )

    def describe(self) -> dict[str, Any]:
        """The guide that made the features, as the shards name it; empty before :meth:`begin`."""
        return facts_of_guide(self.guide) if self.guide else {}

    def cosine(self, tokens: Tensor, batch: Batch) -> Tensor:
        """Mean cosine of tokens and features, those of the mirrored image where it is mirrored.

        Args:
            tokens: (B, g * g, A).
            batch: holds :attr:`levels`; ``flipped`` says which images are mirrored.

        Returns:
            Scalar float32 in [-1, 1].
        """
        features = to_device(stored_features(batch, self.options.level), tokens.device)
        if "flipped" in batch:
            other = stored_features(batch, flipped_level(self.options.level))
            mirrored = batch["flipped"][:, None, None]
            features = torch.where(mirrored, to_device(other, tokens.device), features)
        return alignment(tokens, features)

    def weight(self, nimg: int) -> float:
        """The weight of the loss at ``nimg``: it ends where ``until_kimg`` says so.

        Wang et al. 2025, "REPA Works Until It Doesn't: Early-Stopped, Holistic Alignment
        Supercharges Diffusion Training": past some point alignment holds a generator back.
        """
        until = self.options.until_kimg
        return 0.0 if until is not None and nimg >= until * 1000 else self.options.weight


def _listed(numbers: list[int]) -> str:
    """As 3, 4 or 7."""
    *most, last = map(str, numbers)
    return f"{', '.join(most)} or {last}" if most else last
