"""Keys of ``representation:``, and a global feature of images: read, generated, measured."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field, field_validator
from torch import Tensor, nn

from dinogen.batch import Batch, Scalars
from dinogen.config import ConfigError, Section
from dinogen.diffusion.flow import target, walk_times
from dinogen.diffusion.ode import integrate
from dinogen.diffusion.process import q_sample
from dinogen.distributed import rng
from dinogen.guidance.guides import check_features, facts_of_guide, stored_features
from dinogen.networks.representation import RepresentationMLP
from dinogen.transfer import to_device
from shards.errors import ManifestError
from shards.format.sample import VECTORS, level_grid, level_guide, level_name
from shards.read import batch as shards
from shards.read.dataset import Dataset

# A channel that hardly varies is scaled as if it had this share of the other channels' deviation.
LEAST_DEVIATION = 0.1
# Images whose deviation stands for that of all, within 2 %, where the shards do not hold it.
NUM_MEASURED = 1024
# As networks of diffusion know the time.
TIME_SCALE = 1000.0

Networks = Mapping[str, nn.Module]
log = logging.getLogger(__name__)


class RepresentationOptions(Section):
    """A global feature is generated first, and the image from it."""

    level: str = Field(
        "p4",
        description="where it is stored: p1 (prepare.pyramids.grids: [1]), clip, or a larger "
        "level, whose mean over all locations it is: that of p4, p8 and p16 is p1",
    )
    channels: int = Field(384, ge=1, description="of the level; 384 for DINOv2 small")
    dropout: float = Field(
        0.1, ge=0, lt=1, description="share of the images that G learns without it, for guidance"
    )
    width: int = Field(1024, ge=2, multiple_of=2, description="of R's layers")
    depth: int = Field(6, ge=1, description="residual blocks of R, of two layers each")
    steps: int = Field(25, ge=1, description="steps of Heun's method in which R generates it")

    @field_validator("level")
    @classmethod
    def _of_an_image(cls, level: str) -> str:
        if level_name(level) == "text":
            raise ValueError("level text is of captions: use clip, which is of images, or p1")
        return check_features(level)


class Representation:
    """The global feature of a run's images, and the network R that generates it.

    R learns the velocity of a rectified flow (:mod:`dinogen.diffusion.flow`) of the normalised
    feature, at uniform times.

    Args:
        options: ``family.representation``.
        seed: of the run.
        device: where R is.
    """

    def __init__(self, options: RepresentationOptions, seed: int, device: torch.device) -> None:
        self.options = options
        self.seed = seed
        self.device = device
        self._guide: dict[str, Any] = {}

    def arguments(self, num_classes: int) -> dict[str, Any]:
        """Of R, as ``Family.arguments``."""
        own = self.options
        return {
            "channels": own.channels,
            "width": own.width,
            "depth": own.depth,
            "num_classes": num_classes,
        }

    @property
    def levels(self) -> tuple[str, ...]:
        """What is read of each sample."""
        return (self.options.level,)

    def check_beside(self, levels: Sequence[str]) -> None:
        """Make sure that a batch can hold its level beside those of ``repa``.

        Raises:
            ConfigError: one of them is of the same guide and grid, but of another kind.
        """
        own = self.options.level
        for other in levels:
            same = (level_guide(other), level_grid(other)) == (level_guide(own), level_grid(own))
            if same and other != own:
                raise ConfigError(
                    f"family.repa.level, family.representation.level: {other} and {own} are of the "
                    "same guide and grid, of which a batch holds one level: give both the same, or "
                    "levels of different grids"
                )

    def check_data(self, data: Dataset) -> None:
        """Compare the options with the levels of the data.

        Raises:
            ConfigError: the data lack the level, or it has another number of channels.
        """
        level, channels = self.options.level, self.options.channels
        try:
            found = data.level_info(level)
        except ManifestError as error:
            raise ConfigError(f"family.representation.level: {error}; {_remedy(level)}") from None
        if found.channels != channels:
            raise ConfigError(
                f"family.representation.channels: {channels}, but level {level} of "
                f"{data.location} has {found.channels}: set it to {found.channels}"
            )

    def begin(
        self, R: RepresentationMLP, data: Dataset, split: str, on_error: Literal["stop", "skip"]
    ) -> None:
        """Hand R the mean and deviation of the feature over the training images.

        Both are in the statistics of the shards, but for the deviation of the mean of a larger
        level: this is measured on up to ``NUM_MEASURED`` samples, evenly spaced.

        Args:
            R: gets them as buffers.
            data: with the level, see :meth:`check_data`.
            split: that is trained on.
            on_error: what to do about a damaged sample, see ``Dataset.read``.

        Raises:
            ConfigError: the level is the same in all samples.
            ManifestError: the data have no statistics.
        """
        level = self.options.level
        self._guide = _made_by(data, level)
        mean = data.level_mean(level).mean(0)
        if level_grid(level) == 1:
            deviation = np.sqrt(data.level_variance(level)[0])
        else:
            deviation = self._measured(data, split, on_error)
        least = LEAST_DEVIATION * float(np.sqrt(np.square(deviation).mean()))
        if not least:
            raise ConfigError(
                f"family.representation.level: {level} is the same in all samples of "
                f"{data.location}: prepare photos that differ"
            )
        with torch.no_grad():
            R.mean.copy_(torch.from_numpy(mean))
            R.std.copy_(torch.from_numpy(deviation).clamp(min=least))

    def describe(self) -> dict[str, Any]:
        """What made the feature, as the shards name it; empty before :meth:`begin`."""
        if not self._guide:
            return {}
        if self.options.level in VECTORS:
            random = {"random_guide": True} if self._guide.get("random") else {}
            return {"clip": self._guide} | random
        return facts_of_guide(self._guide)

    def embedding(self, networks: Networks, batch: Batch) -> Tensor:
        """The normalised features of a batch's images, (B, channels) float32 on the device."""
        return _R(networks).normalized(to_device(self._stored(batch), self.device))

    def keep(self, position: Tensor, kind: str) -> Tensor:
        """Which samples (B,) bool keep their feature in a step; the others learn without.

        Args:
            position: (B,) of the samples.
            kind: ends the purpose of the draw.
        """
        drawn = rng.uniform(self.seed, f"embedding{kind}", position, (), self.device)
        return drawn >= self.options.dropout

    def losses(self, networks: Networks, batch: Batch, label: Tensor | None, kind: str) -> Scalars:
        """Mean squared error of R's velocity, at a time drawn per sample.

        Args:
            networks: R among them.
            batch: of images with the level.
            label: (B,) int64 on the device; None without classes.
            kind: ends the purposes of the draws.
        """
        embedding, position = self.embedding(networks, batch), batch["position"]
        t = rng.uniform(self.seed, f"R/t{kind}", position, (), self.device)
        eps = rng.normal(self.seed, f"R/eps{kind}", position, self.shape, self.device)
        noise = t[:, None]
        x = q_sample(embedding, eps, 1 - noise, noise)
        output = _R(networks)(x, TIME_SCALE * t, label)
        return {"representation": (output - target("v", embedding, eps)).square().mean()}

    @property
    def shape(self) -> tuple[int]:
        """Of one feature, and of the noise that it is generated from."""
        return (self.options.channels,)

    def facts(self, networks: Networks) -> dict[str, Any]:
        """What the embedding of an exported G is, JSON-ready: a stored feature, normalised."""
        R = _R(networks)
        return {
            "embedding": {
                "level": self.options.level,
                "mean": R.mean.tolist(),
                "std": R.std.tolist(),
                "null": networks["G"].get_parameter("null_embedding").tolist(),
            }
        }

    def noise(self, indices: Tensor, seed: int) -> Tensor:
        """What features of sample numbers (N,) are generated from, (N, channels) on the device."""
        return rng.normal(seed, "sample/R", indices, self.shape, self.device)

    def generate(self, networks: Networks, noise: Tensor, label: Tensor | None) -> Tensor:
        """Normalised features (N, channels) from noise.

        Args:
            networks: the moving averages.
            noise: (N, channels) standard normal.
            label: (N,) int64 on the device; None without classes.
        """
        R = _R(networks)

        def velocity(x: Tensor, time: float) -> Tensor:
            v: Tensor = R(x, torch.full((len(x),), TIME_SCALE * time, device=x.device), label)
            return v

        return integrate(velocity, noise, walk_times(self.options.steps), "heun")

    def _stored(self, batch: shards.Batch) -> Tensor:
        """The features as stored, (B, channels)."""
        level = self.options.level
        if level in VECTORS:
            return batch["clip"]
        return stored_features(batch, level).float().mean(1)

    def _measured(
        self, data: Dataset, split: str, on_error: Literal["stop", "skip"]
    ) -> np.ndarray[Any, np.dtype[np.float32]]:
        """Deviation of the mean over all locations of a level, by channel.

        Of a mix, that of samples drawn by weight: the law of total variance.
        """
        level, first = self.options.level, 0
        shares, means, variances = [], [], []
        for one, weight in zip(data.sets, data.weights, strict=True):
            num = one.num_samples(split)
            if not num:
                continue
            chosen = np.linspace(0, num - 1, min(num, NUM_MEASURED)).astype(int) + first
            log.info("representation: measuring %s on %d images", level, len(chosen))
            batch = data.read(chosen.tolist(), split=split, levels=[level], on_error=on_error)
            stored = self._stored(batch).double()
            shares.append(float(weight))
            means.append(stored.mean(0).numpy())
            variances.append(stored.var(0, unbiased=False).numpy())
            first += num
        share = np.array(shares)[:, None] / sum(shares)
        middle = (share * means).sum(0)
        total = (share * (variances + (means - middle) ** 2)).sum(0)
        deviation: np.ndarray[Any, np.dtype[np.float32]] = np.sqrt(total).astype(np.float32)
        return deviation


def _made_by(data: Dataset, level: str) -> dict[str, Any]:
    """The guide or CLIP that made a level, as the manifest names it."""
    manifest, name = data.manifest, level_guide(level)
    if level in VECTORS:
        found = manifest.clip
    else:
        found = manifest.guides.get(name, {}) if name else manifest.guide
    if not found:
        log.warning(
            "%s: its manifest does not say what made level %s, so neither will the run",
            data.location,
            level,
        )
    return found


def _R(networks: Networks) -> RepresentationMLP:
    R = networks["R"]
    assert isinstance(R, RepresentationMLP)
    return R


def _remedy(level: str) -> str:
    """How data get a level."""
    if level in VECTORS:
        return (
            "name a clip: and prepare the photos again, or take the mean of a level that is there"
        )
    prefix, _, own = level.rpartition(".")
    where = f"guides: {prefix}" if prefix else "guide"
    return (
        f"prepare the photos again with this {where}, prepare.pyramids.make=always and "
        f"prepare.pyramids.grids=[{level_grid(own)}], or take the mean of a level that is there"
    )
