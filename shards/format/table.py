"""The samples of one split as flat arrays: which file, which bytes, whether checked already."""

from __future__ import annotations

import logging
import os
import threading
import weakref
from collections.abc import Mapping, Set
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from shards.errors import CorruptSample, FetchError, IndexFileError, ShardsError
from shards.files import sha256_file
from shards.format import index as index_files
from shards.format.index import ShardIndex
from shards.format.manifest import LevelInfo, ShardInfo
from shards.format.sample import LABEL_SUFFIXES
from shards.format.scan import survey

log = logging.getLogger(__name__)
# Each rank walks its own lanes, 64 at most by default, each within a few shards.
FILES_OPEN = 256


class Source(Protocol):
    """Where the files of a dataset are: a folder, or a cache that is filled on demand.

    Attributes:
        num_open: how many tars a reader may keep open.
    """

    num_open: int

    def path(self, name: str) -> Path:
        """Local path of an index or the statistics; FileNotFoundError if the dataset lacks it."""
        ...

    def open(self, name: str) -> OpenFile:
        """A tar, which is there as long as the result is held; errors as `path`."""
        ...


class OpenFile:
    """A file opened for random access; closed when its last user releases it.

    Attributes:
        path: where it was found.
        descriptor: for `os.pread`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.descriptor = os.open(path, os.O_RDONLY)
        # Not in __del__: while it runs, a weak reference can still hand out the object.
        weakref.finalize(self, self._let_go, self.descriptor).atexit = False
        # Readahead around scattered reads fetches up to 20 times the bytes needed.
        os.posix_fadvise(self.descriptor, 0, 0, os.POSIX_FADV_RANDOM)

    @staticmethod
    def _let_go(descriptor: int) -> None:
        os.close(descriptor)


class ColumnTable:
    """One kind of member of the samples of the shards that were loaded; see `SampleTable.rows`.

    It grows with what is loaded: a rank of many reads a small part of a large dataset.

    Attributes:
        offsets: as in an index.
        sizes: as in an index.
        sums: as in an index, 0 where it has none.
        unchecked: whether the payload has a sum that it was not compared with yet.
        loaded: the shards whose samples it holds; all other rows are undefined.
    """

    def __init__(self, num_rows: int) -> None:
        self.loaded: set[int] = set()
        self.offsets = np.zeros(num_rows, np.int64)
        self.sizes = np.zeros(num_rows, np.int64)
        self.sums = np.zeros(num_rows, np.uint64)
        self.unchecked = np.zeros(num_rows, np.bool_)

    def grow(self, num_rows: int) -> None:
        """Make space; readers that hold the arrays from before have all that these held."""
        more = (0, num_rows - len(self.offsets))
        self.offsets = np.pad(self.offsets, more)
        self.sizes = np.pad(self.sizes, more)
        self.sums = np.pad(self.sums, more)
        self.unchecked = np.pad(self.unchecked, more)

    def fill(self, suffix: str, rows: slice, index: ShardIndex) -> None:
        """Take over what the index of a shard says."""
        number = index.column(suffix)
        if number is None:
            self.offsets[rows] = -1
            return
        self.offsets[rows] = index.offsets[:, number]
        self.sizes[rows] = index.sizes[:, number]
        if index.sums is not None:
            self.sums[rows] = index.sums[:, number]
            # What is converted on reading is checked each time.
            self.unchecked[rows] = index.offsets[:, number] >= 0


class SampleTable:
    """Samples of one split, numbered in packed order. Safe to use from several threads."""

    def __init__(
        self,
        source: Source,
        shards: tuple[ShardInfo, ...],
        indexes: dict[str, ShardIndex] | None = None,
        levels: Mapping[str, LevelInfo] | None = None,
    ) -> None:
        self.shards = shards
        self._levels = levels
        self.starts = np.concatenate(([0], np.cumsum([s.num_samples for s in shards])))
        self.num_samples = int(self.starts[-1])
        self._source = source
        self._indexes = [(indexes or {}).get(shard.name) for shard in shards]
        self._broken: dict[int, ShardsError] = {}
        self._columns: dict[str, ColumnTable] = {}
        # In the order in which shards are first read, for all columns alike.
        self._first_rows = np.full(len(shards), -1)
        self._with_rows: set[int] = set()
        self._num_rows = 0
        self._longest = max(shard.num_samples for shard in shards)
        self._files: dict[int, OpenFile] = {}
        self._lock = threading.Lock()
        # One per shard: fetching one shard must not stall readers of others.
        self._loading = [threading.Lock() for _ in shards]

    def index(self, shard: int) -> ShardIndex:
        """Index of a shard, built from the tar if there is none.

        Raises:
            IndexFileError: if neither the index nor the tar can be used.
            FetchError: if they are behind a URL and cannot be fetched.
        """
        found = self._indexes[shard]
        if found is not None:
            return found
        with self._loading[shard]:
            if (found := self._indexes[shard]) is not None:
                return found
            if shard in self._broken:
                raise self._broken[shard]
            try:
                found = load_index(self._source, self.shards[shard], self._levels)
            except FetchError:
                raise
            except ShardsError as error:
                # Kept, so that skipping a thousand samples does not try a thousand times.
                self._broken[shard] = error
                raise
            self._indexes[shard] = found
            return found

    def rows(
        self, shards: Set[int], shard: npt.NDArray[np.int64], sample: npt.NDArray[np.int64]
    ) -> npt.NDArray[np.int64]:
        """Rows of samples in every column; those of shards not in `shards` are undefined."""
        if not self._with_rows >= shards:
            with self._lock:
                self._give_rows(shards)
        return self._first_rows[shard] + sample

    def _give_rows(self, shards: Set[int]) -> None:
        for shard in shards - self._with_rows:
            self._first_rows[shard] = self._num_rows
            self._num_rows += self.shards[shard].num_samples
            self._with_rows.add(shard)

    def column(self, suffix: str, shards: Set[int]) -> ColumnTable:
        """Places of a kind of member, valid for the samples of `shards`.

        Raises:
            IndexFileError: as `index`.
        """
        table = self._columns.get(suffix)
        if table is not None and table.loaded >= shards:
            return table
        indexes = {shard: self.index(shard) for shard in shards}
        with self._lock:
            if suffix not in self._columns:
                # Undefined rows lie within the longest shard.
                self._columns[suffix] = ColumnTable(self._longest)
            table = self._columns[suffix]
            self._give_rows(shards)
            if len(table.offsets) < self._num_rows:
                # Doubling copies each row few times.
                table.grow(min(2 * self._num_rows, self.num_samples))
            for shard, index in indexes.items():
                if shard not in table.loaded:
                    first = int(self._first_rows[shard])
                    table.fill(suffix, slice(first, first + len(index)), index)
                    table.loaded.add(shard)
            return table

    def key(self, shard: int, sample: int) -> str:
        """Key of a sample, or `sample N` if the shard's index is not available."""
        try:
            return self.index(shard).key(sample)
        except ShardsError:
            return f"sample {sample}"

    def keys(self, rows: list[tuple[int, int]]) -> list[str]:
        """Keys of samples given as (shard, sample)."""
        key_at = {shard: self.index(shard).keys.item for shard in {shard for shard, _ in rows}}
        return [key_at[shard](row).decode("utf-8", "surrogateescape") for shard, row in rows]

    def labels(self, rows: list[tuple[int, int]]) -> npt.NDArray[np.int64]:
        """Labels of samples given as (shard, sample); `NO_LABEL` where the metadata are at fault.

        Raises:
            IndexFileError: if a shard's index has none, although the manifest says that it has.
        """
        found = np.empty(len(rows), np.int64)
        for i, (shard, sample) in enumerate(rows):
            labels = self.index(shard).labels
            if labels is None:
                raise IndexFileError(
                    f"{self.shards[shard].name}: its index has no labels, although manifest.json "
                    f"says it has; run `dinogen shards repair`"
                )
            found[i] = labels[sample]
        return found

    def all_labels(self) -> npt.NDArray[np.int64]:
        """Labels of all samples in packed order; this reads the index of every shard.

        Raises:
            IndexFileError: as :meth:`labels`.
        """
        for shard in range(len(self.shards)):
            self.labels([(shard, 0)])  # whether there are any
        found = [self.index(shard).labels for shard in range(len(self.shards))]
        return np.concatenate([labels for labels in found if labels is not None])

    def no_label(self, shard: int, sample: int) -> CorruptSample:
        """Why the label of a sample is not known."""
        index = self.index(shard)
        faults = [f for f in index.faults if f.row == sample and f.suffix in LABEL_SUFFIXES]
        suffix, what = (faults[0].suffix, faults[0].what) if faults else ("", "has no label")
        return CorruptSample(self.shards[shard].name, index.key(sample), suffix, what)

    def file(self, shard: int) -> OpenFile:
        """The open tar of a shard.

        Raises:
            OSError: if it cannot be opened.
            FetchError: if it is behind a URL and cannot be fetched.
        """
        found = self._files.get(shard)
        if found is not None:
            return found
        # Outside the lock: it may take as long as fetching a whole shard.
        opened = self._source.open(self.shards[shard].name)
        with self._lock:
            if shard not in self._files:
                while len(self._files) >= self._source.num_open:
                    del self._files[next(iter(self._files))]
                self._files[shard] = opened
            return self._files[shard]


def load_index(
    source: Source, shard: ShardInfo, levels: Mapping[str, LevelInfo] | None = None
) -> ShardIndex:
    """Index of a shard, rebuilt with these levels if it is missing or does not fit.

    Raises:
        IndexFileError: if it cannot be used, and the tar is missing or does not fit the manifest.
        FetchError: if they are behind a URL and cannot be fetched.
    """
    name = index_files.index_name(shard.name)
    try:
        index = index_files.load(source.path(name))
        if (len(index), index.num_bytes) == (shard.num_samples, shard.num_bytes):
            return index
        log.warning("%s does not fit %s; rebuilding it", name, shard.name)
    except FileNotFoundError:
        log.warning("%s is missing; rebuilding it", name)
    except IndexFileError as error:
        log.warning("%s", error)
    try:
        file = source.open(shard.name)
    except FileNotFoundError as error:
        raise IndexFileError(
            f"{shard.name} and its index are missing; restore them, or run `dinogen shards repair` "
            f"to drop them from the dataset"
        ) from error
    if sha256_file(file.path) != shard.sha256:
        raise IndexFileError(
            f"{shard.name} differs from what manifest.json says and has no usable index; "
            f"run `dinogen shards verify`, then restore it or run `dinogen shards repair`"
        )
    index = build_index(file.path, with_sums=True, pixels=False, levels=levels)
    if len(index) != shard.num_samples:
        raise IndexFileError(
            f"{shard.name} holds {len(index)} samples, but manifest.json says {shard.num_samples}; "
            f"run `dinogen shards repair`"
        )
    return index


def load_plain_index(tar: Path) -> ShardIndex:
    """Index of a tar that no manifest describes, built from its headers on first use.

    Raises:
        IndexFileError: if the tar is damaged.
    """
    path = tar.with_name(index_files.index_name(tar.name))
    try:
        index = index_files.load(path)
        status = tar.stat()
        # Nothing else shows that a plain tar was rewritten since.
        if index.num_bytes == status.st_size and path.stat().st_mtime_ns >= status.st_mtime_ns:
            return index
        log.warning("%s does not fit %s; rebuilding it", path.name, tar.name)
    except FileNotFoundError:
        log.info("%s has no index yet; building it", tar.name)
    except IndexFileError as error:
        log.warning("%s", error)
    return build_index(tar, with_sums=False)


def build_index(
    tar: Path,
    with_sums: bool,
    pixels: bool = True,
    levels: Mapping[str, LevelInfo] | None = None,
) -> ShardIndex:
    """Scan a tar and write its index beside it; in a read-only folder it stays in memory.

    Args:
        tar: its path.
        with_sums: read all of it, and check every number.
        pixels: record the sizes of the images, which no manifest holds.
        levels: what the arrays must be; if None, what they are in most samples.

    Raises:
        IndexFileError: if the tar is damaged, holds no sample, or is no tar.
    """
    found = survey(tar, with_sums, levels, pixels=pixels, finite=with_sums)
    if found.problems or found.index is None:
        raise IndexFileError(f"{tar}: {found.problems[0]}")
    for line in found.notes():
        log.warning("%s: %s", tar.name, line)
    path = tar.with_name(index_files.index_name(tar.name))
    try:
        index_files.save(found.index, path)
    except OSError as error:
        log.warning("%s cannot be written (%s); it is kept in memory", path, error)
    return found.index
