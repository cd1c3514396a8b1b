"""The offset index of a shard: what it holds, and its file beside the tar."""

from __future__ import annotations

import io
import json
import zipfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from shards.errors import IndexFileError
from shards.files import NPY_HEADERS, atomic_write

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

    def same_layout(self, other: ShardIndex) -> bool:
        """Whether both have the same samples at the same places."""
        return (
            (self.num_bytes, self.columns) == (other.num_bytes, other.columns)
            and np.array_equal(self.keys, other.keys)
            and np.array_equal(self.offsets, other.offsets)
            and np.array_equal(self.sizes, other.sizes)
        )

    def same_as(self, other: ShardIndex) -> bool:
        """Whether both describe the same tar; sums are compared only where both have them."""
        both_summed = self.sums is not None and other.sums is not None
        return (
            self.same_layout(other)
            and np.array_equal(_or_empty(self.labels), _or_empty(other.labels))
            and (not both_summed or np.array_equal(_or_empty(self.sums), _or_empty(other.sums)))
        )


def _or_empty(values: npt.NDArray[Any] | None) -> npt.NDArray[Any]:
    return np.empty(0) if values is None else values


def index_name(shard: str) -> str:
    """File name of the index of a shard."""
    return shard.removesuffix(".tar") + ".index.npz"


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
        with NPY_HEADERS, np.load(path, allow_pickle=False) as file:
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
