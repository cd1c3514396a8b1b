"""A folder of plain WebDataset tars: described as if it had a manifest, or given one."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from shards import index as index_files
from shards.errors import ManifestError
from shards.files import sha256_file
from shards.index import ShardIndex
from shards.manifest import SPLITS, STATISTICS, LevelInfo, Manifest, ShardInfo, split_table
from shards.sample import level_grid, level_of_suffix
from shards.stats import Statistics, recall, save_statistics, shard_moments
from shards.table import build_index, load_plain_index

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


def adopt(folder: Path) -> Manifest:
    """Give a folder of plain tars whole indexes, statistics and a manifest, by reading it all.

    Where only the manifest of a dataset was lost, what the statistics repeat of it comes back.

    Raises:
        ManifestError: if there are no tars, or they hold different levels.
        IndexFileError: if a tar is damaged.
        CorruptSample: if a sample of the train split cannot be read.
    """
    for tar in sorted(folder.glob("*.tar")):
        build_index(tar, with_sums=True)
    manifest, _ = describe_plain(folder)
    shards = tuple(
        shard.model_copy(update={"sha256": sha256_file(folder / shard.name)})
        for shard in manifest.shards
    )
    manifest = manifest.model_copy(update={"shards": shards})
    statistics, has_labels = _measure(folder, manifest)
    identity = recall(folder / STATISTICS, statistics.arrays())
    return _save(folder, manifest.model_copy(update=identity), statistics, has_labels)


def complete(folder: Path, manifest: Manifest) -> Manifest:
    """Count and measure anew what a manifest says about its shards, and save it.

    Args:
        folder: of the dataset.
        manifest: with the right shards; splits, labels and statistics are made from them.

    Raises:
        IndexFileError: if a shard and its index do not fit.
        CorruptSample: if a sample of the train split cannot be read.
    """
    return _save(folder, manifest, *_measure(folder, manifest))


def _measure(folder: Path, manifest: Manifest) -> tuple[Statistics, bool]:
    """Statistics of the train split, and whether all samples have labels."""
    statistics = Statistics()
    has_labels = True
    for shard in manifest.shards:
        index = index_files.load(folder / index_files.index_name(shard.name))
        has_labels &= index.labels is not None
        if shard.split == "train" and manifest.levels:
            statistics.merge(shard_moments(folder / shard.name, index))
    return statistics, has_labels


def _save(folder: Path, manifest: Manifest, statistics: Statistics, has_labels: bool) -> Manifest:
    variances = statistics.total_variances()
    measured = save_statistics(statistics, folder, manifest.identity) if variances else None
    fractions = {
        name: info.fraction for name, info in manifest.splits.items() if info.fraction is not None
    }
    manifest = manifest.model_copy(
        update={
            "has_labels": has_labels,
            "splits": split_table(manifest.shards, fractions),
            "levels": {
                name: info.model_copy(update={"total_variance": variances.get(name)})
                for name, info in manifest.levels.items()
            },
            "statistics": measured,
        }
    )
    manifest.save(folder)
    return manifest
