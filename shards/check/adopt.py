"""A folder of plain WebDataset tars: described as if it had a manifest, or given one."""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from shards.errors import IndexFileError, ManifestError, show_name
from shards.files import keep, sha256_file
from shards.format import index as index_files
from shards.format.foreign import compressed_tars, unpack_advice
from shards.format.index import ShardIndex
from shards.format.manifest import SPLITS, STATISTICS, LevelInfo, Manifest, ShardInfo, split_table
from shards.format.sample import level_grid, level_of_suffix
from shards.format.scan import FIX_ACCESS, survey
from shards.format.statistics import Statistics, recall, save_statistics, shard_moments
from shards.format.table import build_index, load_plain_index

log = logging.getLogger(__name__)
# At most this many tars are named in one error.
_SHOWN = 20
_SPLIT_NAME = re.compile(rf"({'|'.join(SPLITS)})-\d+\.tar")


def tars_of(folder: Path) -> list[Path]:
    """The tars in a folder that are not hidden, sorted by name.

    Raises:
        ManifestError: if there are none.
    """
    tars = sorted(
        path for path in folder.glob("*.tar") if not path.name.startswith(".") and not path.is_dir()
    )
    compressed = compressed_tars(folder)
    if not tars:
        raise ManifestError(f"{folder} {_why_none(folder, compressed)}")
    if compressed:
        log.warning(
            "%s: %d compressed tars are not read (%s, ...); %s",
            folder, len(compressed), compressed[0], unpack_advice(compressed),
        )  # fmt: skip
    return tars


def _why_none(folder: Path, compressed: list[str]) -> str:
    if compressed:
        others = f" and {len(compressed) - 1} more" if len(compressed) > 1 else ""
        return (
            f"holds compressed tars ({compressed[0]}{others}), no plain ones; "
            f"{unpack_advice(compressed)}"
        )
    below = sorted(path.parent.name for path in folder.glob("*/*.tar"))
    if below:
        return f"holds no .tar, but its folder {below[0]} does: use that one"
    folders = sorted(path.name for path in folder.glob("[!.]*.tar") if path.is_dir())
    if folders:
        return f"holds no .tar: {folders[0]} is a folder; pack its images, or make a tar of them"
    upper = sorted(path.name for path in folder.glob("[!.]*.[tT][aA][rR]"))
    if upper:
        return f"holds no .tar; rename {upper[0]} to {upper[0][:-4]}.tar"
    return "holds neither manifest.json nor any .tar; pack data into it"


def describe_plain(
    folder: Path, known: Mapping[str, ShardIndex] | None = None
) -> tuple[Manifest, dict[str, ShardIndex]]:
    """Manifest (without checksums and statistics) and indexes of a folder of plain tars.

    Args:
        folder: of the tars.
        known: indexes by the names of their tars; the others are read from disk or built.

    Raises:
        ManifestError: if there are no tars, or they hold different levels.
        IndexFileError: if tars cannot be used; the message names each.
    """
    tars = tars_of(folder)
    indexes = {}
    errors = []
    for tar in tars:
        try:
            indexes[tar.name] = (known or {}).get(tar.name) or load_plain_index(tar)
        except IndexFileError as error:
            errors.append(str(error))
        except OSError as error:
            errors.append(_cannot_read(tar, error))
    raise_for(errors)
    wanted = levels_of(indexes[tars[0].name], tars[0].name)
    for tar in tars[1:]:
        index = indexes[tar.name]
        if _same_but_dtype(levels_of(index, tar.name), wanted):
            index = build_index(tar, index.sums is not None, levels=wanted)
            indexes[tar.name] = index
        if (found := levels_of(index, tar.name)) != wanted:
            raise ManifestError(
                f"{tar}: holds {_named(found)}, but {tars[0].name} holds {_named(wanted)}: make "
                "all tars with the same features, or keep these in folders of their own"
            )
    shards = tuple(
        ShardInfo(
            name=name,
            split=split_of_name(name),
            num_samples=len(index),
            num_bytes=index.num_bytes,
            sha256=None,
        )
        for name, index in indexes.items()
    )
    shards = tuple(sorted(shards, key=lambda shard: SPLITS.index(shard.split)))
    manifest = Manifest(
        image_size=None,
        has_labels=all(index.labels is not None for index in indexes.values()),
        splits=split_table(shards),
        levels=wanted,
        guide={},
        prepare={},
        statistics=None,
        shards=shards,
    )
    return manifest, indexes


def split_of_name(name: str) -> str:
    """Split that a plain tar belongs to, by its name."""
    match = _SPLIT_NAME.fullmatch(name)
    return match[1] if match else "train"


def raise_for(errors: list[str]) -> None:
    """Raise one IndexFileError for all errors, if there are any."""
    if errors:
        more = f"\nand {len(errors) - _SHOWN} more" if len(errors) > _SHOWN else ""
        raise IndexFileError("\n".join(errors[:_SHOWN]) + more)


def _cannot_read(tar: Path, error: OSError) -> str:
    return f"{tar}: cannot be read: {error.strerror or error}; {FIX_ACCESS}"


def _same_but_dtype(one: dict[str, LevelInfo], other: dict[str, LevelInfo]) -> bool:
    def shapes(levels: dict[str, LevelInfo]) -> dict[str, tuple[int, int]]:
        return {name: (info.grid, info.channels) for name, info in levels.items()}

    return one != other and shapes(one) == shapes(other)


def _named(levels: dict[str, LevelInfo]) -> str:
    parts = (f"{name} of {info.channels} channels" for name, info in levels.items())
    return f"the levels {', '.join(parts)}" if levels else "no levels"


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


def adopt(folder: Path) -> tuple[Manifest, list[str]]:
    """Give a folder of plain tars complete indexes, statistics and a manifest, by reading it all.

    If only the manifest of a dataset was lost, what the statistics repeat of it is restored.

    Returns:
        The manifest, and what a user has to know about the tars, one line each.

    Raises:
        ManifestError: if there are no tars, or they hold different levels.
        IndexFileError: if tars cannot be used; the message names each. Then nothing has changed.
    """
    surveys, errors = {}, []
    for tar in tars_of(folder):
        try:
            surveys[tar] = survey(tar, True, pixels=True, finite=True)
        except OSError as error:
            errors.append(_cannot_read(tar, error))
            continue
        if surveys[tar].problems:
            errors.append(f"{tar}: {surveys[tar].problems[0]}")
    raise_for(errors)
    found_indexes = {tar.name: found.index for tar, found in surveys.items() if found.index}
    image_size, about_sizes = common_size(found_indexes)
    notes = []
    for tar, found in surveys.items():
        assert found.index is not None
        # If all have the same size, the manifest says so.
        pixels = None if image_size else found.index.pixels
        path = tar.with_name(index_files.index_name(tar.name))
        index_files.save(replace(found.index, pixels=pixels), path)
        notes += [f"{tar.name}: {line}" for line in found.notes()]
    # Not by file times: a tar may come from a machine whose clock is ahead.
    manifest, _ = describe_plain(folder, found_indexes)
    shards = tuple(
        shard.model_copy(update={"sha256": sha256_file(folder / shard.name)})
        for shard in manifest.shards
    )
    manifest = manifest.model_copy(update={"shards": shards, "image_size": image_size})
    statistics, has_labels = _measure(folder, manifest)
    identity = recall(folder / STATISTICS, statistics.arrays())
    if not identity and (folder / STATISTICS).is_file():
        notes.append(
            f"{STATISTICS}: describes other features; kept as {keep(folder / STATISTICS).name}"
        )
    manifest = manifest.model_copy(update=identity)
    return _save(folder, manifest, statistics, has_labels), notes + about_sizes


def common_size(indexes: Mapping[str, ShardIndex]) -> tuple[int | None, list[str]]:
    """Side of all images if it is the same, else None; and a line about the sizes if they differ.

    Args:
        indexes: by the names of their tars.
    """
    counts: Counter[tuple[int, int]] = Counter()
    example: dict[tuple[int, int], str] = {}
    for name, index in indexes.items():
        sizes = [] if index.pixels is None else index.pixels.tolist()
        for row, (width, height) in enumerate(sizes):
            if width:
                counts[width, height] += 1
                example.setdefault((width, height), f"{show_name(index.key(row))} of {name}")
    if len(counts) == 1 and (size := next(iter(counts)))[0] == size[1]:
        return size[0], []
    if not counts:
        return None, []
    shown = ", ".join(f"{count:,} of {w}x{h}" for (w, h), count in counts.most_common(6))
    line = f"images differ in size: {shown}{', ...' if len(counts) > 6 else ''}"
    smallest = min(counts, key=min)
    line += (
        f"; stages larger than {min(smallest)}x{min(smallest)} cannot use all of them, for "
        f"example {example[smallest]}"
    )
    if (odd := [size for size in counts if size[0] != size[1]]) and odd != [smallest]:
        line += f"; no stage can use those that are not square, for example {example[odd[0]]}"
    return None, [line]


def complete(folder: Path, manifest: Manifest) -> Manifest:
    """Recompute what a manifest says about its shards, and save it.

    Args:
        folder: of the dataset.
        manifest: with the right shards; splits, labels and statistics are made from them.

    Raises:
        IndexFileError: if a shard and its index do not match.
        CorruptSample: if a sample of the train split cannot be read.
    """
    return _save(folder, manifest, *_measure(folder, manifest))


def recount(folder: Path, manifest: Manifest, shards: tuple[ShardInfo, ...]) -> Manifest:
    """Save a manifest with new entries for its shards, without reading them.

    Args:
        folder: of the dataset.
        manifest: whose statistics and labels stay as they are.
        shards: the new entries.
    """
    update = {"shards": shards, "splits": split_table(shards, _fractions(manifest))}
    manifest = manifest.model_copy(update=update)
    manifest.save(folder)
    return manifest


def _fractions(manifest: Manifest) -> dict[str, float]:
    splits = manifest.splits.items()
    return {name: info.fraction for name, info in splits if info.fraction is not None}


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
    fractions = _fractions(manifest)
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
