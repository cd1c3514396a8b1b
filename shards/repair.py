"""Rebuilds what can be rebuilt: indexes, shards without their damaged samples, the manifest."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from shards import index as index_files
from shards.errors import CorruptSample, IndexFileError, ManifestError
from shards.files import sha256_file
from shards.index import ShardIndex
from shards.manifest import MANIFEST, STATISTICS, Manifest, ShardInfo, parse_manifest
from shards.packed import Folder
from shards.plain import adopt, complete
from shards.sample import encode_npy
from shards.scan import scan
from shards.table import build_index
from shards.verify import inspect_shard
from shards.writer import write_shard


def rebuild_indexes(folder: Path) -> list[str]:
    """Make the indexes anew that are missing or wrong; give plain tars a manifest as well.

    Returns:
        One line for each thing done.

    Raises:
        IndexFileError: if a tar is damaged or differs from the manifest.
    """
    if not (folder / MANIFEST).is_file():
        return _adopt(folder)
    manifest = _manifest(folder)
    done = []
    for shard in manifest.shards:
        tar = folder / shard.name
        if not tar.is_file() or sha256_file(tar) != shard.sha256:
            raise IndexFileError(
                f"{tar} is missing or differs from {MANIFEST}; run `dinogen shards verify`"
            )
        name = index_files.index_name(shard.name)
        index = scan(tar, with_sums=True, levels=manifest.levels)
        if not _stored_equals(folder / name, index):
            index_files.save(index, folder / name)
            done.append(f"{name}: made anew")
    return done


def repair(folder: Path) -> list[str]:
    """Make a damaged dataset usable again, at the price of its damaged samples.

    Shards are rewritten without the samples that cannot be read; missing ones leave the manifest;
    indexes, checksums, counts and statistics are made anew where they are wrong. Whoever calls
    this has looked at what `verify` says and has no better copy.

    Returns:
        One line for each thing done.

    Raises:
        ManifestError: if there is no dataset, or nothing of it is left.
    """
    if not (folder / MANIFEST).is_file():
        return _repair_plain(folder)
    manifest = _manifest(folder)
    done: list[str] = []
    shards = []
    for shard in manifest.shards:
        kept = _repair_shard(folder, manifest, shard, done)
        if kept is not None:
            shards.append(kept)
    if not any(shard.split == "train" for shard in shards):
        raise ManifestError(f"{folder}: no sample of the train split is left; restore it")
    mended = complete(folder, manifest.model_copy(update={"shards": tuple(shards)}))
    if mended != manifest:
        done.append(f"{MANIFEST}: shards, counts and statistics brought up to date")
    return done


def _repair_shard(
    folder: Path, manifest: Manifest, shard: ShardInfo, done: list[str]
) -> ShardInfo | None:
    """What the manifest shall say about a shard from now on; None if nothing is left of it."""
    report = inspect_shard(Folder(folder), manifest, shard)
    tar, index_path = folder / shard.name, folder / index_files.index_name(shard.name)
    if report.missing:
        done.append(f"{shard.name}: missing, taken out of {MANIFEST}")
        index_path.unlink(missing_ok=True)
        return None
    rows = len(report.index) if report.index else 0
    sound = [row for row in range(rows) if row not in report.damaged]
    if report.index is None or not sound:
        tar.replace(tar.with_suffix(".tar.damaged"))
        index_path.unlink(missing_ok=True)
        done.append(f"{shard.name}: no sample can be read; set aside as {tar.name}.damaged")
        return None
    if report.torn or len(sound) < rows:
        info, _ = write_shard(tar, shard.split, _members(tar, report.index, sound))
        lost = shard.num_samples - info.num_samples
        done.append(f"{shard.name}: rewritten with {info.num_samples} samples, {lost} lost")
        return info
    if report.index_wrong:
        build_index(tar, with_sums=True)
        done.append(f"{index_path.name}: made anew")
    return shard.model_copy(
        update={
            "num_samples": rows,
            "num_bytes": tar.stat().st_size,
            "sha256": sha256_file(tar),
        }
    )


def _repair_plain(folder: Path) -> list[str]:
    done: list[str] = []
    for tar in sorted(folder.glob("*.tar")):
        damage: list[CorruptSample] = []
        index = scan(tar, with_sums=True, on_damage=damage.append)
        if damage:
            rows = list(range(len(index)))
            info, _ = write_shard(tar, "train", _members(tar, index, rows))
            done.append(f"{tar.name}: rewritten with the {info.num_samples} samples that are whole")
    return done + _adopt(folder)


def _adopt(folder: Path) -> list[str]:
    manifest = adopt(folder)
    done = [f"{MANIFEST}: made from {len(manifest.shards)} plain tars, with their indexes"]
    if manifest.guide:
        done.append(f"{MANIFEST}: guide and prepare taken from {STATISTICS}")
    elif manifest.levels:
        done.append(f"{MANIFEST}: guide is empty, for nothing here says which one made the levels")
    return done


def _members(
    tar: Path, index: ShardIndex, rows: list[int]
) -> Iterator[tuple[str, dict[str, bytes]]]:
    """(key, members) of some rows, as they lie in the tar."""
    descriptor = os.open(tar, os.O_RDONLY)
    try:
        for row in rows:
            members = {}
            for number, column in enumerate(index.columns):
                offset, size = int(index.offsets[row, number]), int(index.sizes[row, number])
                if offset < 0:
                    continue
                data = os.pread(descriptor, size, offset)
                if column.shape is not None and column.dtype is not None:
                    # The header in the tar is not held by any checksum: written anew.
                    data = encode_npy(np.frombuffer(data, column.dtype).reshape(column.shape))
                members[column.suffix] = data
            yield index.key(row), members
    finally:
        os.close(descriptor)


def _manifest(folder: Path) -> Manifest:
    path = folder / MANIFEST
    return parse_manifest(path.read_bytes(), str(path), counted=False)


def _stored_equals(path: Path, index: ShardIndex) -> bool:
    try:
        return index_files.load(path).same_as(index)
    except (FileNotFoundError, IndexFileError):
        return False
