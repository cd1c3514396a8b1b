"""Mean and variance of features, merged shard by shard without losing digits."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from shards.files import atomic_write
from shards.format.index import ShardIndex
from shards.format.manifest import IDENTITY, STATISTICS, StatisticsInfo
from shards.read.reader import read_levels

Doubles = npt.NDArray[np.float64]
log = logging.getLogger(__name__)
# The one key of the file's metadata; safetensors would write several in an order of its own.
_METADATA = "dinogen"


class Moments:
    """Running mean and population variance of arrays of one shape, in float64.

    Sums are taken of differences from the first array, so that a feature with a large mean and a
    small spread keeps its digits; two such sums are merged by Chan's formula.
    """

    def __init__(self) -> None:
        self.count = 0
        self._shift: Doubles | None = None
        self._sum: Doubles | None = None
        self._square: Doubles | None = None

    def add(self, values: npt.NDArray[Any]) -> None:
        """Add one array."""
        wide = values.astype(np.float64)
        if self._shift is None or self._sum is None or self._square is None:
            self._shift = wide
            self._sum, self._square = np.zeros_like(wide), np.zeros_like(wide)
        else:
            wide -= self._shift
            self._sum += wide
            wide *= wide
            self._square += wide
        self.count += 1

    def result(self) -> tuple[int, Doubles, Doubles]:
        """(count, mean, sum of squared differences from the mean)."""
        if self._shift is None or self._sum is None or self._square is None:
            raise ValueError("no array was added")
        mean = self._sum / self.count
        spread = np.maximum(self._square - self.count * mean**2, 0.0)
        return self.count, self._shift + mean, spread


class Statistics:
    """Moments of every level of a split, from those of its shards in their order."""

    def __init__(self) -> None:
        self._levels: dict[str, tuple[int, Doubles, Doubles]] = {}

    def merge(self, shard: dict[str, Moments]) -> None:
        """Add the moments of one shard; the order of the shards decides the last bits."""
        for name, moments in shard.items():
            count, mean, spread = moments.result()
            if name in self._levels:
                before, old_mean, old_spread = self._levels[name]
                total, step = before + count, mean - old_mean
                mean = old_mean + step * (count / total)
                spread = old_spread + spread + step**2 * (before * count / total)
                count = total
            self._levels[name] = (count, mean, spread)

    def arrays(self) -> dict[str, npt.NDArray[np.float32]]:
        """ "p4.mean" and "p4.var" float32 (locations, channels) for every level."""
        found: dict[str, npt.NDArray[np.float32]] = {}
        for name, (count, mean, spread) in sorted(self._levels.items()):
            found[f"{name}.mean"] = mean.astype(np.float32)
            found[f"{name}.var"] = (spread / count).astype(np.float32)
        return found

    def total_variances(self) -> dict[str, float]:
        """By level, the variance averaged over locations and channels."""
        return {name: float(s.mean() / n) for name, (n, _, s) in self._levels.items()}


def shard_moments(tar: Path, index: ShardIndex) -> dict[str, Moments]:
    """Moments of every level over one finished shard.

    Raises:
        CorruptSample: if a sample cannot be read.
    """
    moments: dict[str, Moments] = {}
    descriptor = os.open(tar, os.O_RDONLY)
    try:
        for row in range(len(index)):
            for name, values in read_levels(index, row, tar.name, descriptor).items():
                moments.setdefault(name, Moments()).add(values)
    finally:
        os.close(descriptor)
    return moments


def save_statistics(
    statistics: Statistics, folder: Path, identity: Mapping[str, Any]
) -> StatisticsInfo:
    """Write the file of statistics of a dataset; returns what the manifest says about it.

    Args:
        statistics: of the train split.
        folder: of the dataset.
        identity: the :data:`shards.format.manifest.IDENTITY` of its manifest, repeated in the file:
            without it nothing can be trained on the features, and no tar holds it if the manifest
            is lost.
    """
    written = {
        name: identity[name] for name, needed in IDENTITY.items() if needed or identity.get(name)
    }
    text = json.dumps(written, ensure_ascii=False)
    with atomic_write(folder / STATISTICS) as file:
        file.write(save(statistics.arrays(), {_METADATA: text}))
    return StatisticsInfo(file=STATISTICS, sha256=file.hexdigest())


def recall(path: Path, arrays: Mapping[str, npt.NDArray[np.float32]]) -> dict[str, Any]:
    """The :data:`shards.format.manifest.IDENTITY` of a dataset, as an older file repeats it.

    Args:
        path: of that file.
        arrays: the statistics of the features found now.

    Returns:
        Nothing if the file does not hold it, or describes other features than those.
    """
    try:
        with safe_open(path, "numpy") as file:
            identity = json.loads(file.metadata()[_METADATA])
            before = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        found = {
            "guide": dict(identity["guide"]),
            "prepare": dict(identity["prepare"]),
            "classes": tuple(map(str, identity.get("classes", ()))),
            "guides": {str(name): dict(info) for name, info in identity.get("guides", {}).items()},
            "clip": dict(identity.get("clip", {})),
        }
    except FileNotFoundError:
        return {}
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        log.warning("%s does not say which guide made the features: %r", path, error)
        return {}
    if not _alike(before, arrays):
        log.warning("%s describes other features than the tars hold; ignored", path)
        return {}
    return found


def _alike(
    before: Mapping[str, npt.NDArray[Any]], now: Mapping[str, npt.NDArray[np.float32]]
) -> bool:
    """Whether both can be of the same guide's features, even if samples were lost in between."""
    if {name: a.shape for name, a in before.items()} != {name: a.shape for name, a in now.items()}:
        return False
    levels = {name.rpartition(".")[0] for name in now}
    return all(
        np.square(before[f"{level}.mean"] - now[f"{level}.mean"]).mean()
        <= now[f"{level}.var"].mean()
        for level in levels
    )
