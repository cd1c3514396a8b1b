"""What images are conditioned on: text and image embeddings, and latents that belong to samples."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dinogen.batch import Batch
from dinogen.config import Config, ConfigError
from dinogen.distributed import rng
from dinogen.features.clip import Clip, load_clip, same_clip
from dinogen.guidance.options import TextOptions
from dinogen.losses.features import clip_loss, pseudo_text
from dinogen.transfer import to_device
from shards.read.dataset import Dataset


@dataclass(frozen=True)
class Conditioning:
    """What samples are conditioned on.

    Attributes:
        embedding: (B, E) float32 of length 1.
        keep: (B,) bool; a sample that is False is unconditional.
    """

    embedding: Tensor
    keep: Tensor


class Text:
    """The text conditioning of a run, and the CLIP that it comes from.

    Args:
        options: ``family.text``.
        config: the whole run.
        data: with embeddings of every sample.
        device: where CLIP runs.

    Raises:
        ConfigError: there is no ``clip:``, or the data have no embeddings by this CLIP.
    """

    def __init__(
        self, options: TextOptions, config: Config, data: Dataset, device: torch.device
    ) -> None:
        self.options = options
        self.seed = config.seed
        self.device = device
        self.clip: Clip = matching_clip(config, data.manifest.clip, device)
        if self.clip.embed_dim != options.embed_dim:
            raise ConfigError(
                f"family.text.embed_dim: {options.embed_dim}, but clip: has embeddings of "
                f"{self.clip.embed_dim} dimensions: set it to {self.clip.embed_dim}"
            )
        variance = float(data.level_variance(options.level).sum())
        self._scale: float = options.joint_weight / max(variance, 1e-12) ** 0.5

    def conditioning(self, batch: Batch, purpose: str, drop: bool = True) -> Conditioning:
        """What the samples of a batch are conditioned on: their own embeddings, or nothing.

        Args:
            batch: a microbatch or a reference batch.
            purpose: of its random numbers, which depend on the samples' positions.
            drop: whether a share of the samples is unconditional, as in training.
        """
        positions = batch["position"]
        if self.options.condition == "captions":
            embedding = to_device(batch["text"], self.device).float()
            there = embedding.square().sum(1) > 0
            embedding = F.normalize(embedding, dim=1)
        else:
            embedding = F.normalize(to_device(batch["clip"], self.device).float(), dim=1)
            there = torch.ones(len(embedding), dtype=torch.bool, device=self.device)
            if self.options.noise:
                shape = (embedding.shape[1],)
                eps = rng.normal(self.seed, f"{purpose}/noise", positions, shape, self.device)
                embedding = pseudo_text(embedding, eps, self.options.noise)
        if drop:
            chance = rng.uniform(self.seed, f"{purpose}/drop", positions, (), self.device)
            there = there & (chance >= self.options.dropout)
        return Conditioning(embedding, there)

    def scaled(self, batch: Batch, purpose: str) -> Tensor:
        """Embeddings for objectives between distributions, 0 for unconditional samples.

        Args:
            batch: a microbatch or a reference batch.
            purpose: of its random numbers.

        Returns:
            (B, E) in standard deviations over the data, times ``joint_weight``.
        """
        found = self.conditioning(batch, purpose)
        return found.embedding * found.keep[:, None] * self._scale

    def loss(self, images: Tensor, conditioning: Conditioning) -> Tensor:
        """Mean of 1 - cos between images and their conditions; unconditional samples count 0.

        Args:
            images: generated (B, 3, R, R) in [-1, 1].
            conditioning: of the same samples.
        """
        return clip_loss(self.clip.images(images), conditioning.embedding, conditioning.keep)


def matching_clip(config: Config, made_by: Mapping[str, Any], device: torch.device) -> Clip:
    """The CLIP of a config, if it is the one that embedded the training data.

    Args:
        config: the whole run.
        made_by: the CLIP that embedded them, as ``Clip.info`` describes it.
        device: where it will run.

    Raises:
        ConfigError: there is no ``clip:``, or it is another one.
        GuideError: it cannot be loaded.
    """
    if config.clip is None:
        raise ConfigError("clip: family.text needs it: name a CLIP checkpoint (clip.path)")
    clip = load_clip(config.clip, device)
    if not same_clip(made_by, clip.info):
        raise ConfigError(
            f"clip: {config.clip.path} is not the one that embedded the images "
            f"({made_by.get('path', 'none')}): use that one, or prepare and train again"
        )
    return clip


def key_numbers(keys: Sequence[str]) -> Tensor:
    """A number of 63 bits (N,) for each key, which depends on the key alone."""
    digests = (hashlib.blake2b(key.encode(), digest_size=8).digest() for key in keys)
    return torch.tensor([int.from_bytes(digest, "little") >> 1 for digest in digests])


class LatentRows:
    """Finds the row of each sample in the table of learnt latents.

    Args:
        data: the training data.
        split: of the data.
        num_latents: rows of the table.

    Raises:
        ConfigError: the split has another number of samples.
    """

    def __init__(self, data: Dataset, split: str, num_latents: int) -> None:
        keys = sorted(set(data.keys(split)))
        if len(keys) != num_latents:
            raise ConfigError(
                f"family.objectives: paired has num_latents {num_latents}, but {data.location} has "
                f"{len(keys)} samples in {split}: set num_latents to {len(keys)}"
            )
        self.numbers = {key: number for number, key in enumerate(keys)}

    def __call__(self, keys: Sequence[str]) -> Tensor:
        """Rows (N,) of samples."""
        return torch.tensor([self.numbers[key] for key in keys])
