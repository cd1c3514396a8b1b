"""The index of a shard: offsets of all payloads, stored in a file beside the tar."""

from __future__ import annotations

import io
import json
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from shards.errors import IndexFileError
from shards.files import NPY_HEADERS, atomic_write

FORMAT = "dinogen-index"
# Version 2 can hold what version 1 cannot: members that are converted on reading, labels that some
# samples lack because of a fault, very long keys. An index without these is written as version 1.
VERSION = 1
_VERSIONS = (1, 2)
# The label of a sample whose metadata are faulty.
NO_LABEL = int(np.iinfo(np.int64).min)
# Keys padded to the longest one may take this many times their bytes before they are stored
# without padding.
_MAX_PADDING = 8
_SMALL = 1 << 20
# What numpy and zipfile raise for a damaged file.
_ERRORS = (
    ValueError, KeyError, TypeError, AttributeError, OSError, EOFError, SyntaxError, MemoryError,
    OverflowError, RecursionError, NotImplementedError, tokenize.TokenError, struct.error,
    zlib.error, zipfile.BadZipFile,
)  # fmt: skip


@dataclass(frozen=True)
class Column:
    """One kind of member; dtype and shape are those of all its arrays, None if it is no array."""

    suffix: str
    dtype: str | None = None
    shape: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Indirect:
    """A member that is not stored in the tar in the form that is needed: converted on each read.

    Attributes:
        extents: (first byte in the tar, bytes, position in the payload) of each stored part; the
            bytes between them are zero.
        dtype: of the stored array; None if it is no array.
        shape: of the array.
        fortran: whether it is stored in Fortran order.
    """

    extents: tuple[tuple[int, int, int], ...]
    dtype: str | None = None
    shape: tuple[int, ...] | None = None
    fortran: bool = False


@dataclass(frozen=True)
class Fault:
    """Why a member of a sample cannot be used; of JSON and `.cls`, why there is no label."""

    row: int
    suffix: str
    what: str


@dataclass(frozen=True)
class ShardIndex:
    """Where every payload of one tar is. n samples, m columns.

    Attributes:
        num_bytes: size of the tar that this index fits.
        columns: the kinds of members.
        keys: (n,) UTF-8 bytes, in the tar's order; objects where padding would take too much.
        offsets: (n, m) int64, first byte of the payload (after the header of a .npy), or -1 for
            a member that a sample does not have or that cannot be used, or -2 - k for number k of
            `indirect`.
        sizes: (n, m) int64, bytes of the payload as it is stored.
        sums: (n, m) uint64, sum64 of the payload; None if the tar was never read whole.
        labels: (n,) int64, `NO_LABEL` where the metadata are faulty; None unless all other
            samples have one.
        indirect: members that are converted on reading.
        faults: members that cannot be used.
        pixels: (n, 2) int32, width and height of the images by their headers, 0 if unknown; None
            if unknown, as in what dinogen packs itself, where all have the same size.
    """

    num_bytes: int
    columns: tuple[Column, ...]
    keys: npt.NDArray[Any]
    offsets: npt.NDArray[np.int64]
    sizes: npt.NDArray[np.int64]
    sums: npt.NDArray[np.uint64] | None
    labels: npt.NDArray[np.int64] | None
    indirect: tuple[Indirect, ...] = ()
    faults: tuple[Fault, ...] = ()
    pixels: npt.NDArray[np.int32] | None = None

    def __len__(self) -> int:
        return len(self.keys)

    def key(self, row: int) -> str:
        """Key of a sample."""
        return bytes(self.keys[row]).decode("utf-8", "surrogateescape")

    def fault(self, row: int, suffix: str) -> str | None:
        """What is wrong with a member, if its bytes were found and cannot be used."""
        return next((f.what for f in self.faults if (f.row, f.suffix) == (row, suffix)), None)

    def column(self, suffix: str) -> int | None:
        """Number of the column with this suffix, or None."""
        return next((i for i, c in enumerate(self.columns) if c.suffix == suffix), None)

    def same_layout(self, other: ShardIndex) -> bool:
        """Whether both have the same samples at the same places."""
        return (
            (self.num_bytes, self.columns, self.indirect)
            == (other.num_bytes, other.columns, other.indirect)
            and self.keys.tolist() == other.keys.tolist()
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
    padded = index.keys.dtype.kind == "S"
    flawed = index.labels is not None and bool((index.labels == NO_LABEL).any())
    header: dict[str, Any] = {
        "format": FORMAT,
        "version": 2 if index.indirect or flawed or not padded else VERSION,
        "num_bytes": index.num_bytes,
        "columns": [asdict(column) for column in index.columns],
    }
    if index.indirect:
        header["indirect"] = [asdict(member) for member in index.indirect]
    if index.faults:
        header["faults"] = [[fault.row, fault.suffix, fault.what] for fault in index.faults]
    arrays: dict[str, npt.NDArray[Any]] = {
        "header": np.frombuffer(json.dumps(header, sort_keys=True).encode(), np.uint8),
    }
    if padded:
        arrays["keys"] = index.keys
    else:
        keys = index.keys.tolist()
        arrays["key_bytes"] = np.frombuffer(b"".join(keys), np.uint8)
        arrays["key_ends"] = np.cumsum([len(key) for key in keys], dtype=np.int64)
    arrays |= {
        "offsets": index.offsets,
        "sizes": index.sizes,
    }
    if index.sums is not None:
        arrays["sums"] = index.sums
    if index.labels is not None:
        arrays["labels"] = index.labels
    if index.pixels is not None:
        arrays["pixels"] = index.pixels
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
            if header["format"] != FORMAT or header["version"] not in _VERSIONS:
                raise ValueError(f"format {header['format']} version {header['version']}")
            columns = tuple(
                Column(c["suffix"], c["dtype"], None if c["shape"] is None else tuple(c["shape"]))
                for c in header["columns"]
            )
            index = ShardIndex(
                num_bytes=int(header["num_bytes"]),
                columns=columns,
                keys=file["keys"] if "keys" in file else _joined(file),
                offsets=file["offsets"],
                sizes=file["sizes"],
                sums=file.get("sums"),
                labels=file.get("labels"),
                indirect=tuple(map(_indirect, header.get("indirect", ()))),
                faults=tuple(Fault(int(r), str(s), str(w)) for r, s, w in header.get("faults", ())),
                pixels=file.get("pixels"),
            )
        _check(index)
    except FileNotFoundError:
        raise
    except _ERRORS as error:
        raise IndexFileError(
            f"{path}: not a usable index ({error}); delete it, it is rebuilt from the tar"
        ) from error
    return index


def _check(index: ShardIndex) -> None:
    """Raise ValueError if an index contradicts itself."""
    n, m = len(index.keys), len(index.columns)
    tables = [index.offsets, index.sizes] + ([] if index.sums is None else [index.sums])
    if any(t.shape != (n, m) for t in tables) or index.keys.dtype.kind not in "SO":
        raise ValueError("the shapes of its arrays do not fit each other")
    if index.labels is not None and index.labels.shape != (n,):
        raise ValueError("the labels do not fit the keys")
    if index.pixels is not None and index.pixels.shape != (n, 2):
        raise ValueError("the sizes of its images do not fit the keys")
    ends = np.where(index.offsets >= 0, index.offsets + index.sizes, 0)
    stored = [at + size for member in index.indirect for at, size, _ in member.extents]
    if n == 0 or bool((ends > index.num_bytes).any()) or max(stored, default=0) > index.num_bytes:
        raise ValueError("it points past the end of its tar")
    if n and bool((index.offsets < -1 - len(index.indirect)).any()):
        raise ValueError("it lacks members that it points to")


def _indirect(member: dict[str, Any]) -> Indirect:
    return Indirect(
        extents=tuple((int(at), int(size), int(to)) for at, size, to in member["extents"]),
        dtype=member["dtype"],
        shape=None if member["shape"] is None else tuple(member["shape"]),
        fortran=bool(member["fortran"]),
    )


def as_keys(keys: list[bytes]) -> npt.NDArray[Any]:
    """Keys as an array of an index: padded, unless one long key would make it huge."""
    longest, total = max(map(len, keys)), sum(map(len, keys))
    too_wide = longest * len(keys) > max(_SMALL, _MAX_PADDING * total)
    # numpy treats zeros at the end of a string as padding.
    if too_wide or any(key.endswith(b"\0") for key in keys):
        found = np.empty(len(keys), object)
        found[:] = keys
        return found
    return np.array(keys)


def _joined(file: Mapping[str, npt.NDArray[Any]]) -> npt.NDArray[Any]:
    """Keys of an index that stores them without padding."""
    text, ends = file["key_bytes"].tobytes(), file["key_ends"].tolist()
    found = np.empty(len(ends), object)
    found[:] = [text[start:end] for start, end in pairwise([0, *ends])]
    return found
