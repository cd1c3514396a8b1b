"""Reads many samples at once: scattered reads into given buffers, checked and decoded."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate, compress, pairwise
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from shards.errors import CorruptSample, FetchError, ShardsError, show_name
from shards.files import gather, read_at, sum64, too_sparse
from shards.format.index import ShardIndex
from shards.format.sample import (
    CAPTION_SUFFIX,
    IMAGE_SUFFIXES,
    LABEL_SUFFIX,
    META_SUFFIX,
    Sample,
    as_array,
    decode,
    image_suffix,
    level_of_suffix,
    level_suffix,
)
from shards.format.table import OpenFile, SampleTable
from shards.image.decode import decode_rgbx, shrink, write_into
from shards.read.order import Place

Arrays = dict[str, npt.NDArray[Any]]
Failures = dict[int, CorruptSample]
ImageDtype = Literal["float32", "uint8"]


@dataclass(frozen=True)
class LevelShape:
    """What a level's payload is: (locations, channels) of `dtype`."""

    locations: int
    channels: int
    dtype: np.dtype[Any]


class _Reads(NamedTuple):
    """Planned reads of one kind of member, one entry per item of the batch in every list."""

    suffix: str
    items: list[int]
    descriptors: list[int]
    targets: list[tuple[memoryview]]
    offsets: list[int]

    def only(self, mask: Sequence[bool]) -> _Reads:
        """The reads whose entry in `mask` is true."""
        return _Reads(
            self.suffix,
            list(compress(self.items, mask)),
            list(compress(self.descriptors, mask)),
            list(compress(self.targets, mask)),
            list(compress(self.offsets, mask)),
        )


class BatchReader:
    """Reads and decodes chosen members of samples of one split. Safe to use from several threads.

    Args:
        table: the split.
        levels: shape by level name.
        image_size: side of the requested images, or None for no images.
        image_dtype: of the images; see `Dataset.stream`.
    """

    def __init__(
        self,
        table: SampleTable,
        levels: dict[str, LevelShape],
        image_size: int | None,
        image_dtype: ImageDtype = "float32",
    ) -> None:
        self._table = table
        self._levels = levels
        self._image_size = image_size
        self._image_dtype = np.dtype(image_dtype)

    def shapes(self, count: int) -> dict[str, tuple[tuple[int, ...], np.dtype[Any]]]:
        """Shape and dtype of the arrays that a batch of `count` samples needs, by name."""
        wanted: dict[str, tuple[tuple[int, ...], np.dtype[Any]]] = {
            name: ((count, level.locations, level.channels), level.dtype)
            for name, level in self._levels.items()
        }
        if (size := self._image_size) is not None:
            wanted["image"] = ((count, 3, size, size), self._image_dtype)
        return wanted

    def read(self, places: Place, rows: list[int], out: Arrays) -> Failures:
        """Read sample i of `places` into row rows[i] of every array of `out`.

        Returns:
            The items of `places` that could not be read, each with the reason; the content of
            their rows is undefined.

        Raises:
            FetchError: if a shard is behind a URL and cannot be fetched.
        """
        batch = _Batch(self._table, places)
        for name in self._levels:
            batch.queue_level(level_suffix(name), out[name], rows)
        images = batch.queue_images() if self._image_size is not None else {}
        batch.read()
        for name in self._levels:
            payload = partial(_row_bytes, out[name], rows)
            batch.check(level_suffix(name), payload)
        for suffix, encoded in images.items():
            batch.check(suffix, encoded.get)
            for item, data in encoded.items():
                if item in batch.failures:
                    continue
                try:
                    pixels = decode_rgbx(data, IMAGE_SUFFIXES[suffix])
                    write_into(shrink(pixels, out["image"].shape[-1]), out["image"][rows[item]])
                except ValueError as error:
                    batch.fail(item, suffix, str(error))
        return batch.failures


def _row_bytes(out: npt.NDArray[Any], rows: list[int], item: int) -> memoryview:
    return memoryview(out[rows[item]].reshape(-1).view(np.uint8).data)


class _Batch:
    """The reads of one batch. Each failed item is recorded once and left alone from then on."""

    def __init__(self, table: SampleTable, places: Place) -> None:
        self._table = table
        self._places = places
        self._shards: list[int] = places.shard.tolist()
        self._queue: list[_Reads] = []
        self.failures: Failures = {}
        # Held until the batch is read: a file is closed when its last holder releases it.
        self._files = {shard: self._open(shard) for shard in dict.fromkeys(self._shards)}
        self._sound = {shard for shard, file in self._files.items() if file is not None}
        self._rows = table.rows(self._sound, places.shard, places.sample)
        numbers = {shard: file.descriptor if file else -1 for shard, file in self._files.items()}
        self._descriptors = [numbers[shard] for shard in self._shards]

    def _open(self, shard: int) -> OpenFile | None:
        try:
            self._table.index(shard)
            return self._table.file(shard)
        except FileNotFoundError:
            what = "its shard is missing"
        except FetchError:
            # The sample may be sound: skipping it would change the order for no reason.
            raise
        except (OSError, ShardsError) as error:
            what = str(error)
        for item, other in enumerate(self._shards):
            if other == shard:
                self.fail(item, "", what)
        return None

    def fail(self, item: int, suffix: str, what: str) -> None:
        """Record why an item cannot be used."""
        shard = self._shards[item]
        key = self._table.key(shard, int(self._places.sample[item]))
        name = self._table.shards[shard].name
        self.failures.setdefault(item, CorruptSample(name, key, suffix, what))

    def queue_level(self, suffix: str, out: npt.NDArray[Any], rows: list[int]) -> None:
        """Plan to read one level of every item straight into its row of `out`."""
        column = self._table.column(suffix, self._sound)
        offsets = column.offsets[self._rows].tolist()
        size = out[0].nbytes
        target = out.reshape(-1).view(np.uint8).data
        targets = [(target[row * size : row * size + size],) for row in rows]
        items = list(range(len(rows)))
        reads = _Reads(suffix, items, self._descriptors, targets, offsets)
        for item in np.flatnonzero(column.offsets[self._rows] < -1).tolist():
            values = self._converted(item, suffix)
            if values is not None:
                out[rows[item]] = values
        wrong = (column.sizes[self._rows] != size) | (column.offsets[self._rows] < 0)
        if len(self._sound) < len(self._files):
            wrong |= np.array(self._descriptors) < 0
        if wrong.any():
            for item in np.flatnonzero(wrong).tolist():
                if offsets[item] >= 0:
                    self.fail(item, suffix, "has another shape than the manifest says")
                elif offsets[item] == -1:
                    self.fail(item, suffix, self._fault(item, suffix) or "is missing")
            reads = reads.only((~wrong).tolist())
        self._queue.append(reads)

    def _fault(self, item: int, suffix: str) -> str | None:
        shard, row = self._shards[item], int(self._places.sample[item])
        if self._files[shard] is None:
            return None
        return self._table.index(shard).fault(row, suffix)

    def _converted(self, item: int, suffix: str) -> Any:
        """A member that has to be converted: bytes, or an array if it is a level."""
        shard, row = self._shards[item], int(self._places.sample[item])
        index, file = self._table.index(shard), self._files[shard]
        number = index.column(suffix)
        if file is None or number is None:
            return None
        try:
            return read_member(index, row, number, self._table.shards[shard].name, file.descriptor)
        except CorruptSample as error:
            self.fail(item, suffix, error.what)
            return None

    def queue_images(self) -> dict[str, dict[int, memoryview]]:
        """Plan to read one encoded image of every item; returns their bytes by suffix and item."""
        images: dict[str, dict[int, memoryview]] = {}
        found: set[int] = set()
        for suffix in IMAGE_SUFFIXES:
            if all(self._table.index(shard).column(suffix) is None for shard in self._sound):
                continue
            column = self._table.column(suffix, self._sound)
            offsets = column.offsets[self._rows].tolist()
            sizes = column.sizes[self._rows].tolist()
            space = memoryview(bytearray(sum(sizes)))
            ends = list(accumulate(sizes, initial=0))
            targets = [(space[start:end],) for start, end in pairwise(ends)]
            items = list(range(len(targets)))
            reads = _Reads(suffix, items, self._descriptors, targets, offsets).only(
                [
                    descriptor >= 0 and offset >= 0 and item not in found
                    for item, descriptor, offset in zip(
                        items, self._descriptors, offsets, strict=True
                    )
                ]
            )
            images[suffix] = {
                item: target for item, (target,) in zip(reads.items, reads.targets, strict=True)
            }
            self._queue.append(reads)
            for item in np.flatnonzero(column.offsets[self._rows] < -1).tolist():
                if item not in found and (data := self._converted(item, suffix)) is not None:
                    images[suffix][item] = memoryview(data)
                    found.add(item)
            found.update(reads.items)
        for item, descriptor in enumerate(self._descriptors):
            if descriptor >= 0 and item not in found:
                faults = ((suffix, self._fault(item, suffix)) for suffix in IMAGE_SUFFIXES)
                suffix, what = next(((s, w) for s, w in faults if w), ("", "has no image"))
                self.fail(item, suffix, what)
        return images

    def read(self) -> None:
        """Carry out the planned reads: first what is in the page cache, then the rest.

        The first pass does not wait for the disk, but starts its work; the rest is announced as a
        whole, so that the disk can sort it, before this waits for it.
        """
        late = []
        preadv, no_wait = os.preadv, os.RWF_NOWAIT
        for suffix, items, *reads in self._queue:
            for number, (descriptor, targets, offset) in enumerate(zip(*reads, strict=True)):
                try:
                    if preadv(descriptor, targets, offset, no_wait) == len(targets[0]):
                        continue
                except OSError:
                    pass
                late.append((descriptor, targets[0], offset, items[number], suffix))
        for descriptor, target, offset, _, _ in late:
            os.posix_fadvise(descriptor, offset, len(target), os.POSIX_FADV_WILLNEED)
        for descriptor, target, offset, item, suffix in late:
            done = 0
            try:
                while done < len(target):
                    got = os.preadv(descriptor, (target[done:],), offset + done)
                    if got == 0:
                        self.fail(item, suffix, "its tar is cut off before this member's end")
                        break
                    done += got
            except OSError as error:
                self.fail(item, suffix, f"cannot be read: {error.strerror}")

    def check(self, suffix: str, payloads: Callable[[int], memoryview | None]) -> None:
        """Compare checksums of the payloads that this process reads for the first time.

        Args:
            suffix: of the members.
            payloads: bytes by item; None where another member was read instead.
        """
        column = self._table.column(suffix, self._sound)
        for item in np.flatnonzero(column.unchecked[self._rows]).tolist():
            payload = payloads(item)
            if payload is None or item in self.failures:
                continue
            row = self._rows[item]
            if sum64(payload) == int(column.sums[row]):
                # Once per process is enough: it guards against decay on disk.
                column.unchecked[row] = False
            else:
                self.fail(item, suffix, "its bytes differ from its checksum")


def read_sample(index: ShardIndex, row: int, shard: str, descriptor: int) -> Sample:
    """The whole sample in one row of a shard's index, every member checked.

    Raises:
        CorruptSample: naming the member that cannot be read.
    """
    key = index.key(row)
    suffixes = [
        column.suffix
        for number, column in enumerate(index.columns)
        if index.offsets[row, number] != -1
    ]
    image = image_suffix(suffixes)
    wanted = {META_SUFFIX, LABEL_SUFFIX, CAPTION_SUFFIX, *([image] if image else IMAGE_SUFFIXES)}
    members: dict[str, bytes] = {}
    # Only arrays that are levels here count; other members are not needed.
    arrays = {column.suffix for column in index.columns if column.shape is not None}
    for fault in index.faults:
        if fault.row == row and fault.suffix in arrays | wanted:
            raise CorruptSample(shard, key, fault.suffix, fault.what)
    for number, column in enumerate(index.columns):
        if column.suffix in wanted and index.offsets[row, number] != -1:
            members[column.suffix] = read_member(index, row, number, shard, descriptor)
    levels = read_levels(index, row, shard, descriptor)
    try:
        sample = decode(key, members)
    except ValueError as error:
        raise CorruptSample(
            shard, key, "", str(error).removeprefix(f"{show_name(key)}: ")
        ) from error
    return replace(sample, levels=levels)


def read_levels(
    index: ShardIndex, row: int, shard: str, descriptor: int
) -> dict[str, npt.NDArray[Any]]:
    """The levels of a sample, by name, as used in training; without faulty ones.

    Raises:
        CorruptSample: naming the one that cannot be read.
    """
    levels = {}
    for number, column in enumerate(index.columns):
        name = level_of_suffix(column.suffix)
        if name is not None and column.shape is not None and index.offsets[row, number] != -1:
            levels[name] = read_member(index, row, number, shard, descriptor)
    return levels


def read_member(index: ShardIndex, row: int, number: int, shard: str, descriptor: int) -> Any:
    """One member of a sample, checked: its bytes, or the array if it is a level.

    Raises:
        CorruptSample: if it cannot be read as it was written.
    """
    column = index.columns[number]
    offset, size = int(index.offsets[row, number]), int(index.sizes[row, number])
    key, dtype, shape, fortran = index.key(row), column.dtype, column.shape, False
    try:
        if offset >= 0:
            data = read_at(descriptor, size, offset)
        else:
            stored = index.indirect[-2 - offset]
            if (what := too_sparse(size, stored.extents)) is not None:
                raise CorruptSample(shard, key, column.suffix, what)
            data = gather(descriptor, stored.extents, size)
            dtype, shape, fortran = stored.dtype, stored.shape, stored.fortran
    except OSError as error:
        what = f"cannot be read: {error.strerror}"
        raise CorruptSample(shard, key, column.suffix, what) from error
    if len(data) < size:
        raise CorruptSample(shard, key, column.suffix, "its tar is cut off before its end")
    if index.sums is not None and sum64(data) != int(index.sums[row, number]):
        raise CorruptSample(shard, key, column.suffix, "its bytes differ from its checksum")
    if column.shape is None or dtype is None or shape is None:
        return data
    values = as_array(data, np.dtype(dtype), shape, fortran)
    with np.errstate(over="ignore"):
        return values.astype(column.dtype, order="C", copy=False).reshape(column.shape)
