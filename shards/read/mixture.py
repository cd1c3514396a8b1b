"""Several packed datasets as one, mixed by weight in an order that stays exact."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt

from shards.errors import ManifestError
from shards.format.manifest import LevelInfo, Manifest, SplitInfo
from shards.format.sample import Sample
from shards.read.dataset import Dataset, PackedDataset

# Guides that agree in these give the same features, wherever they were loaded from.
_GUIDE = ("name", "weights_sha256", "layer")
_POOLED = "base_grid"
# How images were resized for the guides; manifests of earlier versions do not say.
_RESIZE = "resize"
log = logging.getLogger(__name__)


class MixedDataset(Dataset):
    """Several packed datasets; each batch holds samples of each in proportion to its weight.

    Sample numbers run through the first dataset, then the second, and so on. An epoch of a stream
    has as many positions as there are samples in total; a dataset of N samples and weight w is
    shown once in N / w positions.

    Args:
        sets: two or more.
        weights: one per dataset; only their ratios count.

    Raises:
        ManifestError: the datasets contradict each other: the same level has another shape or
            guide, or the names of the classes differ.
        ValueError: the number of weights is not that of the datasets, or one is not positive.
    """

    def __init__(self, sets: Sequence[PackedDataset], weights: Sequence[Fraction]) -> None:
        if len(sets) < 2 or len(sets) != len(weights) or min(weights) <= 0:
            raise ValueError("a mix needs two or more datasets, each with a positive weight")
        total = sum(weights, Fraction(0))
        self._sets = tuple(sets)
        self._weights = tuple(weight / total for weight in weights)
        parts = [
            f"{float(w):.4g} of {one.location}" for w, one in zip(self._weights, sets, strict=True)
        ]
        super().__init__(" + ".join(parts), _common(self._sets))

    @property
    def sets(self) -> tuple[PackedDataset, ...]:
        """As `Dataset.sets`."""
        return self._sets

    @property
    def weights(self) -> tuple[Fraction, ...]:
        """As `Dataset.weights`."""
        return self._weights

    def keys(self, split: str = "train") -> list[str]:
        """As `Dataset.keys`; datasets may have keys in common."""
        self.manifest.of_split(split, self.location)
        return [key for one in self._sets if one.num_samples(split) for key in one.keys(split)]

    def sample(self, number: int, split: str = "train") -> Sample:
        """As `Dataset.sample`."""
        count = self.num_samples(split)
        if not 0 <= number < count:
            raise IndexError(f"{split} has samples 0 to {count - 1}, not {number}")
        for one in self._sets:
            if number < one.num_samples(split):
                return one.sample(number, split)
            number -= one.num_samples(split)
        raise AssertionError("the counts of the datasets sum to that of the mix")

    def unfit_images(self, size: int, split: str = "train") -> tuple[int, str]:
        """As `Dataset.unfit_images`."""
        found = [one.unfit_images(size, split) for one in self._sets if one.num_samples(split)]
        return sum(count for count, _ in found), next((first for _, first in found if first), "")

    def label_fault(self, split: str = "train") -> str:
        """As `Dataset.label_fault`."""
        sets = (one for one in self._sets if one.num_samples(split))
        return next((fault for one in sets if (fault := one.label_fault(split))), "")

    def level_mean(self, level: int | str) -> npt.NDArray[np.float32]:
        """As `Dataset.level_mean`: of the mix, in which each dataset has its weight."""
        return self._means(level)[1].astype(np.float32)

    def level_variance(self, level: int | str) -> npt.NDArray[np.float32]:
        """As `Dataset.level_variance`: of the mix, in which each dataset has its weight."""
        return self._variance(level).astype(np.float32)

    def total_variance(self, level: int | str) -> float:
        """As `Dataset.total_variance`: of the mix, in which each dataset has its weight."""
        return float(self._variance(level).mean())

    def _variance(self, level: int | str) -> npt.NDArray[np.float64]:
        """Law of total variance: the mean of the variances and the variance of the means."""
        means, middle = self._means(level)
        within = [one.level_variance(level).astype(np.float64) for one in self._sets]
        total = np.zeros_like(middle)
        for weight, mean, variance in zip(self._weights, means, within, strict=True):
            total += float(weight) * (variance + (mean - middle) ** 2)
        return total

    def _means(
        self, level: int | str
    ) -> tuple[list[npt.NDArray[np.float64]], npt.NDArray[np.float64]]:
        """The mean of each dataset, and that of the mix."""
        self.level_info(level)
        means = [one.level_mean(level).astype(np.float64) for one in self._sets]
        middle = np.zeros_like(means[0])
        for weight, mean in zip(self._weights, means, strict=True):
            middle += float(weight) * mean
        return means, middle


def _common(sets: Sequence[PackedDataset]) -> Manifest:
    """What the datasets have in common, as one manifest.

    Raises:
        ManifestError: they contradict each other.
    """
    manifests = [one.manifest for one in sets]
    sizes = [m.image_size for m in manifests if m.image_size is not None]
    has_labels = all(m.has_labels for m in manifests)
    first = manifests[0]
    for one, manifest in zip(sets, manifests, strict=True):
        if has_labels and manifest.classes != first.classes:
            raise ManifestError(
                f"{one.location}: its classes are {_named(manifest.classes)}, but those of "
                f"{sets[0].location} are {_named(first.classes)}: datasets in a mix must number "
                "the same classes in the same way"
            )
        _check_guides(sets[0], one)
    return Manifest(
        image_size=min(sizes, default=None),
        has_labels=has_labels,
        classes=first.classes if has_labels else (),
        splits=_splits(manifests),
        levels=_levels(sets),
        guide=first.guide,
        guides={
            name: info
            for name, info in first.guides.items()
            if all(name in manifest.guides for manifest in manifests)
        },
        clip=first.clip if all(manifest.clip for manifest in manifests) else {},
        prepare=_pyramids_of(first, (_POOLED, _RESIZE)),
        statistics=None,
        shards=tuple(shard for manifest in manifests for shard in manifest.shards),
    )


def _splits(manifests: Sequence[Manifest]) -> dict[str, SplitInfo]:
    names = dict.fromkeys(name for manifest in manifests for name in manifest.splits)
    found = {}
    for name in names:
        infos = [m.splits[name] for m in manifests if name in m.splits]
        found[name] = SplitInfo(
            num_samples=sum(info.num_samples for info in infos),
            num_shards=sum(info.num_shards for info in infos),
        )
    return found


def _levels(sets: Sequence[PackedDataset]) -> dict[str, LevelInfo]:
    """Levels that all of them have, without a variance, which differs between datasets."""
    found = {}
    for name, info in sets[0].manifest.levels.items():
        others = [one.manifest.levels.get(name) for one in sets]
        if None in others:
            continue
        bare = info.model_copy(update={"total_variance": None})
        for one, other in zip(sets, others, strict=True):
            if other is not None and other.model_copy(update={"total_variance": None}) != bare:
                raise ManifestError(
                    f"{one.location}: its level {name} has {other.channels} channels of "
                    f"{other.dtype}, but that of {sets[0].location} has {info.channels} of "
                    f"{info.dtype}: prepare both with the same guide"
                )
        found[name] = bare
    return found


def _check_guides(first: PackedDataset, other: PackedDataset) -> None:
    """Raise ManifestError unless the features of both come from the same networks."""
    a, b = first.manifest, other.manifest
    if not a.levels or not b.levels:
        return
    pairs = [("", a.guide, b.guide)]
    pairs += [(f" {name}", a.guides[name], b.guides[name]) for name in a.guides if name in b.guides]
    if a.clip and b.clip:
        pairs.append((" clip", a.clip, b.clip))
    for name, mine, its in pairs:
        if any(mine.get(fact) != its.get(fact) for fact in _GUIDE):
            raise ManifestError(
                f"{other.location}: its guide{name} ({its.get('path')}) differs from that of "
                f"{first.location} ({mine.get('path')}): prepare both with the same one"
            )
    grids, resizes = (
        [_pyramids_of(m, (name,)).get("pyramids", {}).get(name) for m in (a, b)]
        for name in (_POOLED, _RESIZE)
    )
    if resizes[0] != resizes[1]:
        log.warning(
            "%s and %s: images were resized for the guides in different ways (%s, %s), which "
            "shifts their features slightly; generated images are resized as in the first. "
            "Prepare the older one again",
            first.location,
            other.location,
            *(name or "as by an earlier version" for name in resizes),
        )
    if grids[0] != grids[1]:
        raise ManifestError(
            f"{other.location}: its pooled levels were averaged from another grid than those of "
            f"{first.location}: prepare both with the same prepare.pyramids.base_grid"
        )


def _pyramids_of(manifest: Manifest, facts: Sequence[str]) -> dict[str, Any]:
    """These entries of `prepare.pyramids` of a manifest, if it has any."""
    pyramids = manifest.prepare.get("pyramids")
    if pyramids is None:
        return {}
    return {"pyramids": {fact: pyramids[fact] for fact in facts if fact in pyramids}}


def _named(classes: Sequence[str]) -> str:
    return ", ".join(classes) or "without names"
