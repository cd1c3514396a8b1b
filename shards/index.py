"""The offset index of a shard: made by walking over the tar, kept beside it, checked on loading."""

from __future__ import annotations

import io
import json
import os
import zipfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from shards.errors import CorruptSample, IndexFileError
from shards.files import atomic_write, sum64
from shards.manifest import LevelInfo as LevelInfo
from shards.manifest import Manifest as Manifest
from shards.manifest import ShardInfo as ShardInfo
from shards.sample import META_SUFFIX, decode_meta, level_of_suffix, npy_header
from shards.tar import Member, TarError, walk

FORMAT = "dinogen-index"
VERSION = 1


@dataclass(frozen=True)
class Column:
    """One kind of member; dtype and shape are those of all its arrays, None if it is no array."""

    suffix: str
    dtype: str | None = None
    shape: tuple[int, ...] | None = None


@dataclass(frozen=True)
class ShardIndex:
    """Where every payload of one tar lies. n samples, m columns.

    Attributes:
        num_bytes: size of the tar that this index fits.
        columns: the kinds of members.
        keys: (n,) UTF-8 bytes, in the tar's order.
        offsets: (n, m) int64, first byte of the payload (behind the header of a .npy), or -1 for
            a member that a sample does not have.
        sizes: (n, m) int64, bytes of the payload.
        sums: (n, m) uint64, sum64 of the payload; None if the tar was never read whole.
        labels: (n,) int64; None unless all samples have one.
    """

    num_bytes: int
    columns: tuple[Column, ...]
    keys: npt.NDArray[np.bytes_]
    offsets: npt.NDArray[np.int64]
    sizes: npt.NDArray[np.int64]
    sums: npt.NDArray[np.uint64] | None
    labels: npt.NDArray[np.int64] | None

    def __len__(self) -> int:
        return len(self.keys)

    def key(self, row: int) -> str:
        """Key of a sample."""
        return bytes(self.keys[row]).decode("utf-8", "surrogateescape")

    def column(self, suffix: str) -> int | None:
        """Number of the column with this suffix, or None."""
        return next((i for i, c in enumerate(self.columns) if c.suffix == suffix), None)

    def same_as(self, other: ShardIndex) -> bool:
        """Whether both describe the same tar (sums are compared only where both have them)."""
        if (self.num_bytes, self.columns) != (other.num_bytes, other.columns):
            return False
        pairs: list[tuple[Any, Any]] = [
            (self.keys, other.keys),
            (self.offsets, other.offsets),
            (self.sizes, other.sizes),
            (self.labels, other.labels),
        ]
        if self.sums is not None and other.sums is not None:
            pairs.append((self.sums, other.sums))
        return all(
            a is b is None or (a is not None and b is not None and np.array_equal(a, b))
            for a, b in pairs
        )


def index_name(shard: str) -> str:
    """File name of the index of a shard."""
    return shard.removesuffix(".tar") + ".index.npz"


@dataclass(frozen=True)
class Entry:
    """One sample found in a tar: its members by suffix."""

    key: str
    members: dict[str, Member]


def entries(descriptor: int, shard: str) -> Iterator[Entry]:
    """Samples of a tar, as WebDataset groups them: neighbours with the same key.

    Raises:
        TarError: where the tar is damaged, after the last sample that is whole.
        CorruptSample: if a sample has one member twice.
    """
    key: str | None = None
    members: dict[str, Member] = {}
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
    if key is not None:
        yield Entry(key, members)


def payload_start(member: Member, suffix: str, shard: str, key: str) -> tuple[int, Column]:
    """Bytes before the payload of a member, and the column it belongs to.

    Raises:
        CorruptSample: if a level's .npy header is damaged or does not fit its size.
    """
    if level_of_suffix(suffix) is None:
        return 0, Column(suffix)
    try:
        shape, dtype, header = npy_header(member.head, member.name)
    except ValueError as error:
        raise CorruptSample(shard, key, suffix, str(error)) from error
    if dtype.str not in ("<f2", "<f4") or len(shape) != 2:
        raise CorruptSample(
            shard, key, suffix, f"is {dtype} {shape}; needed is float16 or float32 (places, C)"
        )
    if header + int(np.prod(shape)) * dtype.itemsize != member.size:
        raise CorruptSample(shard, key, suffix, f"{member.size} bytes do not fit {shape} {dtype}")
    return header, Column(suffix, dtype.str, shape)


def scan(path: Path, with_sums: bool) -> ShardIndex:
    """Index of a tar, from its headers alone or (with_sums) from all its bytes.

    Raises:
        IndexFileError: if the tar is damaged or empty.
        CorruptSample: if a sample's members contradict the others'.
    """
    columns: dict[str, Column] = {}
    keys: list[bytes] = []
    rows: list[dict[str, tuple[int, int, int]]] = []
    labels: list[int | None] = []
    descriptor = os.open(path, os.O_RDONLY)
    try:
        num_bytes = os.fstat(descriptor).st_size
        for entry in entries(descriptor, path.name):
            row = {}
            for suffix, member in entry.members.items():
                header, column = payload_start(member, suffix, path.name, entry.key)
                known = columns.setdefault(suffix, column)
                if known != column:
                    what = f"is {column.dtype} {column.shape}, others {known.dtype} {known.shape}"
                    raise CorruptSample(path.name, entry.key, suffix, what)
                offset, size = member.offset + header, member.size - header
                total = sum64(os.pread(descriptor, size, offset)) if with_sums else 0
                row[suffix] = (offset, size, total)
            keys.append(entry.key.encode("utf-8", "surrogateescape"))
            rows.append(row)
            labels.append(_label(descriptor, entry, path.name))
    except TarError as error:
        raise IndexFileError(
            f"{path}: {error}; run `dinogen shards repair` to keep the samples before it"
        ) from error
    finally:
        os.close(descriptor)
    if not keys:
        raise IndexFileError(f"{path}: holds no sample; delete the file")
    if len(set(keys)) != len(keys):
        raise IndexFileError(f"{path}: a key occurs twice; pack the data anew with unique keys")
    table = np.full((len(rows), len(columns), 3), -1, dtype=object)
    for i, row in enumerate(rows):
        for j, suffix in enumerate(columns):
            table[i, j] = row.get(suffix, (-1, 0, 0))
    return ShardIndex(
        num_bytes=num_bytes,
        columns=tuple(columns.values()),
        keys=np.array(keys),
        offsets=table[:, :, 0].astype(np.int64),
        sizes=table[:, :, 1].astype(np.int64),
        sums=table[:, :, 2].astype(np.uint64) if with_sums else None,
        labels=None if None in labels else np.array(labels, np.int64),
    )


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


def save(index: ShardIndex, path: Path) -> None:
    """Write an index whole or not at all; the same index gives the same bytes."""
    header = {
        "format": FORMAT,
        "version": VERSION,
        "num_bytes": index.num_bytes,
        "columns": [asdict(column) for column in index.columns],
    }
    arrays: dict[str, npt.NDArray[Any]] = {
        "header": np.frombuffer(json.dumps(header, sort_keys=True).encode(), np.uint8),
        "keys": index.keys,
        "offsets": index.offsets,
        "sizes": index.sizes,
    }
    if index.sums is not None:
        arrays["sums"] = index.sums
    if index.labels is not None:
        arrays["labels"] = index.labels
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **arrays)
    with atomic_write(path) as file:
        file.write(buffer.getvalue())


def load(path: Path) -> ShardIndex:
    """Read an index.

    Raises:
        IndexFileError: if it is no index of this format and version, or contradicts itself.
        FileNotFoundError: if there is none.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            header = json.loads(file["header"].tobytes())
            if (header["format"], header["version"]) != (FORMAT, VERSION):
                raise ValueError(f"format {header['format']} version {header['version']}")
            columns = tuple(
                Column(c["suffix"], c["dtype"], None if c["shape"] is None else tuple(c["shape"]))
                for c in header["columns"]
            )
            index = ShardIndex(
                num_bytes=int(header["num_bytes"]),
                columns=columns,
                keys=file["keys"],
                offsets=file["offsets"],
                sizes=file["sizes"],
                sums=file.get("sums"),
                labels=file.get("labels"),
            )
        n, m = len(index.keys), len(columns)
        tables = [index.offsets, index.sizes] + ([] if index.sums is None else [index.sums])
        if any(t.shape != (n, m) for t in tables) or index.keys.dtype.kind != "S":
            raise ValueError("the shapes of its arrays do not fit each other")
        if index.labels is not None and index.labels.shape != (n,):
            raise ValueError("the labels do not fit the keys")
        if n == 0 or bool((index.offsets + index.sizes > index.num_bytes).any()):
            raise ValueError("it points behind the end of its tar")
    except FileNotFoundError:
        raise
    except (ValueError, KeyError, TypeError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise IndexFileError(
            f"{path}: not a usable index ({error}); delete it, it is made anew from the tar"
        ) from error
    return index
