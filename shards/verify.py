"""Rereads and checks everything: shards, indexes, samples, manifest, statistics."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from shards import index as index_files
from shards.errors import CorruptSample, FetchError, IndexFileError, ManifestError
from shards.files import sha256_file
from shards.image import decode_image
from shards.index import ShardIndex
from shards.manifest import MANIFEST, LevelInfo, Manifest, ShardInfo
from shards.packed import PackedDataset
from shards.plain import levels_of
from shards.reader import read_sample
from shards.sample import level_name, level_suffix
from shards.scan import scan
from shards.table import Source

MEND_SHARD = "restore the shard from a copy, or run `dinogen shards repair` to go on without it"
MEND_INDEX = "run `dinogen shards index`"
MEND_REPAIR = "run `dinogen shards repair`"


@dataclass(frozen=True)
class Problem:
    """Something wrong with a dataset.

    Attributes:
        shard: file name (of a tar, an index, the manifest or the statistics).
        key: key of the sample, or "".
        member: suffix of the member, or "".
        what: what is wrong.
        mend: what to do about it.
    """

    shard: str
    key: str
    member: str
    what: str
    mend: str

    def __str__(self) -> str:
        member = f".{self.member}" if self.member else ""
        place = f": {self.key}{member}" if self.key else ""
        return f"{self.shard}{place}: {self.what}; {self.mend}"


@dataclass
class ShardReport:
    """What an inspection found in one shard.

    Attributes:
        problems: all of them.
        missing: there is no tar.
        altered: the tar differs from what the manifest says.
        index: the best index there is; None if there is no telling what the tar holds.
        index_wrong: the index on disk is not `index`.
        damaged: rows of `index` that cannot be used.
        torn: the tar's headers are damaged, so that other tools stumble.
    """

    problems: list[Problem] = field(default_factory=list)
    missing: bool = False
    altered: bool = False
    index: ShardIndex | None = None
    index_wrong: bool = False
    damaged: set[int] = field(default_factory=set)
    torn: bool = False


def verify(data: PackedDataset, progress: Callable[[int], None] | None = None) -> list[Problem]:
    """Reread a whole dataset; a remote one is fetched for that.

    Args:
        data: the dataset.
        progress: called with the number of samples of each shard when it is done.

    Returns:
        Every problem found, in the order of the files; empty if all is well.
    """
    problems: list[Problem] = []
    seen: dict[str, str] = {}
    manifest = data.manifest
    labelled = True
    for shard in manifest.shards:
        report = inspect_shard(data.source, manifest, shard)
        problems += report.problems
        if report.index is not None:
            labelled &= report.index.labels is not None
            for row in range(len(report.index)):
                key = report.index.key(row)
                if key in seen:
                    what = f"has the same key as a sample of {seen[key]}"
                    mend = "pack the data anew with unique keys"
                    problems.append(Problem(shard.name, key, "", what, mend))
                seen[key] = shard.name
        if progress is not None:
            progress(shard.num_samples)
    if manifest.has_labels and not labelled:
        what = "says that all samples have labels, but some have none"
        problems.append(Problem(MANIFEST, "", "", what, MEND_REPAIR))
    problems += _strangers(data)
    return problems + check_statistics(data)


def inspect_shard(source: Source, manifest: Manifest, shard: ShardInfo) -> ShardReport:
    """Reread one shard: its bytes, its index, each of its samples."""
    report = ShardReport()
    try:
        file = source.open(shard.name)
    except (FileNotFoundError, FetchError) as error:
        report.missing = True
        what = str(error) if isinstance(error, FetchError) else "the shard is missing"
        report.problems.append(Problem(shard.name, "", "", what, MEND_SHARD))
        return report
    # Held to the end: the cache of a remote dataset may not evict it meanwhile.
    tar = file.path
    num_bytes = tar.stat().st_size
    report.altered = shard.sha256 is not None and sha256_file(tar) != shard.sha256
    if num_bytes < shard.num_bytes:
        what = f"is cut off: {num_bytes} of {shard.num_bytes} bytes"
        report.problems.append(Problem(shard.name, "", "", what, MEND_SHARD))
    stored = _stored_index(source, shard, report)
    # Sums of an altered tar would hide what was altered; those of the index show it.
    with_sums = stored is None or not report.altered
    scanned = _scanned_index(tar, with_sums, manifest.levels, report)
    if stored and scanned and not report.torn:
        # What an altered tar holds is no witness against its index, only where it holds it.
        fits = stored.same_layout if report.altered else stored.same_as
        if not fits(scanned):
            _blame_index(report, shard, "does not fit its tar")
            stored = None
    report.index = stored or scanned
    if report.index is None:
        return report
    if len(report.index) != shard.num_samples and stored is None and not report.torn:
        what = f"says {shard.name} has {shard.num_samples} samples, it has {len(report.index)}"
        report.problems.append(Problem(MANIFEST, "", "", what, MEND_REPAIR))
    _check_samples(tar, manifest, report)
    if report.altered and not report.damaged and not report.torn:
        what = f"has another checksum for {shard.name}, whose samples are all sound"
        report.problems.append(Problem(MANIFEST, "", "", what, MEND_REPAIR))
    return report


def _stored_index(source: Source, shard: ShardInfo, report: ShardReport) -> ShardIndex | None:
    try:
        index = index_files.load(source.path(index_files.index_name(shard.name)))
    except FileNotFoundError:
        _blame_index(report, shard, "is missing")
        return None
    except (IndexFileError, FetchError) as error:
        _blame_index(report, shard, str(error))
        return None
    if index.num_bytes != shard.num_bytes:
        _blame_index(report, shard, f"is that of a tar of {index.num_bytes} bytes")
        return None
    return index


def _blame_index(report: ShardReport, shard: ShardInfo, what: str) -> None:
    report.index_wrong = True
    name = index_files.index_name(shard.name)
    report.problems.append(Problem(name, "", "", what, MEND_INDEX))


def _scanned_index(
    tar: Path, with_sums: bool, levels: dict[str, LevelInfo], report: ShardReport
) -> ShardIndex | None:
    def note(damage: CorruptSample) -> None:
        report.torn = True
        problem = Problem(tar.name, damage.key, damage.member, damage.what, MEND_SHARD)
        report.problems.append(problem)

    try:
        index = scan(tar, with_sums, levels, note)
        if (found := levels_of(index, tar.name).keys()) != levels.keys():
            have = ", ".join(found) or "none"
            what = f"has the levels {have}, {MANIFEST} says {', '.join(levels)}"
            report.problems.append(Problem(tar.name, "", "", what, MEND_SHARD))
    except (IndexFileError, ManifestError) as error:
        report.torn = True
        report.problems.append(Problem(tar.name, "", "", str(error), MEND_SHARD))
        return None
    return index


def _check_samples(tar: Path, manifest: Manifest, report: ShardReport) -> None:
    assert report.index is not None
    named = {(problem.key, problem.member) for problem in report.problems}
    descriptor = os.open(tar, os.O_RDONLY)
    try:
        for row in range(len(report.index)):
            try:
                _check_sample(report.index, row, tar.name, descriptor, manifest)
            except CorruptSample as error:
                report.damaged.add(row)
                if (error.key, error.member) not in named:
                    problem = Problem(tar.name, error.key, error.member, error.what, MEND_SHARD)
                    report.problems.append(problem)
    finally:
        os.close(descriptor)


def _check_sample(
    index: ShardIndex, row: int, shard: str, descriptor: int, manifest: Manifest
) -> None:
    """Raise CorruptSample unless a sample can be read, decoded and trained on."""
    sample = read_sample(index, row, shard, descriptor)
    missing = manifest.levels.keys() - sample.levels.keys()
    if missing:
        raise CorruptSample(shard, sample.key, level_suffix(min(missing)), "is missing")
    for name, values in sample.levels.items():
        if not np.isfinite(values).all():
            raise CorruptSample(shard, sample.key, level_suffix(name), "holds numbers not finite")
    try:
        height, width = decode_image(sample.image, sample.image_format).shape[:2]
    except ValueError as error:
        raise CorruptSample(shard, sample.key, sample.image_format, str(error)) from error
    size = manifest.image_size
    if height != width or (size is not None and width != size):
        what = f"is {width}x{height}, needed is {size or 'a square'}"
        raise CorruptSample(shard, sample.key, sample.image_format, what)


def _strangers(data: PackedDataset) -> list[Problem]:
    folder = Path(data.location)
    if "://" in data.location:
        return []
    known = {shard.name for shard in data.manifest.shards}
    what = f"is not in {MANIFEST}"
    mend = "delete it, or pack the data anew"
    names = sorted(tar.name for tar in folder.glob("*.tar"))
    return [Problem(name, "", "", what, mend) for name in names if name not in known]


def check_statistics(data: PackedDataset) -> list[Problem]:
    """Compare the file of statistics with the manifest."""
    manifest = data.manifest
    if not manifest.levels or (manifest.statistics is None and manifest.shards[0].sha256 is None):
        return []
    name = manifest.statistics.file if manifest.statistics else MANIFEST
    problems = []
    try:
        for level in manifest.levels:
            info = data.level_info(level_name(level))
            variance = data.level_variance(level)
            if variance.shape != (info.grid**2, info.channels):
                what = f"{level}: variances of shape {variance.shape}"
                problems.append(Problem(name, "", "", what, MEND_REPAIR))
            elif not np.isclose(variance.mean(dtype=np.float64), data.total_variance(level)):
                what = f"total_variance of {level} is not the mean of its variances"
                problems.append(Problem(MANIFEST, "", "", what, MEND_REPAIR))
    except (ManifestError, FetchError, KeyError, ValueError) as error:
        problems.append(Problem(name, "", "", str(error), MEND_REPAIR))
    return problems
