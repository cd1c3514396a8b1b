"""`manifest.json`: what a dataset consists of and where it comes from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from shards.errors import ManifestError
from shards.files import atomic_write

MANIFEST = "manifest.json"
# Takes the place of the manifest until packing is finished.
PACKING = "packing.json"
STATISTICS = "stats.safetensors"
MADE_AGAIN = "run `dinogen shards index`"
SPLITS = ("train", "val", "test")
# What only the packer knows, and whether it is written even if it is empty.
IDENTITY = {"guide": True, "prepare": True, "classes": False, "guides": False, "clip": False}


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ShardInfo(_Record):
    """One tar; sha256 is None only in memory, for plain tars without a manifest."""

    name: str
    split: str
    num_samples: int = Field(gt=0)
    num_bytes: int = Field(gt=0)
    sha256: str | None


class LevelInfo(_Record):
    """One level of features; `total_variance` is that of the train split, None if unknown.

    It is the variance over samples, averaged over the grid*grid locations and C channels: the mean
    squared error of the best constant answer, which no collapsed generator can beat.
    """

    grid: int = Field(gt=0)
    channels: int = Field(gt=0)
    dtype: str
    total_variance: float | None = Field(default=None, ge=0)


class SplitInfo(_Record):
    """Size of a split, and the fraction of the keys that it was given."""

    num_samples: int
    num_shards: int
    fraction: float | None = None


class StatisticsInfo(_Record):
    """The file with the per-location means and variances of every level."""

    file: str
    sha256: str


class Manifest(_Record):
    """The whole of `manifest.json`.

    Attributes:
        image_size: side of all stored images in pixels, None if it was never checked.
        has_labels: every sample of the dataset has a label.
        classes: names of the classes by their labels, 0, 1, ...; empty if they have none.
        guide: identity of the feature network (name, revision, weights hash, random or not).
        guides: identities of further ones, by the prefixes of their levels; empty if none.
        clip: identity of the network that made the levels "clip" and "text"; empty if none.
        prepare: settings that the photos were aligned with.
        levels: by name, "p4", "p8", "n4", "pixels.p4", "clip" ...
    """

    format: Literal["dinogen-shards"] = "dinogen-shards"
    version: Literal[1] = 1
    image_size: int | None
    resize_filter: Literal["box"] = "box"
    has_labels: bool
    classes: tuple[str, ...] = ()
    splits: dict[str, SplitInfo]
    levels: dict[str, LevelInfo]
    guide: dict[str, Any]
    guides: dict[str, dict[str, Any]] = {}
    clip: dict[str, Any] = {}
    prepare: dict[str, Any]
    statistics: StatisticsInfo | None
    shards: tuple[ShardInfo, ...]

    @property
    def identity(self) -> dict[str, Any]:
        """Where the samples come from: its fields named in :data:`IDENTITY`."""
        return {name: getattr(self, name) for name in IDENTITY}

    def of_split(self, split: str, location: str = "the dataset") -> tuple[ShardInfo, ...]:
        """The shards of a split, in their order; `location` is named in the error.

        Raises:
            ManifestError: if the dataset has no such split.
        """
        found = tuple(shard for shard in self.shards if shard.split == split)
        if not found:
            have = ", ".join(self.splits)
            raise ManifestError(f"{location} has no split {split!r}; its splits are {have}")
        return found

    def save(self, folder: Path) -> None:
        """Write `manifest.json` into `folder`, whole or not at all."""
        found = self.model_dump()
        for name, needed in IDENTITY.items():
            if not needed and not found[name]:
                del found[name]
        text = json.dumps(found, indent=1, ensure_ascii=False, allow_nan=False)
        with atomic_write(folder / MANIFEST) as file:
            file.write(text.encode() + b"\n")


def parse_manifest(data: bytes, name: str, counted: bool = True) -> Manifest:
    """Manifest from the bytes of the file called `name`; `counted` checks its sums as well.

    Raises:
        ManifestError: if it is no manifest of this format and version, or contradicts itself.
    """
    try:
        manifest = Manifest.model_validate_json(data)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ManifestError(
            f"{name}: {where or 'file'}: {first['msg']}; restore the file from its source, or "
            f"move it elsewhere and {MADE_AGAIN} to rebuild it from the tars"
        ) from error
    for split, info in manifest.splits.items() if counted else ():
        shards = [shard for shard in manifest.shards if shard.split == split]
        if (len(shards), sum(s.num_samples for s in shards)) != (info.num_shards, info.num_samples):
            raise ManifestError(
                f"{name}: the sizes of split {split!r} contradict its list of shards; "
                f"run `dinogen shards repair`"
            )
    names = [shard.name for shard in manifest.shards]
    if manifest.statistics is not None:
        names.append(manifest.statistics.file)
    # The files that a manifest names are read, fetched and written in the dataset's folder.
    if len(set(names)) != len(names) or not all(map(_is_plain, names)):
        raise ManifestError(
            f"{name}: shards.name and statistics.file must be unique names of files in its own "
            f"folder; restore the file from its source"
        )
    return manifest


def _is_plain(name: str) -> bool:
    return name not in ("", ".", "..") and not any(c in "/\\\0" for c in name)


def split_table(
    shards: tuple[ShardInfo, ...], fractions: dict[str, float] | None = None
) -> dict[str, SplitInfo]:
    """The `splits` of a manifest, counted from its shards."""
    table = {}
    for split in dict.fromkeys(shard.split for shard in shards):
        mine = [shard for shard in shards if shard.split == split]
        table[split] = SplitInfo(
            num_samples=sum(shard.num_samples for shard in mine),
            num_shards=len(mine),
            fraction=(fractions or {}).get(split),
        )
    return table
