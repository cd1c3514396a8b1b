"""A folder of plain WebDataset tars, described as if it had a manifest."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from shards.errors import ManifestError
from shards.index import ShardIndex
from shards.manifest import SPLITS, LevelInfo, Manifest, ShardInfo, split_table
from shards.sample import level_grid, level_of_suffix
from shards.table import load_plain_index

_SPLIT_NAME = re.compile(rf"({'|'.join(SPLITS)})-\d+\.tar")


def describe_plain(folder: Path) -> tuple[Manifest, dict[str, ShardIndex]]:
    """Manifest (without checksums and statistics) and indexes of a folder of plain tars.

    Raises:
        ManifestError: if there are no tars, or they hold different levels.
        IndexFileError: if a tar is damaged.
    """
    tars = sorted(folder.glob("*.tar"))
    if not tars:
        raise ManifestError(f"{folder} holds neither manifest.json nor any .tar; pack data into it")
    indexes = {tar.name: load_plain_index(tar) for tar in tars}
    shards = []
    for name, index in indexes.items():
        match = _SPLIT_NAME.fullmatch(name)
        split = match[1] if match else "train"
        shards.append(
            ShardInfo(
                name=name,
                split=split,
                num_samples=len(index),
                num_bytes=index.num_bytes,
                sha256=None,
            )
        )
    shards.sort(key=lambda shard: SPLITS.index(shard.split))
    levels = [levels_of(index, name) for name, index in indexes.items()]
    for name, found in zip(indexes, levels, strict=True):
        if found != levels[0]:
            raise ManifestError(f"{folder / name}: holds other levels than {tars[0].name}")
    manifest = Manifest(
        image_size=None,
        has_labels=all(index.labels is not None for index in indexes.values()),
        splits=split_table(tuple(shards)),
        levels=levels[0],
        guide={},
        prepare={},
        statistics=None,
        shards=tuple(shards),
    )
    return manifest, indexes


def levels_of(index: ShardIndex, shard: str) -> dict[str, LevelInfo]:
    """Levels that a shard holds.

    Raises:
        ManifestError: if an array is not (grid * grid, C) as its name says.
    """
    levels = {}
    for column in sorted(index.columns, key=lambda column: column.suffix):
        name = level_of_suffix(column.suffix)
        if name is None or column.shape is None or column.dtype is None:
            continue
        grid = level_grid(name)
        if column.shape[0] != grid**2:
            raise ManifestError(f"{shard}: {name} has shape {column.shape}, not ({grid**2}, C)")
        dtype = np.dtype(column.dtype).name
        levels[name] = LevelInfo(grid=grid, channels=column.shape[1], dtype=dtype)
    return levels
