"""Latents of a frozen autoencoder in place of images: read, normalised, and decoded to images.

Rombach et al. 2022, "High-Resolution Image Synthesis with Latent Diffusion Models", section 3: a
family that walks from noise is trained on an autoencoder's posteriors, which `dinogen prepare`
stores, and its samples are decoded.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from dinogen import hub
from dinogen.batch import Batch
from dinogen.config import Config, ConfigError, Section, StageConfig
from dinogen.distributed import rng
from dinogen.errors import UserError
from dinogen.features.autoencoder import FrozenAutoencoder, load_autoencoder
from dinogen.features.base import GuideError
from dinogen.guidance.guides import stored_features
from dinogen.networks.denoising import LatentScale
from dinogen.transfer import to_device
from shards.format.sample import LATENTS, flipped_level, level_grid, level_guide
from shards.read.dataset import Dataset

_KEY = "family.latent.path"
# Pixels that are encoded or decoded at once: 4 images of 256x256, 64 of 64x64.
_PIXELS_AT_ONCE = 1 << 18
# Samples whose posteriors tell how wide posteriors are.
_NUM_MEASURED = 128
# A channel that hardly varies is scaled as if it had this share of the others' deviation.
_LEAST_DEVIATION = 0.01


class LatentOptions(Section):
    """Latents of an autoencoder in place of pixels; the data are prepared with them."""

    path: str | None = Field(
        None,
        description="the autoencoder that decodes: hub name, hf://user/name[@revision][/path], "
        "folder of an AutoencoderKL of diffusers, or file of `dinogen export` of a vae; default: "
        "where the one that made the latents of the data was",
    )
    revision: str | None = Field(None, description="hub revision (commit, tag or branch)")
    channels: int = Field(4, ge=1, description="channels of the latents")
    factor: int = Field(
        8, ge=1, description="side of the images over that of the latents: 8 makes 32x32 of 256x256"
    )
    sample: Literal["posterior", "mean"] = Field(
        "posterior",
        description="posterior: each time an image is shown, its latent is drawn; mean: it is the "
        "mean of its posterior",
    )


class Latents:
    """The latents of one stage, and the autoencoder that they belong to.

    A latent is z = mean + exp(log_variance / 2) * eps of the stored posterior, with noise eps by
    position (Kingma and Welling 2014, "Auto-Encoding Variational Bayes", section 2.4), brought to
    mean 0 and deviation 1 per channel. The numbers for that come from the statistics of the shards
    and are buffers of G. Training reads stored posteriors; the autoencoder runs where images are
    wanted.

    Args:
        options: of the family.
        config: the whole run.
        stage: its resolution is that of the images.
        device: where the autoencoder runs.

    Attributes:
        shape: of one latent, (C, s, s).

    Raises:
        ConfigError: the resolution cannot be divided by the factor.
    """

    def __init__(
        self, options: LatentOptions, config: Config, stage: StageConfig, device: torch.device
    ) -> None:
        side, rest = divmod(stage.resolution, options.factor)
        if rest or not side:
            raise ConfigError(
                f"family.latent.factor: images of {stage.resolution}x{stage.resolution} cannot be "
                f"divided by {options.factor}: set it to that of the autoencoder"
            )
        self.options = options
        self.config = config
        self.stage = stage
        self.device = device
        self.shape = (options.channels, side, side)
        self._level = f"{LATENTS}.n{side}"
        self._autoencoder: FrozenAutoencoder | None = None
        self._known: Mapping[str, Any] | None = None
        self._folder = Path()

    @property
    def levels(self) -> tuple[str, ...]:
        """What is read of each sample; latents of mirrored images too, if training mirrors them."""
        mirrored = self.config.augment.flip > 0
        return (self._level, flipped_level(self._level)) if mirrored else (self._level,)

    def check_data(self, data: Dataset) -> None:
        """Refuse shards without these latents; reads nothing but the manifest.

        Raises:
            ConfigError: naming the key and what it has to be.
        """
        where, levels = data.location, data.manifest.levels
        stored = {
            name: (info.channels // 2, level_grid(name))
            for name, info in levels.items()
            if level_guide(name) == LATENTS
        }
        if not stored:
            raise ConfigError(
                f"family.latent: {where} holds no latents: prepare the photos again with "
                "prepare.latents.path=AUTOENCODER, into a new folder, or leave out family.latent"
            )
        found = ", ".join(f"{c} channels at {s}x{s}" for c, s in stored.values())
        wanted = self.stage.resolution
        # the same grid can be that of other images at another factor
        sizes = [one.manifest.image_size for one in data.sets]
        if size := next((one for one in sizes if one not in (None, wanted)), None):
            raise ConfigError(
                f"stages: stage {wanted} reads latents of {wanted}x{wanted} images, and {where} "
                f"holds those of {size}x{size} images ({found}): train one stage of {size}, or "
                f"prepare with prepare.faces.size={wanted}"
            )
        if stored.get(self._level, (0, 0))[0] != self.shape[0]:
            channels, side = next(iter(stored.values()))
            factor, rest = divmod(wanted, side)
            if rest or not factor:
                raise ConfigError(
                    f"stages: stage {wanted} cannot read the latents of {where} ({found}): set it "
                    "to the side of the images that they were made of"
                )
            raise ConfigError(
                f"family.latent: {where} holds {found}, made of images of {wanted}x{wanted}: set "
                f"family.latent.channels={channels} and family.latent.factor={factor}"
            )
        missing = [level for level in self.levels if level not in levels]
        if missing:
            raise ConfigError(
                f"augment.flip: {where} holds no latents of mirrored images: prepare the "
                "photos again with prepare.latents.flips=true, into a new folder, or leave it "
                "out"
            )

    def begin(self, data: Dataset, scale: LatentScale) -> None:
        """Load the autoencoder, and take the normalisation from the data.

        Args:
            data: of the run.
            scale: of G, whose buffers are set.

        Raises:
            ConfigError: the autoencoder is not the one that made the latents.
            GuideError: it cannot be loaded.
        """
        self._known = data.manifest.guides.get(LATENTS)
        _ = self.autoencoder
        scale.set(*self._statistics(data))

    def recall(self, facts: Mapping[str, Any], folder: Path) -> None:
        """Learn which autoencoder decodes, from what :meth:`describe` said in training.

        Args:
            facts: of the checkpoint.
            folder: of the run or of the exported file; the autoencoder may lie there.
        """
        self._known, self._folder = facts.get("autoencoder"), folder

    def describe(self) -> dict[str, Any]:
        """The autoencoder's identity, once it is loaded."""
        if self._autoencoder is None:
            return {}
        info = self._autoencoder.info
        random = {"random_guide": True} if info["random"] else {}
        return {"autoencoder": info, "frozen": {_KEY: info["weights_sha256"]}} | random

    @property
    def autoencoder(self) -> FrozenAutoencoder:
        """Loaded when it is first needed.

        Raises:
            ConfigError: it is not the one that made the latents.
            GuideError: it cannot be loaded.
        """
        if self._autoencoder is None:
            self._autoencoder = self._load()
        return self._autoencoder

    def drawn(self, batch: Batch, scale: LatentScale, kind: str = "") -> Tensor:
        """The normalised latents (B, C, s, s) float32 of a batch.

        Args:
            batch: with :attr:`levels`; where ``flipped`` is true, the mirrored image's is taken.
            scale: of G.
            kind: part of the purpose of the noise.
        """
        stored = to_device(stored_features(batch, self._level), self.device)
        if "flipped" in batch:
            mirrored = to_device(stored_features(batch, flipped_level(self._level)), self.device)
            flipped = to_device(batch["flipped"], self.device)
            stored = torch.where(flipped[:, None, None], mirrored, stored)
        channels, side, _ = self.shape
        posterior = stored.float().transpose(1, 2).unflatten(2, (side, side))
        z, log_variance = posterior.split(channels, 1)
        if self.options.sample == "posterior":
            purpose, seed = f"latent{kind}", self.config.seed
            eps = rng.normal(seed, purpose, batch["position"], self.shape, device=self.device)
            z = torch.addcmul(z, torch.exp(0.5 * log_variance), eps)
        return scale.normalized(z)

    @torch.no_grad()
    def decoded(self, x: Tensor, scale: LatentScale) -> Tensor:
        """The images (B, 3, R, R) float32 in [-1, 1] of normalised latents (B, C, s, s)."""
        found = [self.autoencoder.decode(scale.restored(part)) for part in x.split(self._at_once)]
        return torch.cat(found)

    @torch.no_grad()
    def encoded(self, images: Tensor, scale: LatentScale) -> Tensor:
        """The normalised means of the posteriors (B, C, s, s) of images (B, 3, R, R)."""
        parts = images.to(self.device).split(self._at_once)
        return torch.cat([scale.normalized(self.autoencoder.encode(part)[0]) for part in parts])

    def facts(self, scale: LatentScale) -> dict[str, Any]:
        """How the latents of a graph become images, JSON-ready."""
        return {
            "latent": {
                "mean": scale.mean.tolist(),
                "deviation": scale.deviation.tolist(),
                "autoencoder": dict(self._known or {}),
                "images": "decode(x * deviation + mean) by the autoencoder",
            }
        }

    @property
    def _at_once(self) -> int:
        return max(1, _PIXELS_AT_ONCE // self.stage.resolution**2)

    def _load(self) -> FrozenAutoencoder:
        known = self._known or {}
        path, revision = self.options.path, self.options.revision
        if path is None:
            path, revision = known.get("path"), known.get("revision")
        if path is None:
            raise UserError(
                f"{_KEY}: neither the config nor the checkpoint names the autoencoder that "
                "decodes: give it"
            )
        if hub.is_address(path):
            # the commit beside an address is that of the address
            revision = self.options.revision
        beside = self._folder / Path(path).name
        if not Path(path).expanduser().exists() and beside.exists():
            path, revision = str(beside), None
        digest = known.get("weights_sha256")
        try:
            found = load_autoencoder(path, self.device, revision, _KEY)
        except GuideError as error:
            if digest is None:
                raise
            raise GuideError(
                f"{error}; the latents of this generator are decoded by the one whose weights "
                f"have the SHA-256 {digest[:12]}: put it, or a link to it, at {beside.absolute()}"
            ) from error
        if digest not in (None, found.info["weights_sha256"]):
            raise ConfigError(
                f"{_KEY}: {path} is not the autoencoder that made the latents (SHA-256 "
                f"{found.info['weights_sha256'][:12]} instead of {digest[:12]}): give that one, or "
                "leave it out"
            )
        wanted = {"channels": self.options.channels, "factor": self.options.factor}
        for name, value in wanted.items():
            if (its := getattr(found, name)) != value:
                raise ConfigError(
                    f"family.latent.{name}: {value}, but that of the autoencoder {path} is {its}: "
                    f"set it to {its}"
                )
        return found

    def _statistics(self, data: Dataset) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation (C,) of each channel over the data and all locations."""
        channels = self.options.channels
        of_location = data.level_mean(self._level)[:, :channels].astype(np.float64)
        within = data.level_variance(self._level)[:, :channels].astype(np.float64)
        variance = within.mean(0) + of_location.var(0)
        if self.options.sample == "posterior":
            variance += self._posterior_variance(data)
        if not variance.max() > 0:
            raise ConfigError(
                f"data.path: the latents of {data.location} are all the same: prepare photos that "
                "differ"
            )
        deviation = np.sqrt(np.maximum(variance, _LEAST_DEVIATION**2 * variance.mean()))
        return torch.from_numpy(of_location.mean(0)), torch.from_numpy(deviation)

    def _posterior_variance(self, data: Dataset) -> np.ndarray[Any, np.dtype[np.float64]]:
        """Mean variance (C,) of the posteriors, of some samples of each dataset.

        The statistics of the shards hold the mean of log variances, which is not the log of the
        mean.
        """
        total, first = np.zeros(self.options.channels), 0
        split, skip = self.config.data.split, self.config.data.on_error
        for one, weight in zip(data.sets, data.weights, strict=True):
            num = one.num_samples(split)
            if not num:
                continue
            chosen = np.linspace(0, num - 1, min(num, _NUM_MEASURED)).astype(int) + first
            batch = data.read(chosen.tolist(), split=split, levels=(self._level,), on_error=skip)
            log_variance = stored_features(batch, self._level)[:, :, self.options.channels :]
            total += float(weight) * log_variance.double().exp().mean((0, 1)).numpy()
            first += num
        return total
