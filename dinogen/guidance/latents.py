"""Latents tied to samples: numbers drawn from their keys, or rows of a table that is learnt."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from dinogen.config import ConfigError
from shards.read.dataset import Dataset


def numbers_of(keys: Sequence[str]) -> Tensor:
    """A number of 63 bits (N,) for each key, whatever else there is."""
    digests = (hashlib.blake2b(key.encode(), digest_size=8).digest() for key in keys)
    return torch.tensor([int.from_bytes(digest, "little") >> 1 for digest in digests])


class Rows:
    """Which row of the table belongs to which sample.

    Args:
        data: what is trained on.
        split: of it.
        num_latents: rows of the table.

    Raises:
        ConfigError: the split has another number of samples.
    """

    def __init__(self, data: Dataset, split: str, num_latents: int) -> None:
        keys = sorted(set(data.keys(split)))
        if len(keys) != num_latents:
            raise ConfigError(
                f"family.objectives: paired has num_latents {num_latents}, but {data.location} has "
                f"{len(keys)} samples in {split}: set it to that"
            )
        self.numbers = {key: number for number, key in enumerate(keys)}

    def __call__(self, keys: Sequence[str]) -> Tensor:
        """Rows (N,) of samples."""
        return torch.tensor([self.numbers[key] for key in keys])
