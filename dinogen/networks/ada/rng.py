"""The random numbers of the augmentation pipeline: which transforms happen, and how strong."""

from __future__ import annotations

import torch
from torch import Tensor

from dinogen.distributed import rng

TRANSFORMS = (
    "flip",
    "rotate_90",
    "translate_whole",
    "scale",
    "rotate_before",
    "stretch",
    "rotate_after",
    "translate",
    "brightness",
    "contrast",
    "luma_flip",
    "hue",
    "saturation",
    "band_0",
    "band_1",
    "band_2",
    "band_3",
    "noise",
    "cutout",
)


class TransformDraws:
    """Per sample and transform, one number that decides whether it happens and two parameters.

    On the CPU, as positions are: the matrices made of them are tiny, and their extent decides how
    much has to be padded.

    Args:
        seed: the run's seed.
        purpose: what the images are for.
        positions: (B,) int64 on the CPU.
    """

    def __init__(self, seed: int, purpose: str, positions: Tensor) -> None:
        self.seed = seed
        self.purpose = purpose
        self.positions = positions
        self.table = rng.uniform(seed, purpose, positions, (len(TRANSFORMS), 3)).double()

    def happens(self, name: str, p: float) -> Tensor:
        """(B,) bool, each true with probability p."""
        return self.table[:, TRANSFORMS.index(name), 0] < p

    def uniform(self, name: str, which: int = 0) -> Tensor:
        """(B,) float64 in (0, 1); ``which`` 0 or 1."""
        return self.table[:, TRANSFORMS.index(name), 1 + which]

    def normal(self, name: str, which: int = 0) -> Tensor:
        """(B,) float64, standard normal, from the same numbers as :meth:`uniform`."""
        numbers: Tensor = torch.special.ndtri(self.uniform(name, which))
        return numbers

    def pixels(self, shape: tuple[int, ...], device: torch.device) -> Tensor:
        """(B, *shape) float32 standard normal on the device."""
        purpose = f"{self.purpose}/pixels"
        return rng.normal(self.seed, purpose, self.positions, shape, device)
