"""The guides of a run: loaded, checked against the shards, and applied to generated pictures."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dinogen.batch import Features
from dinogen.config import Config, ConfigError
from dinogen.features.base import Guide, same_guide
from dinogen.features.load import load_guide
from dinogen.features.pyramid import (
    base_grid_of,
    native_pyramid,
    pooled_pyramid,
    resized_with_antialias,
)
from dinogen.guidance.gradient_cache import real_features
from dinogen.losses.features import mean_pairwise_distance
from shards.format.sample import level_grid, level_guide
from shards.read.dataset import Dataset

# A channel that hardly varies is not blown up further than to this share of the others' deviation.
_LEAST_DEVIATION = 0.1

_logger = logging.getLogger(__name__)


class Teacher:
    """All frozen networks that a guided run learns from.

    Args:
        config: the whole run.
        levels: which features of which guides: ``p8`` of the main one, ``NAME.p8`` of others.
        data: packed with these guides.
        device: where they run.

    Raises:
        ConfigError: the shards were made by other guides, or do not say by which.
    """

    def __init__(
        self, config: Config, levels: tuple[str, ...], data: Dataset, device: torch.device
    ) -> None:
        self.levels = levels
        self.device = device
        self.data = data
        self.on_error = config.data.on_error
        self.guides: dict[str, Guide] = {}
        for name in dict.fromkeys(level_guide(level) for level in levels):
            chosen = config.guides[name] if name else config.guide
            self.guides[name] = load_guide(chosen, device)
            made_by = data.manifest.guides.get(name) if name else data.manifest.guide
            self._check(name, made_by or {})
        self.base_grid = base_grid_of(data.manifest.prepare)
        # Generated images are enlarged as the real ones were, or equal images would differ.
        self.antialias = resized_with_antialias(data.manifest.prepare)
        if self.guides and not self.antialias:
            _logger.warning(
                "%s: its pyramids were made by an earlier version of dinogen, which enlarged "
                "images for a guide without antialias (1 to 2 of 255 from Pillow's bicubic). "
                "Generated images are enlarged the same way, so that features compare. Prepare "
                "the photos again, into a new folder, to have both as Pillow does it",
                data.location,
            )

    def features(self, images: Tensor) -> Features:
        """Features of pictures (B, 3, R, R) in [-1, 1] at every level, differentiable.

        Returns:
            (B, places, C) float32 by level.
        """
        found: Features = {}
        for name, guide in self.guides.items():
            own = [level for level in self.levels if level_guide(level) == name]
            for kind in dict.fromkeys(kind_of(level) for level in own):
                grids = tuple(level_grid(level) for level in own if kind_of(level) == kind)
                if kind == "p":
                    pyramid = pooled_pyramid(guide, images, grids, self.base_grid, self.antialias)
                else:
                    pyramid = native_pyramid(guide, images, grids, self.antialias)
                prefix = f"{name}." if name else ""
                found |= {f"{prefix}{kind}{grid}": values for grid, values in pyramid.items()}
        return {level: found[level] for level in self.levels}

    def scales(self) -> Features:
        """One over each channel's standard deviation over the data, (C,) by level.

        The variance is averaged over places, so that all places of a level keep their weights.
        """
        scales: Features = {}
        for level in self.levels:
            variance = torch.from_numpy(self.data.level_variance(level).astype(np.float64)).mean(0)
            least = _LEAST_DEVIATION * variance.mean().sqrt()
            scales[level] = variance.sqrt().clamp(min=least).reciprocal().float().to(self.device)
        return scales

    def reals(self, num: int, split: str) -> Features:
        """Features of up to ``num`` real pictures, spread over a split, on the device.

        Raises:
            ConfigError: there are fewer than two.
        """
        available = self.data.num_samples(split)
        if available < 2:
            raise ConfigError(
                f"data.split: {self.data.location} has {available} samples in split {split}: "
                "two are the least that differ; prepare more photos or name another split"
            )
        chosen = np.linspace(0, available - 1, min(available, num)).astype(int).tolist()
        batch = self.data.read(chosen, split=split, levels=self.levels, on_error=self.on_error)
        return {level: real_features(batch, level).float().to(self.device) for level in self.levels}

    def distances(self, reals: Features) -> dict[str, float]:
        """Mean distance between real pictures by level.

        Raises:
            ConfigError: they are all the same.
        """
        found = {level: mean_pairwise_distance(values.cpu()) for level, values in reals.items()}
        if not all(found.values()):
            raise ConfigError(
                f"data.path: the samples of {self.data.location} are all the same: prepare photos "
                "that differ"
            )
        return found

    def describe(self) -> dict[str, Any]:
        """Which guides teach, JSON-ready."""
        if not self.guides:
            return {}
        infos = {name: guide.info for name, guide in self.guides.items()}
        main = next(iter(infos.values()))
        found: dict[str, Any] = {
            "guide": main.to_dict(),
            "guide_label": ", ".join(info.label for info in infos.values()),
            "random_guide": any(info.random for info in infos.values()),
        }
        if len(infos) > 1:
            found["guides"] = {name: info.to_dict() for name, info in infos.items() if name}
        return found

    def _check(self, name: str, made_by: Mapping[str, Any]) -> None:
        """Refuse features of another guide than the one at hand."""
        info, path = self.guides[name].info, self.data.location
        key = f"guides.{name}" if name else "guide"
        if not made_by:
            raise ConfigError(
                f"{path}: its manifest does not say which guide made the pyramids ({key}), so none "
                "can be trusted to fit: run `dinogen prepare` again"
            )
        if same_guide(made_by, info):
            return
        mine = info.to_dict()
        other = ", ".join(
            f"{fact} {mine[fact]} instead of {made_by.get(fact)}"
            for fact in ("name", "path", "layer", "weights_sha256")
            if mine[fact] != made_by.get(fact)
        )
        raise ConfigError(
            f"{key}: not the one that made the pyramids of {path} ({other}): use that one, or run "
            "`dinogen prepare` again"
        )


def kind_of(level: str) -> str:
    """``p`` or ``n``."""
    return level.rpartition(".")[2][0]
