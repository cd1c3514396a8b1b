"""What can be trained on: one packed dataset, or several mixed by weight; samples and streams."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from shards.check.adopt import describe_plain
from shards.errors import ManifestError, show_name
from shards.files import sha256_file
from shards.format.index import NO_LABEL, ShardIndex
from shards.format.manifest import MANIFEST, PACKING, LevelInfo, Manifest, parse_manifest
from shards.format.sample import (
    LABEL_SUFFIXES,
    VECTORS,
    Sample,
    level_grid,
    level_guide,
    level_name,
)
from shards.format.scan import image_sizes
from shards.format.table import FILES_OPEN, OpenFile, SampleTable, Source
from shards.read.batch import Batch, PackedSource, read_batch
from shards.read.reader import ImageDtype, LevelShape, read_sample
from shards.read.stream import Stream


class Dataset(ABC):
    """What can be trained on; `open_dataset` and `open_mix` make one.

    Attributes:
        location: folder or URL; for a mix, all of them and their weights.
        manifest: what `manifest.json` says; for a mix, what its datasets have in common.
    """

    def __init__(self, location: str, manifest: Manifest) -> None:
        self.location = location
        self.manifest = manifest

    @property
    @abstractmethod
    def sets(self) -> tuple[PackedSource, ...]:
        """The packed datasets that it consists of."""

    @property
    @abstractmethod
    def weights(self) -> tuple[Fraction, ...]:
        """The share of each dataset in the order; they sum to 1."""

    def num_samples(self, split: str = "train") -> int:
        """Samples in a split; 0 if the dataset has no such split."""
        info = self.manifest.splits.get(split)
        return info.num_samples if info else 0

    @abstractmethod
    def keys(self, split: str = "train") -> list[str]:
        """Keys of a split in packed order."""

    @abstractmethod
    def sample(self, number: int, split: str = "train") -> Sample:
        """One whole sample by its number in packed order, every member checked.

        Raises:
            CorruptSample: if it cannot be read.
            IndexError: if the split has no such sample.
        """

    @abstractmethod
    def level_mean(self, level: int | str) -> npt.NDArray[np.float32]:
        """Mean of a level's features over train, float32 (grid * grid, C).

        Raises:
            ManifestError: if the dataset lacks the level, or has no sound statistics.
        """

    @abstractmethod
    def level_variance(self, level: int | str) -> npt.NDArray[np.float32]:
        """Population variance of a level's features over train, float32 (grid * grid, C).

        Raises:
            ManifestError: if the dataset lacks the level, or has no sound statistics.
        """

    @abstractmethod
    def total_variance(self, level: int | str) -> float:
        """Variance averaged over locations and channels: the loss of the best constant answer.

        Raises:
            ManifestError: if the dataset lacks the level, or has no statistics.
        """

    @abstractmethod
    def unfit_images(self, size: int, split: str = "train") -> tuple[int, str]:
        """Images of a split that are known to be smaller than `size` pixels, or not square.

        Nothing is decoded: sizes come from the manifest, the indexes or the images' headers.
        Images behind a URL whose sizes are not in the indexes count as fit.

        Returns:
            How many there are, and a description of the first.
        """

    @abstractmethod
    def label_fault(self, split: str = "train") -> str:
        """Description of the first sample whose faulty metadata leave a split without labels."""

    def label_counts(self, split: str = "train") -> dict[int, int]:
        """Samples of a split by their label, from the indexes; those without one do not count.

        Raises:
            ManifestError: if a dataset has no such split.
            IndexFileError: if an index has no labels.
        """
        labels = np.concatenate([one.table(split).all_labels() for one in self.sets])
        found, counts = np.unique(labels[labels != NO_LABEL], return_counts=True)
        return dict(zip(found.tolist(), counts.tolist(), strict=True))

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
            ValueError: if two of them have the same guide and grid.
        """
        shapes = {}
        for name in map(level_name, levels):
            info = self.level_info(name)
            shapes[name] = LevelShape(info.grid**2, info.channels, np.dtype(info.dtype))
        taken = [(level_guide(n), level_grid(n)) for n in shapes if n not in VECTORS]
        if len(set(taken)) != len(taken):
            raise ValueError(
                f"a batch holds one level per grid and guide; requested: {', '.join(shapes)}"
            )
        return shapes

    def read(
        self,
        numbers: Iterable[int],
        *,
        split: str = "train",
        image_size: int | None = None,
        levels: Sequence[int | str] = (),
        on_error: Literal["stop", "skip"] = "stop",
        need_labels: bool = False,
    ) -> Batch:
        """One batch of samples by their numbers in packed order; `position` holds the numbers.

        Args:
            numbers: of the samples.
            split: "train", "val" or "test".
            image_size: side of the images, as in `stream`.
            levels: as in `stream`.
            on_error: "stop" raises on a damaged sample; "skip" replaces it by the next sound one
                in packed order (the last is followed by the first), and logs it.
            need_labels: as in `stream`.

        Raises:
            CorruptSample: if one cannot be read, or with "skip" if none of the split can.
            IndexError: if the split has no such sample.
        """
        return read_batch(self, list(numbers), split, image_size, levels, on_error, need_labels)

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
        need_labels: bool = False,
        image_dtype: ImageDtype = "float32",
        per_class: int = 0,
        first: int = 0,
    ) -> Stream:
        """Endless batches of a split in an order that depends only on seed and position.

        Args:
            batch_size: size of the global batch; each rank gets its share of it.
            seed: of the order.
            rank: of this process, 0 to world_size - 1.
            world_size: number of processes that share each batch.
            start: global position of the first sample: the number of samples already shown.
            image_size: side of the images, shrunk by area from the stored size; None for none.
            levels: "p4", "n8", "NAME.p8" of a further guide, "clip", "text"; a number means the
                pooled level. At most one per guide and grid.
            split: "train", "val" or "test".
            num_threads: threads that prefetch batches; 0 reads in the caller's thread, which is
                fastest for small levels without images.
            num_lanes: runs of the epoch that are read in parallel.
            window_shards: how far a sample is shuffled within its lane, in shards.
            on_error: "stop" raises on a damaged sample; "skip" replaces it by the next sound one
                in the order, the same on every rank, and counts it.
            pin_memory: batches in pinned memory, for asynchronous copies to a GPU.
            need_labels: a sample whose label is unknown, because its metadata are faulty, counts
                as damaged; otherwise its label in a batch is -1.
            image_dtype: "float32" for images in [-1, 1]; "uint8" for the bytes that these
                are made of. On any device float32 (x - 127.5) / 127.5 gives the same values to the
                bit, as long as it divides: many GPU kernels multiply by the reciprocal of a number.
            per_class: samples of one class in a row, of which ``batch_size`` is a multiple; the
                classes take turns. 0: samples of any class. It needs one dataset with labels.
            first: with ``per_class``, the position at which the first of these runs begins.

        Raises:
            ManifestError: if the dataset lacks the split, a level or labels.
            ValueError: if the arguments contradict each other.
        """
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
            need_labels=need_labels,
            image_dtype=image_dtype,
            per_class=per_class,
            first=first,
        )


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
) -> PackedDataset:
    """Open a packed dataset, or a folder of plain WebDataset tars.

    Args:
        location: local folder, or the URL of one on any file system that fsspec knows.
        cache_dir: where the shards of a URL are kept; ~/.cache/dinogen/shards if None.
        cache_gb: most that this folder holds, in 10^9 bytes; the least recently used are evicted.

    Raises:
        FetchError: if a URL cannot be reached.
        ManifestError: if there is no dataset, or its manifest cannot be used.
        IndexFileError: if a plain tar is damaged.
    """
    text = os.fspath(location)
    if "://" in text:
        from shards.remote.storage import open_remote

        cache = None if cache_dir is None else Path(cache_dir)
        return PackedDataset(text, *open_remote(text, cache, cache_gb))
    folder = Path(text)
    if not folder.is_dir():
        raise ManifestError(f"{folder} is not a folder; give the folder with manifest.json")
    if (folder / MANIFEST).is_file():
        path = folder / MANIFEST
        return PackedDataset(text, Folder(folder), parse_manifest(path.read_bytes(), str(path)))
    if (folder / PACKING).exists():
        raise ManifestError(f"{folder}: packing was not finished; run the same command again")
    manifest, indexes = describe_plain(folder)
    return PackedDataset(text, Folder(folder), manifest, indexes)


class PackedDataset(Dataset):
    """One packed dataset; `open_dataset` makes it.

    Attributes:
        source: finds the files.
    """

    def __init__(
        self,
        location: str,
        source: Source,
        manifest: Manifest,
        indexes: dict[str, ShardIndex] | None = None,
    ) -> None:
        super().__init__(location, manifest)
        self.source = source
        self._indexes = indexes
        self._tables: dict[str, SampleTable] = {}
        self._statistics: dict[str, npt.NDArray[np.float32]] | None = None

    @property
    def sets(self) -> tuple[PackedDataset, ...]:
        """Itself."""
        return (self,)

    @property
    def weights(self) -> tuple[Fraction, ...]:
        """The whole order."""
        return (Fraction(1),)

    def table(self, split: str) -> SampleTable:
        """Index of all samples of a split.

        Raises:
            ManifestError: if the dataset has no such split.
        """
        if split not in self._tables:
            shards = self.manifest.of_split(split, self.location)
            levels = self.manifest.levels
            self._tables[split] = SampleTable(self.source, shards, self._indexes, levels)
        return self._tables[split]

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
        # Held until it is read: another thread may drop it from the table in the meantime.
        file = table.file(shard)
        return read_sample(index, row, table.shards[shard].name, file.descriptor)

    def unfit_images(self, size: int, split: str = "train") -> tuple[int, str]:
        """As `Dataset.unfit_images`."""
        stored = self.manifest.image_size
        if stored is not None:
            fits = stored >= size
            return (0, "") if fits else (self.num_samples(split), f"all are {stored}x{stored}")
        count, first = 0, ""
        table = self.table(split)
        for number, shard in enumerate(table.shards):
            index = table.index(number)
            pixels = index.pixels
            if pixels is None:
                if "://" in self.location:
                    continue
                pixels = image_sizes(table.file(number).descriptor, index)
            width, height = pixels[:, 0], pixels[:, 1]
            rows = np.flatnonzero((width > 0) & ((width != height) | (width < size)))
            if len(rows) and not first:
                row = int(rows[0])
                first = f"{show_name(index.key(row))} of {shard.name} is {width[row]}x{height[row]}"
            count += len(rows)
        return count, first

    def label_fault(self, split: str = "train") -> str:
        """As `Dataset.label_fault`; for a URL nothing is fetched and the answer is ""."""
        if "://" in self.location:
            return ""
        table = self.table(split)
        for number, shard in enumerate(table.shards):
            for fault in table.index(number).faults:
                if fault.suffix in LABEL_SUFFIXES:
                    key = table.index(number).key(fault.row)
                    name = show_name(f"{key}.{fault.suffix}")
                    return f"{shard.name}: {name}: {fault.what}"
        return ""

    def level_mean(self, level: int | str) -> npt.NDArray[np.float32]:
        """As `Dataset.level_mean`."""
        return self._measured(level, "mean")

    def level_variance(self, level: int | str) -> npt.NDArray[np.float32]:
        """As `Dataset.level_variance`."""
        return self._measured(level, "var")

    def total_variance(self, level: int | str) -> float:
        """As `Dataset.total_variance`."""
        value = self.level_info(level).total_variance
        if value is None:
            raise self._no_statistics()
        return value

    def _measured(self, level: int | str, what: str) -> npt.NDArray[np.float32]:
        self.level_info(level)
        if self._statistics is None:
            self._statistics = self._load_statistics()
        return self._statistics[f"{level_name(level)}.{what}"]

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
