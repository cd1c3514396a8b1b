"""Random draws derived from (seed, purpose, position), the same on any number of ranks.

Nothing in a run keeps a random state: latent noise and augmentations belong to a place in the
global order of samples, so a resumed run, or one on other ranks, draws the same numbers.
Philox is counter-based (Salmon et al. 2011, "Parallel Random Numbers: As Easy as 1, 2, 3"): the
position is its counter, the seed and purpose are its key.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor


def derive(seed: int, purpose: str) -> np.ndarray:
    """Philox key, (2,) uint64, of a seed and a purpose such as ``"z/G"``."""
    digest = hashlib.blake2b(f"{seed}/{purpose}".encode(), digest_size=16).digest()
    return np.frombuffer(digest, dtype=np.uint64).copy()


def normal(seed: int, purpose: str, positions: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Standard normal noise of each position.

    Args:
        seed: the run's seed.
        purpose: what the noise is for; other purposes give independent noise.
        positions: (B,) int64, places in the global order.
        shape: shape of one position's noise.

    Returns:
        (B, *shape) float32 on the CPU.
    """
    key = derive(seed, purpose)
    noise = np.empty((len(positions), math.prod(shape)), dtype=np.float32)
    for row, position in zip(noise, positions.tolist(), strict=True):
        # the position is the counter's highest word: each has 2**192 draws before the next
        bits = np.random.Philox(key=key, counter=[0, 0, 0, position])
        np.random.Generator(bits).standard_normal(out=row, dtype=np.float32)
    return torch.from_numpy(noise).reshape(len(positions), *shape)


@contextlib.contextmanager
def torch_seed(seed: int, purpose: str) -> Iterator[None]:
    """Seed torch's CPU generator inside the block (weight init), and put it back after."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(derive(seed, purpose)[0] & np.uint64(2**63 - 1)))
        yield
