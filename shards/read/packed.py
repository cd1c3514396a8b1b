"""One packed dataset in a folder or behind a URL: its statistics, and samples by number."""

from __future__ import annotations

import os
from fractions import Fraction
from pathlib import Path

import numpy as np
import numpy.typing as npt

from shards.check.adopt import describe_plain
from shards.errors import ManifestError, show_name
from shards.files import sha256_file
from shards.format.index import ShardIndex
from shards.format.manifest import MANIFEST, PACKING, Manifest, parse_manifest
from shards.format.sample import LABEL_SUFFIXES, Sample, level_name
from shards.format.scan import image_sizes
from shards.format.table import FILES_OPEN, OpenFile, SampleTable, Source
from shards.read.dataset import Dataset
from shards.read.reader import read_sample


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
        """Mean of a level's features over train, float32 (grid * grid, C).

        Raises:
            ManifestError: if the dataset lacks the level, or has no sound statistics.
        """
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
