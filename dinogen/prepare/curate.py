"""Judge crops: how sharp one is, and whether it nearly repeats an earlier one."""

from __future__ import annotations

import imagehash
import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy.ndimage import laplace


def laplacian_variance(image: NDArray[np.uint8]) -> float:
    """Variance of the Laplacian of the luma (Pech-Pacheco et al. 2000); low means blurred.

    It depends on the image's size, so it compares crops of one size only.

    Args:
        image: ``(H, W, 3)`` uint8 RGB.

    Returns:
        Squared grey levels (0 to 255), 0 for a flat image.
    """
    luma = np.asarray(Image.fromarray(image).convert("L"), np.float32)
    return float(laplace(luma).var())


def perceptual_hash(image: NDArray[np.uint8]) -> int:
    """64-bit DCT hash (``imagehash.phash``) of ``(H, W, 3)`` uint8 RGB; near hashes look alike."""
    return int(str(imagehash.phash(Image.fromarray(image))), 16)


class Duplicates:
    """The hashes accepted so far; of near-duplicates the first in order is kept.

    Args:
        max_distance: hashes that differ in this many bits or fewer (0 to 64) are duplicates.
    """

    def __init__(self, max_distance: int) -> None:
        self._max_distance = max_distance
        self._keys: list[str] = []
        self._hashes = np.zeros(1024, np.uint64)

    def find(self, value: int) -> tuple[str, int] | None:
        """Key and distance in bits of the nearest accepted hash, if it is near enough.

        Of several equally near the first accepted one is named.
        """
        known = self._hashes[: len(self._keys)]
        if not len(known):
            return None
        distances = np.bitwise_count(known ^ np.uint64(value))
        nearest = int(distances.argmin())
        distance = int(distances[nearest])
        return (self._keys[nearest], distance) if distance <= self._max_distance else None

    def add(self, key: str, value: int) -> None:
        """Accept the hash of the crop ``key``."""
        if len(self._keys) == len(self._hashes):
            self._hashes = np.concatenate([self._hashes, np.zeros_like(self._hashes)])
        self._hashes[len(self._keys)] = value
        self._keys.append(key)
