"""Random numbers derived from (seed, purpose, position), the same on any number of ranks.

Nothing in a run keeps a random state: latent noise and augmentations belong to a position in the
global order of samples, so a resumed run, or one on other ranks, draws the same numbers.
Philox 4x32-10 is counter-based (Salmon et al. 2011, "Parallel Random Numbers: As Easy as 1, 2, 3",
section 4.3): the position is part of its counter, the seed and purpose are its key.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

_WORD = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_NUM_ROUNDS = 10


def derive(seed: int, purpose: str) -> tuple[int, int]:
    """Philox key, two words of 32 bits, of a seed and a purpose such as ``"z/G"``."""
    digest = hashlib.blake2b(f"{seed}/{purpose}".encode(), digest_size=8).digest()
    first, second = np.frombuffer(digest, dtype="<u4").tolist()
    return first, second


def normal(
    seed: int,
    purpose: str,
    positions: Tensor,
    shape: tuple[int, ...],
    device: torch.device | None = None,
) -> Tensor:
    """Standard normal noise of each position, by the transform of Box and Muller (1958).

    Args:
        seed: the run's seed.
        purpose: what the noise is for; other purposes give independent noise.
        positions: (B,) int64, indices in the global order.
        shape: shape of one position's noise.
        device: where it is computed; where the positions are unless given.

    Returns:
        (B, *shape) float32.
    """
    words = _words(seed, purpose, positions, math.prod(shape), device)
    radius = torch.sqrt(-2 * torch.log(_open_unit(words[:, :, 0::2])))
    angle = 2 * math.pi * _open_unit(words[:, :, 1::2])
    pairs = torch.cat([radius * torch.cos(angle), radius * torch.sin(angle)], 2)
    return _shaped(pairs, shape)


def uniform(
    seed: int,
    purpose: str,
    positions: Tensor,
    shape: tuple[int, ...] = (),
    device: torch.device | None = None,
) -> Tensor:
    """Uniform numbers in (0, 1) of each position, (B, *shape) float32; as :func:`normal`."""
    words = _words(seed, purpose, positions, math.prod(shape), device)
    # the largest words round to 1.0, which is not below 1
    below = 1 - 2**-24
    return _shaped(_open_unit(words).clamp(max=below), shape)


def integers(
    seed: int,
    purpose: str,
    positions: Tensor,
    shape: tuple[int, ...] = (),
    *,
    high: int,
    device: torch.device | None = None,
) -> Tensor:
    """Uniform whole numbers from 0 to ``high - 1``, (B, *shape) int64; as :func:`normal`.

    Args:
        high: 1 to 2**31.
    """
    words = _words(seed, purpose, positions, math.prod(shape), device)
    return _shaped((words * high) >> 32, shape)


@contextlib.contextmanager
def torch_seed(seed: int, purpose: str) -> Iterator[None]:
    """Seed torch's CPU generator inside the block (weight init), and put it back after."""
    with torch.random.fork_rng(devices=[]):
        first, second = derive(seed, purpose)
        torch.manual_seed((first << 31 | second) & (2**63 - 1))
        yield


def philox(counter: tuple[Tensor, ...], key: tuple[int, int]) -> tuple[Tensor, ...]:
    """Philox 4x32-10: four words of each counter.

    Args:
        counter: four int64 tensors that broadcast, holding words of 32 bits.
        key: two words of 32 bits.

    Returns:
        Four int64 tensors of words from 0 to 2**32 - 1.
    """
    a, b, c, d = counter
    first, second = key
    for _ in range(_NUM_ROUNDS):
        # The product wraps around in int64, yet each of its 64 bits is right.
        low, high = a * _MULTIPLIERS[0], c * _MULTIPLIERS[1]
        a, b, c, d = (
            ((high >> 32) & _WORD) ^ b ^ first,
            high & _WORD,
            ((low >> 32) & _WORD) ^ d ^ second,
            low & _WORD,
        )
        first, second = (first + _WEYL[0]) & _WORD, (second + _WEYL[1]) & _WORD
    return a, b, c, d


def _words(
    seed: int, purpose: str, positions: Tensor, num: int, device: torch.device | None
) -> Tensor:
    """At least ``num`` words of each position, (B, ceil(num / 4), 4) int64."""
    rows = positions.to(device or positions.device)[:, None]
    blocks = torch.arange(math.ceil(num / 4), device=rows.device)[None, :]
    counter = (blocks, torch.zeros_like(blocks), rows & _WORD, (rows >> 32) & _WORD)
    return torch.stack(philox(counter, derive(seed, purpose)), 2)


def _open_unit(words: Tensor) -> Tensor:
    """Words to (0, 1], float32."""
    return (words.float() + 0.5) * 2.0**-32


def _shaped(numbers: Tensor, shape: tuple[int, ...]) -> Tensor:
    """(B, blocks, 4) cut to (B, *shape)."""
    return numbers.flatten(1)[:, : math.prod(shape)].reshape(len(numbers), *shape)
