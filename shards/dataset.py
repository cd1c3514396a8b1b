"""A dataset on disk: its manifest, its statistics, its samples by number, its streams."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import numpy.typing as npt

from shards.errors import ManifestError
from shards.files import sha256_file
from shards.index import ShardIndex
from shards.manifest import MANIFEST, PACKING, LevelInfo, Manifest, parse_manifest
from shards.plain import describe_plain
from shards.reader import LevelShape, read_sample
from shards.sample import Sample, level_grid, level_name
from shards.table import FILES_OPEN, OpenFile, SampleTable, Source

if TYPE_CHECKING:
    from shards.stream import Batch, Stream


class Folder:
    """Files of a dataset in a local folder."""

    num_open = FILES_OPEN

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, name: str) -> Path:
        """Path of a file; FileNotFoundError if there is none."""
        path = self.folder / name
        if not path.is_file():
            raise FileNotFoundError(path)
        return path

    def open(self, name: str) -> OpenFile:
        """An open tar; FileNotFoundError if there is none."""
        return OpenFile(self.folder / name)


def open_dataset(
    location: str | os.PathLike[str],
    cache_dir: Path | str | None = None,
    cache_gb: float | None = None,
) -> Dataset:
    """Open a packed dataset, or a folder of plain WebDataset tars.

    Args:
        location: local folder, or the URL of one on any file system that fsspec knows.
        cache_dir: where the shards of a URL are kept; ~/.cache/dinogen/shards unless given.
        cache_gb: most that this folder holds, in 10^9 bytes; what was not used for longest goes.

    Raises:
        FetchError: if a URL cannot be reached.
        ManifestError: if there is no dataset, or its manifest cannot be used.
        IndexFileError: if a plain tar is damaged.
    """
    text = os.fspath(location)
    if "://" in text:
        from shards.remote import open_remote

        cache = None if cache_dir is None else Path(cache_dir)
        return Dataset(text, *open_remote(text, cache, cache_gb))
    folder = Path(text)
    if not folder.is_dir():
        raise ManifestError(f"{folder} is not a folder; give the folder with manifest.json")
    if (folder / MANIFEST).is_file():
        path = folder / MANIFEST
        return Dataset(text, Folder(folder), parse_manifest(path.read_bytes(), str(path)))
    if (folder / PACKING).exists():
        raise ManifestError(f"{folder}: packing was not finished; run the same command again")
    manifest, indexes = describe_plain(folder)
    return Dataset(text, Folder(folder), manifest, indexes)


class Dataset:
    """An opened dataset; `open_dataset` makes one.

    Attributes:
        location: folder or URL.
        manifest: what `manifest.json` says.
        source: finds the files.
    """

    def __init__(
        self,
        location: str,
        source: Source,
        manifest: Manifest,
        indexes: dict[str, ShardIndex] | None = None,
    ) -> None:
        self.location = location
        self.source = source
        self.manifest = manifest
        self._indexes = indexes
        self._tables: dict[str, SampleTable] = {}
        self._statistics: dict[str, npt.NDArray[np.float32]] | None = None

    def table(self, split: str) -> SampleTable:
        """Index of all samples of a split.

        Raises:
            ManifestError: if the dataset has no such split.
        """
        if split not in self._tables:
            shards = self.manifest.of_split(split)
            self._tables[split] = SampleTable(self.source, shards, self._indexes)
        return self._tables[split]

    def num_samples(self, split: str = "train") -> int:
        """Samples in a split; 0 if the dataset has no such split."""
        info = self.manifest.splits.get(split)
        return info.num_samples if info else 0

    def keys(self, split: str = "train") -> list[str]:
        """Keys of a split in packed order."""
        table = self.table(split)
        indexes = (table.index(shard) for shard in range(len(table.shards)))
        return [index.key(row) for index in indexes for row in range(len(index))]

    def sample(self, number: int, split: str = "train") -> Sample:
        """One whole sample by its number in packed order, every member checked.

        Raises:
            CorruptSample: if it cannot be read.
            IndexError: if the split has no such sample.
        """
        table = self.table(split)
        if not 0 <= number < table.num_samples:
            raise IndexError(f"{split} has samples 0 to {table.num_samples - 1}, not {number}")
        shard = int(np.searchsorted(table.starts, number, side="right")) - 1
        row = number - int(table.starts[shard])
        index = table.index(shard)
        # Held until it is read: another thread may drop it from the table meanwhile.
        file = table.file(shard)
        return read_sample(index, row, table.shards[shard].name, file.descriptor)

    def level_variance(self, level: int | str) -> npt.NDArray[np.float32]:
        """Population variance of a level's features over train, float32 (grid * grid, C).

        Raises:
            ManifestError: if the dataset lacks the level, or has no sound statistics.
        """
        self.level_info(level)
        if self._statistics is None:
            self._statistics = self._load_statistics()
        return self._statistics[f"{level_name(level)}.var"]

    def total_variance(self, level: int | str) -> float:
        """Mean over places and channels of the variance: the loss of the best constant answer.

        Raises:
            ManifestError: if the dataset has no statistics.
        """
        value = self.level_info(level).total_variance
        if value is None:
            raise self._no_statistics()
        return value

    def level_info(self, level: int | str) -> LevelInfo:
        """What the manifest says about a level.

        Raises:
            ManifestError: if the dataset lacks the level.
        """
        name = level_name(level)
        if name not in self.manifest.levels:
            have = ", ".join(self.manifest.levels) or "none"
            raise ManifestError(f"{self.location}: has no level {name}; its levels are: {have}")
        return self.manifest.levels[name]

    def level_shapes(self, levels: Sequence[int | str]) -> dict[str, LevelShape]:
        """Shapes of the payloads of some levels, by name.

        Raises:
            ManifestError: if the dataset lacks one.
            ValueError: if two of them have the same grid.
        """
        shapes = {}
        for name in map(level_name, levels):
            info = self.level_info(name)
            shapes[name] = LevelShape(info.grid**2, info.channels, np.dtype(info.dtype))
        grids = [level_grid(name) for name in shapes]
        if len(set(grids)) != len(grids):
            raise ValueError(f"a batch holds one level per grid; asked for {', '.join(shapes)}")
        return shapes

    def read(
        self,
        numbers: Iterable[int],
        *,
        split: str = "train",
        image_size: int | None = None,
        levels: Sequence[int | str] = (),
        on_error: Literal["stop", "skip"] = "stop",
    ) -> Batch:
        """One batch of samples by their numbers in packed order; `position` holds the numbers.

        Args:
            numbers: of the samples.
            split: "train", "val" or "test".
            image_size: side of the images, as in `stream`.
            levels: as in `stream`.
            on_error: "stop" raises on a damaged sample; "skip" gives the next sound one in packed
                order (behind the last comes the first) in its place, and names it in the log.

        Raises:
            CorruptSample: if one cannot be read, or none of the split can.
            IndexError: if the split has no such sample.
        """
        from shards.stream import read_batch

        return read_batch(self, list(numbers), split, image_size, levels, on_error)

    def stream(
        self,
        batch_size: int,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        start: int = 0,
        image_size: int | None = None,
        levels: Sequence[int | str] = (),
        split: str = "train",
        num_threads: int = 2,
        num_lanes: int = 64,
        window_shards: int = 4,
        on_error: Literal["stop", "skip"] = "stop",
        pin_memory: bool = False,
    ) -> Stream:
        """Endless batches of a split in an order that depends on seed and position alone.

        Args:
            batch_size: size of the global batch; each rank gets its share of it.
            seed: of the order.
            rank: of this process, 0 to world_size - 1.
            world_size: number of processes that share each batch.
            start: global position of the first sample: number of samples shown before.
            image_size: side of the images, shrunk by area from the stored size; None for none.
            levels: "p4", "n8" ...; a number means the pooled level.
            split: "train", "val" or "test".
            num_threads: threads that read ahead; 0 reads in the caller's thread, which is fastest
                for small levels alone.
            num_lanes: runs of the epoch that are read side by side.
            window_shards: how far a sample is moved within its lane, in shards.
            on_error: "stop" raises on a damaged sample; "skip" shows the next sound one of the
                order in its place, alike on every rank, and counts it.
            pin_memory: batches in pinned memory, for asynchronous copies to a GPU.

        Raises:
            ManifestError: if the dataset lacks the split, a level or labels.
            ValueError: if the arguments contradict each other.
        """
        from shards.stream import Stream

        return Stream(
            self,
            batch_size=batch_size,
            seed=seed,
            rank=rank,
            world_size=world_size,
            start=start,
            image_size=image_size,
            levels=levels,
            split=split,
            num_threads=num_threads,
            num_lanes=num_lanes,
            window_shards=window_shards,
            on_error=on_error,
            pin_memory=pin_memory,
        )

    def _load_statistics(self) -> dict[str, npt.NDArray[np.float32]]:
        from safetensors.numpy import load_file

        info = self.manifest.statistics
        if info is None:
            raise self._no_statistics()
        try:
            path = self.source.path(info.file)
        except FileNotFoundError as error:
            raise self._no_statistics() from error
        if sha256_file(path) != info.sha256:
            raise ManifestError(f"{path}: differs from the manifest; run `dinogen shards repair`")
        arrays: dict[str, npt.NDArray[np.float32]] = load_file(path)
        return arrays

    def _no_statistics(self) -> ManifestError:
        return ManifestError(
            f"{self.location}: has no statistics; run `dinogen shards repair` to compute them"
        )
