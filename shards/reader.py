"""Bytes of many samples at once: scattered reads into given buffers, checked and decoded."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from shards.errors import CorruptSample, ShardsError
from shards.files import sum64
from shards.image import decode_rgbx, scale_into, shrink
from shards.index import ShardIndex
from shards.order import Ints, Place
from shards.sample import IMAGE_SUFFIXES, Sample, decode, level_of_suffix, level_suffix
from shards.table import OpenFile, SampleTable

Arrays = dict[str, npt.NDArray[Any]]
Failures = dict[int, CorruptSample]
# (file, offset, target, item of the batch, suffix)
_Late = list[tuple[OpenFile, int, memoryview, int, str]]


@dataclass(frozen=True)
class LevelShape:
    """What a level's payload is: (places, channels) of `dtype`."""

    places: int
    channels: int
    dtype: np.dtype[Any]


class BatchReader:
    """Reads and decodes chosen members of samples of one split. Safe to use from several threads.

    Args:
        table: the split.
        levels: shape by level name.
        image_size: side of the images wanted, or None for no images.
    """

    def __init__(
        self, table: SampleTable, levels: dict[str, LevelShape], image_size: int | None
    ) -> None:
        self._table = table
        self._levels = levels
        self._image_size = image_size

    def shapes(self, count: int) -> dict[str, tuple[tuple[int, ...], np.dtype[Any]]]:
        """Shape and dtype of the arrays that a batch of `count` samples needs, by name."""
        wanted: dict[str, tuple[tuple[int, ...], np.dtype[Any]]] = {
            name: ((count, level.places, level.channels), level.dtype)
            for name, level in self._levels.items()
        }
        if (size := self._image_size) is not None:
            wanted["image"] = ((count, 3, size, size), np.dtype(np.float32))
        return wanted

    def read(self, places: Place, rows: list[int], out: Arrays) -> Failures:
        """Read sample i of `places` into row rows[i] of every array of `out`.

        Returns:
            The items of `places` that could not be read, each with the reason; the content of
            their rows is undefined.
        """
        batch = _Batch(self._table, places)
        for name in self._levels:
            batch.queue_level(level_suffix(name), out[name], rows)
        images = batch.queue_images() if self._image_size is not None else {}
        batch.finish_reads()
        for name in self._levels:
            batch.check_level(level_suffix(name), out[name], rows)
        for item, (suffix, data) in images.items():
            batch.check_image(item, suffix, data)
            if item in batch.failures:
                continue
            try:
                pixels = shrink(decode_rgbx(data, IMAGE_SUFFIXES[suffix]), out["image"].shape[-1])
                scale_into(pixels, out["image"][rows[item]])
            except ValueError as error:
                batch.fail(item, suffix, str(error))
        return batch.failures


class _Batch:
    """The reads of one batch. Each failed item is recorded once and left alone from then on."""

    def __init__(self, table: SampleTable, places: Place) -> None:
        self._table = table
        self._places = places
        self._shards: list[int] = places.shard.tolist()
        self._files: list[OpenFile | None] = []
        self._late: _Late = []
        self.failures: Failures = {}
        sound: dict[int, OpenFile | None] = {}
        for item, shard in enumerate(self._shards):
            if shard not in sound:
                sound[shard] = self._open(item, shard)
            elif sound[shard] is None:
                self._open(item, shard)
            self._files.append(sound[shard])
        self._sound = [shard for shard, file in sound.items() if file is not None]

    def _open(self, item: int, shard: int) -> OpenFile | None:
        try:
            self._table.index(shard)
            return self._table.file(shard)
        except FileNotFoundError:
            self.fail(item, "", "its shard is missing")
        except (OSError, ShardsError) as error:
            self.fail(item, "", str(error))
        return None

    def fail(self, item: int, suffix: str, what: str) -> None:
        """Record why an item cannot be used."""
        shard = self._shards[item]
        key = self._table.key(shard, int(self._places.sample[item]))
        name = self._table.shards[shard].name
        self.failures.setdefault(item, CorruptSample(name, key, suffix, what))

    def queue_level(self, suffix: str, out: npt.NDArray[Any], rows: list[int]) -> None:
        """Read one level of every item, as far as the page cache has it; queue the rest."""
        column = self._table.column(suffix, self._sound)
        offsets = column.offsets[self._places.index].tolist()
        size = out[0].nbytes
        target = out.reshape(-1).view(np.uint8).data
        wrong = column.sizes[self._places.index] != size
        for item in np.flatnonzero(wrong).tolist():
            if self._files[item] is not None:
                what = "is missing" if offsets[item] < 0 else "has another shape than the manifest"
                self.fail(item, suffix, what)
        for item, (file, offset, row) in enumerate(zip(self._files, offsets, rows, strict=True)):
            if file is not None and not wrong[item]:
                self._read(file, offset, target[row * size : (row + 1) * size], item, suffix)

    def queue_images(self) -> dict[int, tuple[str, memoryview]]:
        """Read the encoded image of every item; returns suffix and bytes by item."""
        images: dict[int, tuple[str, memoryview]] = {}
        for suffix in IMAGE_SUFFIXES:
            if all(self._table.index(shard).column(suffix) is None for shard in self._sound):
                continue
            column = self._table.column(suffix, self._sound)
            offsets = column.offsets[self._places.index].tolist()
            sizes = column.sizes[self._places.index].tolist()
            space = memoryview(bytearray(sum(sizes)))
            start = 0
            for item, (file, offset, size) in enumerate(
                zip(self._files, offsets, sizes, strict=True)
            ):
                if file is not None and offset >= 0 and item not in images:
                    images[item] = (suffix, space[start : start + size])
                    self._read(file, offset, images[item][1], item, suffix)
                start += size
        for item, file in enumerate(self._files):
            if file is not None and item not in images:
                self.fail(item, "", "has no image")
        return images

    def _read(
        self, file: OpenFile, offset: int, target: memoryview, item: int, suffix: str
    ) -> None:
        try:
            # Without waiting: what is cached costs one call, and the disk sees the rest at once.
            if os.preadv(file.descriptor, [target], offset, os.RWF_NOWAIT) == len(target):
                return
        except OSError:
            pass
        self._late.append((file, offset, target, item, suffix))

    def finish_reads(self) -> None:
        """Read what the page cache did not have: announced as a whole, then fetched."""
        for file, offset, target, _, _ in self._late:
            os.posix_fadvise(file.descriptor, offset, len(target), os.POSIX_FADV_WILLNEED)
        for file, offset, target, item, suffix in self._late:
            done = 0
            try:
                while done < len(target):
                    got = os.preadv(file.descriptor, [target[done:]], offset + done)
                    if got == 0:
                        self.fail(item, suffix, "its tar is cut off before this member's end")
                        break
                    done += got
            except OSError as error:
                self.fail(item, suffix, f"cannot be read: {error.strerror}")
        self._late = []

    def _unchecked(self, suffix: str) -> Ints:
        column = self._table.column(suffix, self._sound)
        return np.flatnonzero(column.unchecked[self._places.index])

    def check_level(self, suffix: str, out: npt.NDArray[Any], rows: list[int]) -> None:
        """Compare checksums of the payloads that are read for the first time."""
        for item in self._unchecked(suffix).tolist():
            if item not in self.failures:
                self._check(item, suffix, out[rows[item]].reshape(-1).view(np.uint8).data)

    def check_image(self, item: int, suffix: str, data: memoryview) -> None:
        """Compare the checksum of an image that is read for the first time."""
        column = self._table.column(suffix, self._sound)
        if item not in self.failures and column.unchecked[self._places.index[item]]:
            self._check(item, suffix, data)

    def _check(self, item: int, suffix: str, data: memoryview) -> None:
        column = self._table.column(suffix, self._sound)
        index = self._places.index[item]
        if sum64(data) == int(column.sums[index]):
            # Once per process is enough: what it guards against is decay on disk.
            column.unchecked[index] = False
        else:
            self.fail(item, suffix, "its bytes differ from its checksum")


def read_sample(index: ShardIndex, row: int, shard: str, descriptor: int) -> Sample:
    """The whole sample in one row of a shard's index, every member checked.

    Raises:
        CorruptSample: naming the member that cannot be read.
    """
    key = index.key(row)
    members: dict[str, bytes] = {}
    levels: dict[str, npt.NDArray[Any]] = {}
    for number, column in enumerate(index.columns):
        offset, size = int(index.offsets[row, number]), int(index.sizes[row, number])
        if offset < 0:
            continue
        data = os.pread(descriptor, size, offset)
        if len(data) < size:
            raise CorruptSample(shard, key, column.suffix, "its tar is cut off before its end")
        if index.sums is not None and sum64(data) != int(index.sums[row, number]):
            raise CorruptSample(shard, key, column.suffix, "its bytes differ from its checksum")
        name = level_of_suffix(column.suffix)
        if name is not None and column.shape is not None and column.dtype is not None:
            levels[name] = np.frombuffer(data, column.dtype).reshape(column.shape)
        else:
            members[column.suffix] = data
    try:
        return replace(decode(key, members), levels=levels)
    except ValueError as error:
        raise CorruptSample(shard, key, "", str(error)) from error
