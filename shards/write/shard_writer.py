"""Writes samples into a dataset; resumes after an interruption, always with the same bytes."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import logging
import tarfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from shards.check.adopt import levels_of
from shards.errors import FinishedError, IndexFileError, PackError, show_name
from shards.files import TEMPORARY, AtomicFile, Locked, atomic_write, lock, sha256_file
from shards.format import index as index_files
from shards.format.index import ShardIndex, index_name, load
from shards.format.manifest import (
    IDENTITY,
    MANIFEST,
    PACKING,
    SPLITS,
    LevelInfo,
    Manifest,
    ShardInfo,
    split_table,
)
from shards.format.sample import Sample, encode, to_float16
from shards.format.scan import scan
from shards.format.statistics import Moments, Statistics, save_statistics, shard_moments
from shards.image.decode import check_image

log = logging.getLogger(__name__)
_LOCK = ".packing.lock"


def split_of(key: str, val_fraction: float, test_fraction: float) -> str:
    """Split of a key: a function of the key alone, so adding samples never moves one."""
    word = _word(key)
    if word < val_fraction:
        return "val"
    return "test" if word >= 1.0 - test_fraction else "train"


def _word(key: str) -> float:
    digest = hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
    return int.from_bytes(digest[:8], "big") / 2.0**64


class ShardWriter:
    """Writes samples one by one; `finish` completes the dataset. Use it as a context manager.

    Shards are put in place as they fill up. After an interruption, a new writer on the same folder
    with the same settings keeps them: `completed_keys()` need not be produced again (they are
    skipped if they are added), and the rest must come in the same order as before.

    Attributes:
        seen: keys that were added to this writer.

    Raises:
        FinishedError: if `out` holds a finished dataset.
        PackError: if it holds another packing, or is in use.
    """

    def __init__(
        self,
        out: Path,
        *,
        shard_size: int = 1000,
        val_fraction: float = 0.0,
        test_fraction: float = 0.0,
        guide: dict[str, Any] | None = None,
        prepare: dict[str, Any] | None = None,
        classes: Sequence[str] = (),
        guides: Mapping[str, dict[str, Any]] | None = None,
        clip: dict[str, Any] | None = None,
    ) -> None:
        if shard_size < 1:
            raise PackError("shard_size must be at least 1")
        if min(val_fraction, test_fraction) < 0 or val_fraction + test_fraction >= 1:
            raise PackError(
                "val_fraction and test_fraction must not be negative, and their sum must be below 1"
            )
        self.seen: set[str] = set()
        self._out = Path(out)
        self._settings = _as_json(
            {
                "shard_size": shard_size,
                "val_fraction": val_fraction,
                "test_fraction": test_fraction,
                "guide": guide or {},
                "prepare": prepare or {},
            }
        )
        further = {"classes": list(classes), "guides": dict(guides or {}), "clip": clip or {}}
        self._settings |= _as_json({name: value for name, value in further.items() if value})
        self._identity = {name: self._settings[name] for name in IDENTITY if name in self._settings}
        self._num_classes = len(classes)
        self._fractions = {
            "train": 1.0 - val_fraction - test_fraction,
            "val": val_fraction,
            "test": test_fraction,
        }
        self._completed: set[str] = set()
        self._shards: list[ShardInfo] = []
        self._writers: dict[str, ShardFile] = {}
        self._moments: dict[str, Moments] = {}
        self._statistics = Statistics()
        self._levels: dict[str, LevelInfo] | None = None
        self._image_size: int | None = None
        self._has_labels = True
        self._out.mkdir(parents=True, exist_ok=True)
        if (self._out / MANIFEST).exists():
            raise FinishedError(self._out / MANIFEST)
        self._lock: TextIO | None = self._take_lock()
        try:
            self._resume()
        except BaseException:
            self.close()
            raise

    def completed_keys(self) -> set[str]:
        """Keys that lie in whole shards of an interrupted packing."""
        return set(self._completed)

    def add(self, sample: Sample) -> None:
        """Write one sample.

        Raises:
            PackError: if its key was added before, its image is not square, it differs from the
                others in image size or levels, or it has features that float16 cannot hold or a
                label that is no class.
        """
        if sample.key in self.seen:
            raise PackError(
                f"key '{show_name(sample.key)}' occurs twice; give every sample its own"
            )
        self.seen.add(sample.key)
        if sample.key in self._completed:
            return
        try:
            self._check(sample)
            members = encode(sample)
        except ValueError as error:
            raise PackError(str(error)) from error
        split = split_of(sample.key, self._fractions["val"], self._fractions["test"])
        if split not in self._writers:
            number = sum(shard.split == split for shard in self._shards)
            self._writers[split] = ShardFile(self._out / f"{split}-{number:05d}.tar", split)
        self._writers[split].write(sample.key, members)
        if split == "train":
            for name, values in sample.levels.items():
                # Of what is stored, not of what was given: the collapse floor is that of the file.
                stored = to_float16(sample.key, name, values)
                self._moments.setdefault(name, Moments()).add(stored)
        if self._writers[split].num_samples == self._settings["shard_size"]:
            self._finish_shard(split)

    def finish(self) -> Manifest:
        """Write the last shards, the statistics and, last of all, the manifest.

        Raises:
            PackError: if no sample fell into the train split.
        """
        for split in SPLITS:
            if split in self._writers:
                self._finish_shard(split)
        shards = tuple(sorted(self._shards, key=lambda s: (SPLITS.index(s.split), s.name)))
        if not any(shard.split == "train" for shard in shards):
            raise PackError(f"{self._out}: no sample for the train split; check the input")
        self._warn_of_empty_splits({shard.split for shard in shards})
        levels = self._levels or {}
        variances = self._statistics.total_variances()
        manifest = Manifest(
            image_size=self._image_size,
            has_labels=self._has_labels,
            splits=split_table(shards, self._fractions),
            levels={
                name: info.model_copy(update={"total_variance": variances[name]})
                for name, info in sorted(levels.items())
            },
            **self._identity,
            statistics=(
                save_statistics(self._statistics, self._out, self._identity) if levels else None
            ),
            shards=shards,
        )
        manifest.save(self._out)
        (self._out / PACKING).unlink()
        (self._out / _LOCK).unlink(missing_ok=True)
        self.close()
        return manifest

    def _warn_of_empty_splits(self, filled: set[str]) -> None:
        """Warn of requested splits without a sample; name the fraction that gives one."""
        words = [_word(key) for key in self.seen | self._completed]
        for split, nearest in (("val", min(words)), ("test", 1.0 - max(words))):
            fraction = self._fractions[split]
            if fraction and split not in filled:
                enough = (int(nearest * 100) + 1) / 100
                log.warning(
                    "EMPTY SPLIT: %s: %s_fraction %g puts none of the %d samples into %s, because "
                    "the split of a sample follows from the hash of its key; %s",
                    self._out, split, fraction, len(words), split,
                    f"{split}_fraction {enough:g} gives it one, or add more photos"
                    if enough < 1 else "add more photos",
                )  # fmt: skip

    def close(self) -> None:
        """Drop unfinished shards and unlock the folder; what is finished stays."""
        for writer in self._writers.values():
            writer.abandon()
        self._writers = {}
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _take_lock(self) -> TextIO:
        path = self._out / _LOCK
        file = path.open("w")
        if lock(file, path, shared=False, wait=False) is Locked.BUSY:
            file.close()
            raise PackError(f"{self._out}: another process is packing into it")
        return file

    def _check(self, sample: Sample) -> None:
        if self._num_classes and sample.label not in range(self._num_classes):
            raise ValueError(
                f"{show_name(sample.key)}: label {sample.label} is not one of the "
                f"{self._num_classes} classes, which are numbered from 0"
            )
        width, height = check_image(sample.image, f"{sample.key}.{sample.image_format}")
        if width != height:
            raise ValueError(
                f"{show_name(sample.key)}: the image is {width}x{height}; crop it to a square"
            )
        levels = {
            name: LevelInfo(grid=round(v.shape[0] ** 0.5), channels=v.shape[1], dtype="float16")
            for name, v in sorted(sample.levels.items())
        }
        if self._levels is None:
            self._levels, self._image_size = levels, width
        if width != self._image_size:
            raise ValueError(
                f"{show_name(sample.key)}: the image is {width}x{width}, but earlier ones are "
                f"{self._image_size}x{self._image_size}; give all images the same size"
            )
        if levels != self._levels:
            mine, others = (
                ", ".join(f"{name} ({info.grid**2}, {info.channels})" for name, info in x.items())
                for x in (levels, self._levels)
            )
            raise ValueError(
                f"{show_name(sample.key)}: has levels {mine or 'none'}, but earlier samples have "
                f"{others or 'none'}; give all samples the same levels"
            )

    def _finish_shard(self, split: str) -> None:
        info, index = self._writers[split].finish()
        # Not before: until it is finished, `close` has to abandon it.
        del self._writers[split]
        self._shards.append(info)
        self._has_labels &= index.labels is not None
        if split == "train":
            self._statistics.merge(self._moments)
            self._moments = {}
        self._save_state()

    def _save_state(self) -> None:
        state = {
            "format": "dinogen-packing",
            "version": 1,
            "settings": self._settings,
            "image_size": self._image_size,
            "shards": [shard.model_dump() for shard in self._shards],
        }
        with atomic_write(self._out / PACKING) as file:
            file.write(json.dumps(state, indent=1, ensure_ascii=False).encode())

    def _resume(self) -> None:
        for path in self._out.glob(f".*{TEMPORARY}"):
            path.unlink()
        path = self._out / PACKING
        if not path.exists():
            if tars := sorted(self._out.glob("*.tar")):
                raise PackError(
                    f"{self._out} holds {tars[0].name}, which is not part of this dataset; choose "
                    f"another folder"
                )
            self._save_state()
            return
        state = json.loads(path.read_bytes())
        if state["settings"] != self._settings:
            mine, theirs = self._settings, state["settings"]
            names = ", ".join(k for k in {**mine, **theirs} if mine.get(k) != theirs.get(k))
            raise PackError(
                f"{self._out} holds an unfinished packing with other settings ({names}); use those "
                f"settings, or delete the folder"
            )
        self._image_size = state["image_size"]
        self._shards = [ShardInfo(**shard) for shard in state["shards"]]
        for shard in self._shards:
            self._resume_shard(shard)
        kept = {shard.name for shard in self._shards}
        for tar in self._out.glob("*.tar"):
            # Put in place, but killed before it was recorded.
            if tar.name not in kept:
                tar.unlink()
                (self._out / index_name(tar.name)).unlink(missing_ok=True)

    def _resume_shard(self, shard: ShardInfo) -> None:
        tar = self._out / shard.name
        try:
            sound = sha256_file(tar) == shard.sha256
            index = load(tar.with_name(index_name(shard.name)))
        except (FileNotFoundError, IndexFileError) as error:
            raise PackError(f"{error}; delete {self._out} and pack again") from error
        if not sound:
            raise PackError(f"{tar} changed since it was packed; delete {self._out} and pack again")
        self._completed |= {index.key(row) for row in range(len(index))}
        self._has_labels &= index.labels is not None
        self._levels = levels_of(index, shard.name)
        if shard.split == "train":
            self._statistics.merge(shard_moments(tar, index))


def _as_json(settings: dict[str, Any]) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(json.dumps(settings, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise PackError(f"guide, prepare and clip must be plain JSON: {error}") from error
    return found


class ShardFile:
    """Writes the samples of one shard to a temporary file, which `finish` puts in place.

    Args:
        path: where the tar is written.
        split: what the manifest calls the samples.
    """

    def __init__(self, path: Path, split: str) -> None:
        from webdataset import TarWriter

        self._path, self._split = path, split
        self._file = AtomicFile(path)
        self._tar = TarWriter(
            self._file,
            encoder=False,
            compress=False,
            mtime=0,
            user="dinogen",
            group="dinogen",
            mode=0o444,
        )
        self.num_samples = 0

    def write(self, key: str, members: dict[str, bytes]) -> None:
        """Append one sample; the writer sorts its members by suffix."""
        if "\0" in key or any("\0" in suffix for suffix in members):
            self._write_with_zeros(key, members)
        else:
            self._tar.write({"__key__": key, **members})
        self.num_samples += 1

    def _write_with_zeros(self, key: str, members: dict[str, bytes]) -> None:
        """Like webdataset's writer, for names that a plain header would cut at a zero byte."""
        for suffix, data in sorted(members.items()):
            name = f"{key}.{suffix}"
            info = tarfile.TarInfo(name.replace("\0", "_"))
            info.size, info.mtime, info.mode = len(data), 0, 0o444
            info.uname = info.gname = "dinogen"
            info.pax_headers = {"path": name}
            self._tar.tarstream.addfile(info, io.BytesIO(data))

    def finish(self) -> tuple[ShardInfo, ShardIndex]:
        """Put the tar and its index in place.

        Returns:
            What the manifest says about the shard, and the index.
        """
        self._tar.close()
        self._file.commit()
        # Read back from what was written, so there is only one way to compute an offset.
        index = scan(self._path, with_sums=True)
        index_files.save(index, self._path.with_name(index_files.index_name(self._path.name)))
        info = ShardInfo(
            name=self._path.name,
            split=self._split,
            num_samples=self.num_samples,
            num_bytes=self._file.num_bytes,
            sha256=self._file.hexdigest(),
        )
        return info, index

    def abandon(self) -> None:
        """Remove the temporary file."""
        # Closed first, or tarfile writes to the closed file when it is collected.
        with contextlib.suppress(OSError):
            self._tar.close()
        self._file.abandon()


def write_shard(
    path: Path, split: str, samples: Iterable[tuple[str, dict[str, bytes]]]
) -> tuple[ShardInfo, ShardIndex]:
    """Write a whole shard from (key, members)."""
    writer = ShardFile(path, split)
    try:
        for key, members in samples:
            writer.write(key, members)
        return writer.finish()
    except BaseException:
        writer.abandon()
        raise


def pack(
    samples: Iterable[Sample],
    out: Path,
    *,
    shard_size: int = 1000,
    val_fraction: float = 0.0,
    test_fraction: float = 0.0,
    guide: dict[str, Any] | None = None,
    prepare: dict[str, Any] | None = None,
    classes: Sequence[str] = (),
    guides: Mapping[str, dict[str, Any]] | None = None,
    clip: dict[str, Any] | None = None,
) -> Manifest:
    """Write samples as a dataset into the folder `out`.

    An interrupted packing resumes after its last whole shard, if the settings are the same; the
    result has the same bytes as an uninterrupted one.

    Args:
        samples: in the order in which they are written.
        out: folder, created if missing.
        shard_size: samples per tar.
        val_fraction: fraction of the keys, chosen by their hash, that goes to the split `val`.
        test_fraction: the same for `test`.
        guide: identity of the feature network, for the manifest.
        prepare: settings of the preparation, for the manifest.
        classes: names of the classes that labels 0, 1, ... mean; then every sample has one.
        guides: identities of further feature networks, by the names that their levels begin with.
        clip: identity of the network that made the levels "clip" and "text".

    Raises:
        FinishedError: if `out` holds a finished dataset.
        PackError: naming the key or folder and what is wrong with it.
    """
    writer = ShardWriter(
        out,
        shard_size=shard_size,
        val_fraction=val_fraction,
        test_fraction=test_fraction,
        guide=guide,
        prepare=prepare,
        classes=classes,
        guides=guides,
        clip=clip,
    )
    with writer:
        for sample in samples:
            writer.add(sample)
        lost = writer.completed_keys() - writer.seen
        if lost:
            raise PackError(
                f"{out}: key '{show_name(min(lost))}' of the interrupted packing is no longer in "
                f"the input; delete the folder and pack again"
            )
        return writer.finish()
