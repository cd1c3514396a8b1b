"""The guides of a run: checked against the shards, and applied to generated images."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from dinogen.batch import Features
from dinogen.config import Config, ConfigError
from dinogen.features.base import Guide, GuideInfo, same_guide
from dinogen.features.load import load_guide
from dinogen.features.pyramid import (
    base_grid_of,
    native_pyramid,
    pooled_pyramid,
    resized_with_antialias,
)
from dinogen.guidance.comparing import MAIN
from dinogen.losses.features import mean_pairwise_distance
from dinogen.transfer import to_device
from shards.format.sample import OF_LATENTS, VECTORS, level_grid, level_guide
from shards.read import batch as shards
from shards.read.dataset import Dataset

# A channel that hardly varies is scaled as if it had this share of the other channels' deviation.
_LEAST_DEVIATION = 0.1

_logger = logging.getLogger(__name__)


class GuideSet:
    """One or several guides and the shards that they made: features of generated and real images.

    ```python
    guide = dinogen.load_guide("dinov2", path="facebook/dinov2-small", device="cuda")
    data = dinogen.open_dataset("data/faces")
    guides = dinogen.GuideSet({"main": guide}, data, levels=["p8"])
    objective = dinogen.objectives.Drift()
    with data.stream(batch_size=64, levels=guides.levels) as stream:
        for batch in stream:
            loss = objective(guides(generator(z)), guides.real(batch))
    ```

    Args:
        guides: by name; ``main`` is the one that ``dinogen prepare`` calls ``guide:``, the others
            have the names that they have in ``guides:``.
        data: packed with these guides.
        levels: which features to compare: ``p8`` (pooled to 8x8) or ``n8`` (native at 8x8) of the
            main guide, ``NAME.p8`` of others; default: all that the data have of these guides.
        device: where the guides are and real features are moved to; default: that of the guides'
            weights, or the CPU if they have none.
        normalize: divide each channel by its standard deviation over the data, so that all channels
            count the same; otherwise features are as the guides return them.
        on_error: what :meth:`read_real` does about a damaged sample, see ``Dataset.read``.

    Raises:
        ConfigError: the shards were made by other guides, or do not name them.
        ManifestError: the data lack a level, or its statistics.
        ValueError: there are no levels to compare, or a level belongs to none of the guides.
    """

    def __init__(
        self,
        guides: Mapping[str, Guide],
        data: Dataset,
        levels: Sequence[str] | None = None,
        *,
        device: torch.device | str | None = None,
        normalize: bool = True,
        on_error: Literal["stop", "skip"] = "stop",
    ) -> None:
        if levels is None:
            levels = [level for level in data.manifest.levels if _name_of(level) in guides]
            data.level_shapes(levels)  # it refuses two levels of one guide and grid
        if unknown := [level for level in levels if _name_of(level) not in guides]:
            raise ValueError(
                f"{unknown[0]}: there is no guide {_name_of(unknown[0])}; the guides are "
                f"{', '.join(guides)}"
            )
        if not levels:
            raise ValueError(
                f"{data.location}: its levels are {', '.join(data.manifest.levels) or 'none'}, and "
                f"none of them belongs to {', '.join(guides) or 'a guide'}: run `dinogen prepare`"
            )
        self.levels = tuple(levels)
        self.data = data
        self.on_error = on_error
        self.guides = {name: guides[name] for name in dict.fromkeys(map(_name_of, levels))}
        self.device = _device_of(self.guides.values()) if device is None else torch.device(device)
        for name in self.guides:
            self._check(name)
        self.base_grid = base_grid_of(data.manifest.prepare)
        # Generated images are enlarged as the real ones were, or equal images would differ.
        self.antialias = resized_with_antialias(data.manifest.prepare)
        if not self.antialias:
            _logger.warning(
                "%s: its pyramids were made by an earlier version of dinogen, which enlarged "
                "images for a guide without antialias (1 to 2 of 255 from Pillow's bicubic). "
                "Generated images are enlarged the same way, so that features compare. Prepare "
                "the photos again, into a new folder, to have both as Pillow does it",
                data.location,
            )
        self.scales = self._scales()
        self._normalize = normalize

    def __call__(self, images: Tensor) -> Features:
        """Features of generated images, differentiable to the pixels.

        Args:
            images: (B, 3, R, R), RGB in [-1, 1]. R is a multiple of the grids of native levels.

        Returns:
            (B, grid * grid, C) float32 by level.
        """
        found: Features = {}
        for name, guide in self.guides.items():
            own = [level for level in self.levels if _name_of(level) == name]
            for kind in dict.fromkeys(_kind_of(level) for level in own):
                grids = tuple(level_grid(level) for level in own if _kind_of(level) == kind)
                if kind == "p":
                    pyramid = pooled_pyramid(guide, images, grids, self.base_grid, self.antialias)
                else:
                    pyramid = native_pyramid(guide, images, grids, self.antialias)
                prefix = "" if name == MAIN else f"{name}."
                found |= {f"{prefix}{kind}{grid}": values for grid, values in pyramid.items()}
        return self._scaled({level: found[level] for level in self.levels})

    def real(self, batch: shards.Batch) -> Features:
        """Features of a batch's real images, as the shards hold them.

        Args:
            batch: read with these levels: ``data.stream(..., levels=guides.levels)``.

        Returns:
            (B, grid * grid, C) float32 by level, on the device.

        Raises:
            ValueError: the batch was read without one of the levels.
        """
        try:
            stored = {level: stored_features(batch, level) for level in self.levels}
        except KeyError:
            raise ValueError(
                f"the batch lacks some of the levels {', '.join(self.levels)}: read it with "
                "levels=guides.levels"
            ) from None
        return self._scaled(
            {level: to_device(values, self.device).float() for level, values in stored.items()}
        )

    def read_real(self, num: int, split: str = "train") -> Features:
        """Features of up to ``num`` real images, spread over a split.

        Returns:
            (N, grid * grid, C) float32 by level, on the device.

        Raises:
            ConfigError: there are fewer than two.
        """
        available = self.data.num_samples(split)
        if available < 2:
            raise ConfigError(
                f"data.split: {self.data.location} has {available} samples in split {split}, and "
                "at least two are needed: prepare more photos or name another split"
            )
        chosen = np.linspace(0, available - 1, min(available, num)).astype(int).tolist()
        batch = self.data.read(chosen, split=split, levels=self.levels, on_error=self.on_error)
        return self.real(batch)

    def distances(self, reals: Features) -> dict[str, float]:
        """Mean distance between real images by level.

        Args:
            reals: as :meth:`read_real` returns them.

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
        """Which guides these are, JSON-ready."""
        infos = {name: guide.info for name, guide in self.guides.items()}
        main = next(iter(infos.values()))
        found: dict[str, Any] = {
            "guide": main.to_dict(),
            "guide_label": ", ".join(info.label for info in infos.values()),
            "random_guide": any(info.random for info in infos.values()),
        }
        if len(infos) > 1:
            found["guides"] = {n: info.to_dict() for n, info in infos.items() if n != MAIN}
        return found

    def _scales(self) -> Features:
        """One over each channel's standard deviation over the data, (C,) by level.

        The variance is averaged over locations, so that all locations of a level keep their
        weights.
        """
        scales: Features = {}
        for level in self.levels:
            variance = torch.from_numpy(self.data.level_variance(level).astype(np.float64)).mean(0)
            least = _LEAST_DEVIATION * variance.mean().sqrt()
            scales[level] = variance.sqrt().clamp(min=least).reciprocal().float().to(self.device)
        return scales

    def _scaled(self, features: Features) -> Features:
        if not self._normalize:
            return features
        return {level: values * self.scales[level] for level, values in features.items()}

    def _check(self, name: str) -> None:
        """Refuse shards that were made by another guide."""
        info, path, manifest = self.guides[name].info, self.data.location, self.data.manifest
        made_by = (manifest.guide if name == MAIN else manifest.guides.get(name)) or {}
        key = "guide" if name == MAIN else f"guides.{name}"
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


def load_guides(config: Config, levels: Sequence[str], device: torch.device) -> dict[str, Guide]:
    """The guides of a config that some levels belong to, by name.

    Raises:
        GuideError: one of them cannot be loaded.
    """
    names = dict.fromkeys(map(_name_of, levels))
    return {
        name: load_guide(config.guide if name == MAIN else config.guides[name], device)
        for name in names
    }


def stored_features(batch: shards.Batch, level: str) -> Tensor:
    """Features (B, grid * grid, C) of a batch's real images as stored, such as ``pixels.p8``."""
    guide = level_guide(level)
    pyramid = batch["guides"][guide] if guide else batch["pyramid"]
    found: Tensor = pyramid[level_grid(level)]
    return found


def check_features(level: str) -> str:
    """The level, if it holds features and not latents, to validate options.

    Raises:
        ValueError: an autoencoder made it.
    """
    if level_guide(level) in OF_LATENTS:
        raise ValueError(
            f"{level} holds latents of an autoencoder, means beside log variances: use features "
            "of a guide, as p16 or n4"
        )
    return level


def facts_of_guide(made_by: Mapping[str, Any]) -> dict[str, Any]:
    """What a run says of the guide whose stored features it learns from, JSON-ready.

    Args:
        made_by: the guide as the shards name it, with more facts or less than
            :class:`GuideInfo` has.
    """
    found = {"guide": dict(made_by), "random_guide": bool(made_by.get("random"))}
    if all(one.name in made_by for one in fields(GuideInfo)):
        found["guide_label"] = GuideInfo.of(made_by).label
    return found


def _kind_of(level: str) -> str:
    """``p`` (pooled) or ``n`` (native)."""
    return level.rpartition(".")[2][0]


def _name_of(level: str) -> str:
    """The name of the guide that a level belongs to; empty for embeddings, which have none."""
    return "" if level in VECTORS else level_guide(level) or MAIN


def _device_of(guides: Iterable[Guide]) -> torch.device:
    modules = [guide for guide in guides if isinstance(guide, nn.Module)]
    weights = (weight for module in modules for weight in module.parameters())
    return next((weight.device for weight in weights), torch.device("cpu"))
