"""From a tar to its index: samples found by their headers, payloads measured and summed up."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from shards.errors import CorruptSample, IndexFileError
from shards.files import sum64
from shards.index import Column, ShardIndex
from shards.manifest import LevelInfo
from shards.sample import META_SUFFIX, VECTORS, decode_meta, level_of_suffix, npy_header
from shards.tar import BLOCK, Member, TarError, walk

_FLOATS = ("<f2", "<f4")


@dataclass(frozen=True)
class Entry:
    """One sample found in a tar: its members by suffix."""

    key: str
    members: dict[str, Member]


def entries(descriptor: int, shard: str) -> Iterator[Entry]:
    """Samples of a tar, as WebDataset groups them: neighbours with the same key.

    Raises:
        CorruptSample: where the tar is damaged, after the last sample that is surely whole.
    """
    key: str | None = None
    members: dict[str, Member] = {}
    try:
        for member in walk(descriptor):
            folder, slash, base = member.name.rpartition("/")
            stem, dot, suffix = base.partition(".")
            if not dot or not stem:
                continue
            mine = folder + slash + stem
            if mine != key:
                if key is not None:
                    yield Entry(key, members)
                key, members = mine, {}
            if suffix.lower() in members:
                raise CorruptSample(shard, mine, suffix, "the sample has this member twice")
            members[suffix.lower()] = member
    except TarError as error:
        where = "the first sample" if key is None else key
        raise CorruptSample(shard, where, "", f"here or right behind it: {error}") from error
    if key is not None:
        yield Entry(key, members)


def payload_start(member: Member, suffix: str, shard: str, key: str) -> tuple[int, Column]:
    """Bytes before the payload of a member, and the column it belongs to.

    Raises:
        CorruptSample: if a level's .npy header is damaged or does not fit its size.
    """
    level = level_of_suffix(suffix)
    if level is None:
        return 0, Column(suffix)
    try:
        shape, dtype, header = npy_header(member.head, member.name)
    except ValueError as error:
        raise CorruptSample(shard, key, suffix, str(error)) from error
    if level in VECTORS:
        if len(shape) == 1:
            shape = (1, *shape)
        if dtype.str not in _FLOATS or len(shape) != 2 or shape[0] != 1:
            return 0, Column(suffix)  # tars from elsewhere may call anything so
    if dtype.str not in _FLOATS or len(shape) != 2:
        raise CorruptSample(
            shard, key, suffix, f"is {dtype} {shape}; needed is float16 or float32 (places, C)"
        )
    if header >= BLOCK or header + int(np.prod(shape)) * dtype.itemsize != member.size:
        raise CorruptSample(shard, key, suffix, f"{member.size} bytes do not fit {shape} {dtype}")
    return header, Column(suffix, dtype.str, shape)


def scan(
    path: Path,
    with_sums: bool,
    levels: Mapping[str, LevelInfo] | None = None,
    on_damage: Callable[[CorruptSample], None] | None = None,
) -> ShardIndex:
    """Index of a tar, from its headers alone or (with_sums) from all its bytes.

    Args:
        path: of the tar.
        with_sums: read the payloads too and sum them up.
        levels: what the arrays must be; those of the first sample unless given.
        on_damage: takes each damaged sample, which is then left out; where it is None, the first
            one is raised.

    Raises:
        IndexFileError: if the tar holds no sample, or one key twice.
        CorruptSample: if the tar is damaged, or a sample's members contradict the others'.
    """
    columns: dict[str, Column] = {}
    keys: list[bytes] = []
    rows: list[dict[str, tuple[int, int, int]]] = []
    labels: list[int | None] = []
    descriptor = os.open(path, os.O_RDONLY)
    try:
        num_bytes = os.fstat(descriptor).st_size
        found = entries(descriptor, path.name)
        while True:
            try:
                entry = next(found, None)
                if entry is None:
                    break
                row = _row(descriptor, entry, path.name, columns, levels or {}, with_sums)
                label = _label(descriptor, entry, path.name)
            except CorruptSample as damage:
                if on_damage is None:
                    raise
                on_damage(damage)
                continue
            keys.append(entry.key.encode("utf-8", "surrogateescape"))
            rows.append(row)
            labels.append(label)
    finally:
        os.close(descriptor)
    if not keys:
        raise IndexFileError(f"{path}: holds no sample; delete the file")
    if len(set(keys)) != len(keys):
        raise IndexFileError(f"{path}: a key occurs twice; pack the data anew with unique keys")
    table = [[row.get(suffix, (-1, 0, 0)) for suffix in columns] for row in rows]
    # Sums use all 64 bits, which the other two columns' signed type has not.
    sums = np.array([[cell[2] for cell in cells] for cells in table], np.uint64)
    return ShardIndex(
        num_bytes=num_bytes,
        columns=tuple(columns.values()),
        keys=np.array(keys),
        offsets=np.array([[cell[0] for cell in cells] for cells in table], np.int64),
        sizes=np.array([[cell[1] for cell in cells] for cells in table], np.int64),
        sums=sums if with_sums else None,
        labels=None if None in labels else np.array(labels, np.int64),
    )


def _row(
    descriptor: int,
    entry: Entry,
    shard: str,
    columns: dict[str, Column],
    levels: Mapping[str, LevelInfo],
    with_sums: bool,
) -> dict[str, tuple[int, int, int]]:
    """(offset, size, sum) of every payload of a sample; new kinds of members join `columns`."""
    row = {}
    for suffix, member in entry.members.items():
        header, column = payload_start(member, suffix, shard, entry.key)
        level = levels.get(level_of_suffix(suffix) or "")
        if level is not None:
            dtype, shape = np.dtype(level.dtype).str, (level.grid**2, level.channels)
            needed = Column(suffix, dtype, shape)
        else:
            needed = columns.get(suffix, column)
        if column != needed:
            what = f"is {column.dtype} {column.shape}, needed is {needed.dtype} {needed.shape}"
            raise CorruptSample(shard, entry.key, suffix, what)
        columns.setdefault(suffix, column)
        offset, size = member.offset + header, member.size - header
        total = sum64(os.pread(descriptor, size, offset)) if with_sums else 0
        row[suffix] = (offset, size, total)
    return row


def _label(descriptor: int, entry: Entry, shard: str) -> int | None:
    member = entry.members.get(META_SUFFIX)
    if member is None:
        return None
    whole = len(member.head) == member.size
    data = member.head if whole else os.pread(descriptor, member.size, member.offset)
    try:
        label: int | None = decode_meta(data, entry.key).get("label")
    except ValueError as error:
        raise CorruptSample(shard, entry.key, META_SUFFIX, str(error)) from error
    return label
