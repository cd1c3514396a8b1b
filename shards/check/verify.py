"""Rereads and checks everything: shards, indexes, samples, manifest, statistics."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from shards.check.adopt import common_size, levels_of, tars_of
from shards.errors import CorruptSample, FetchError, IndexFileError, ManifestError, show_name
from shards.files import sha256_file
from shards.format import index as index_files
from shards.format.index import NO_LABEL, ShardIndex
from shards.format.manifest import MANIFEST, LevelInfo, Manifest, ShardInfo
from shards.format.sample import (
    CAPTION_SUFFIX,
    IMAGE_SUFFIXES,
    LABEL_SUFFIXES,
    image_suffix,
    level_name,
    level_suffix,
    unusable,
)
from shards.format.scan import FIX_ACCESS, RESTORE, Survey, survey
from shards.format.table import Source
from shards.image.decode import decode_image
from shards.read.dataset import PackedDataset
from shards.read.reader import read_member

FIX_INDEX = "run `dinogen shards index`"
FIX_REPAIR = "run `dinogen shards repair`"
FIX_CHECKSUM = "restore the shard from a copy, or run `dinogen shards repair` to accept it as it is"
FIX_META = "correct it and make the tar again; until then the image is used without it"
FIX_SAMPLE = "correct it and make the tar again, or run `dinogen shards repair` to drop the sample"
FIX_LEVELS = "make all tars with the same features, or keep these in folders of their own"
FIX_KEYS = "give every sample its own key and make the tar again"


@dataclass(frozen=True)
class Problem:
    """Something wrong with a dataset.

    Attributes:
        shard: file name (of a tar, an index, the manifest or the statistics).
        key: key of the sample, or "".
        member: suffix of the member, or "".
        what: what is wrong.
        remedy: what to do about it.
    """

    shard: str
    key: str
    member: str
    what: str
    remedy: str

    def __str__(self) -> str:
        member = f".{self.member}" if self.member else ""
        place = f": {show_name(self.key + member)}" if self.key else ""
        return f"{self.shard}{place}: {self.what}; {self.remedy}"


@dataclass
class ShardReport:
    """What an inspection found in one shard.

    Attributes:
        problems: all of them.
        missing: there is no tar.
        altered: the tar differs from what the manifest says.
        index: the best available index; None if it is unknown what the tar holds.
        index_wrong: the index on disk is not `index`.
        damaged: rows of `index` that cannot be used, and why.
        torn: the tar's headers are damaged, so other tools fail on it.
        unfit: why the tar as a whole cannot be used, other than damage.
        untouched: `unfit` is not damage, so a repair has to leave the tar as it is.
        lost: samples that were in the tar and are not in `index`, and why.
        survey: what a scan of the tar found.
    """

    problems: list[Problem] = field(default_factory=list)
    missing: bool = False
    altered: bool = False
    index: ShardIndex | None = None
    index_wrong: bool = False
    damaged: dict[int, str] = field(default_factory=dict)
    torn: bool = False
    unfit: str | None = None
    untouched: bool = False
    lost: list[str] = field(default_factory=list)
    survey: Survey | None = None


@dataclass
class Findings:
    """What a check of a whole dataset found.

    Attributes:
        problems: in the order of the files; empty if there are none.
        notes: what is no fault, but the user should know.
        num_samples: how many were checked.
        num_shards: how many were checked.
    """

    problems: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    num_samples: int = 0
    num_shards: int = 0


def verify(data: PackedDataset, progress: Callable[[int], None] | None = None) -> list[Problem]:
    """Reread a whole dataset; a remote one is fetched for that.

    Args:
        data: the dataset.
        progress: called with the number of samples of each shard when it is done.

    Returns:
        Every problem found, in the order of the files; empty if there are none.
    """
    return examine(data, progress).problems


def examine(data: PackedDataset, progress: Callable[[int], None] | None = None) -> Findings:
    """Like `verify`, with notes and counts."""
    found = Findings()
    keys = _Keys()
    manifest = data.manifest
    indexes: dict[str, ShardIndex] = {}
    labelled = True
    for shard in manifest.shards:
        report = inspect_shard(data.source, manifest, shard)
        _take(found, shard.name, report, keys)
        if report.index is not None:
            labelled &= report.index.labels is not None
            indexes[shard.name] = report.index
        if progress is not None:
            progress(shard.num_samples)
    if manifest.has_labels and not labelled:
        what = "says that all samples have labels, but some have none"
        found.problems.append(Problem(MANIFEST, "", "", what, FIX_REPAIR))
    if manifest.image_size is None:
        found.notes += common_size(indexes)[1]
    found.notes += keys.notes()
    found.problems += _unlisted(data)
    found.problems += check_statistics(data)
    return found


def examine_plain(folder: Path, progress: Callable[[int], None] | None = None) -> Findings:
    """Reread a folder of plain tars of any origin; nothing is written.

    Raises:
        ManifestError: if there are no tars.
    """
    found = Findings()
    keys = _Keys()
    indexes: dict[str, ShardIndex] = {}
    for tar, report in inspect_plain(folder):
        _take(found, tar.name, report, keys)
        if report.index is not None:
            indexes[tar.name] = report.index
        if progress is not None:
            progress(len(report.index or ()))
    found.notes += common_size(indexes)[1] + keys.notes()
    return found


class _Keys:
    """Keys that several samples have: named within a tar, counted across tars."""

    def __init__(self) -> None:
        self._seen: dict[str, str] = {}
        self._shared: Counter[tuple[str, str]] = Counter()
        self._first = ""

    def of(self, shard: str, index: ShardIndex) -> list[Problem]:
        """Those of one shard."""
        problems = []
        mine: set[str] = set()
        for row in range(len(index)):
            key = index.key(row)
            if key in mine:
                problems.append(Problem(shard, key, "", "the key occurs twice", FIX_KEYS))
            elif (other := self._seen.get(key)) is not None:
                self._shared[other, shard] += 1
                self._first = self._first or key
            mine.add(key)
        self._seen |= dict.fromkeys(mine, shard)
        return problems

    def notes(self) -> list[str]:
        """A line about the keys that several shards have in common."""
        if not self._shared:
            return []
        (one, other), count = self._shared.most_common(1)[0]
        total = self._shared.total()
        first = show_name(self._first)
        return [
            f"{total} keys occur in more than one tar ({first}; {count} in both {one} and "
            f"{other}): all are used, but an export by key keeps only one of each"
        ]


def _take(found: Findings, name: str, report: ShardReport, keys: _Keys) -> None:
    """Add what was found in one shard to what was found before."""
    found.problems += report.problems
    found.num_shards += 1
    if report.survey is not None:
        named = {(problem.key, problem.member) for problem in report.problems}
        lines = report.survey.notes(named)
        found.notes += [f"{name}: {line}" for line in lines]
    if report.index is not None:
        found.num_samples += len(report.index)
        found.problems += keys.of(name, report.index)


def inspect_plain(folder: Path) -> Iterator[tuple[Path, ShardReport]]:
    """Look at every sample of a folder of plain tars, one tar after the other.

    Raises:
        ManifestError: if there are no tars.
    """
    levels: dict[str, LevelInfo] | None = None
    for tar in tars_of(folder):
        report = ShardReport()
        index = _survey(tar, levels, report, plain=True)
        report.index = index
        if index is not None:
            if levels is None:
                levels = levels_of(index, tar.name)
            has_labels = index.labels is not None
            # If all its samples lack a level, that is reported once.
            needed = levels_of(index, tar.name) if report.untouched else levels
            _check_samples(tar, needed, None, has_labels, report)
        yield tar, report


def inspect_shard(source: Source, manifest: Manifest, shard: ShardInfo) -> ShardReport:
    """Reread one shard: its bytes, its index, each of its samples."""
    report = ShardReport()
    try:
        file = source.open(shard.name)
        # Held to the end: the cache of a remote dataset may not evict it meanwhile.
        tar = file.path
        num_bytes = tar.stat().st_size
        report.altered = shard.sha256 is not None and sha256_file(tar) != shard.sha256
    except FileNotFoundError:
        report.missing = True
        report.problems.append(Problem(shard.name, "", "", "the shard is missing", RESTORE))
        return report
    except FetchError as error:
        report.untouched, report.unfit = True, str(error)
        report.problems.append(Problem(shard.name, "", "", report.unfit, RESTORE))
        return report
    except OSError as error:
        _cannot_read(shard.name, error, report)
        return report
    if num_bytes < shard.num_bytes:
        what = f"is cut off: {num_bytes} of {shard.num_bytes} bytes"
        report.problems.append(Problem(shard.name, "", "", what, RESTORE))
    stored = _stored_index(source, shard, report)
    scanned = _survey(tar, manifest.levels, report)
    if stored is not None and report.altered:
        # Its sums tell what the tar held; the tar's headers may have been altered.
        stored = _follow(stored, scanned, tar, report)
        report.index_wrong |= stored is not None and stored.num_bytes != num_bytes
        if stored is not None and scanned is not None:
            _compare_headers(stored, scanned, tar, report)
        if stored is None and scanned is not None:
            _bad_index(report, shard, "does not fit its tar")
    elif stored and scanned and not report.torn and not stored.same_as(scanned):
        _bad_index(report, shard, "does not fit its tar")
        stored = None
    report.index = stored or scanned
    if report.index is None:
        return report
    if len(report.index) != shard.num_samples and stored is None and not report.torn:
        what = f"says {shard.name} has {shard.num_samples} samples, but it has {len(report.index)}"
        report.problems.append(Problem(MANIFEST, "", "", what, FIX_REPAIR))
    _check_samples(tar, manifest.levels, manifest.image_size, manifest.has_labels, report)
    if report.altered and not report.damaged and not report.torn:
        # The sums miss words that were swapped within one member.
        what = f"has a different checksum for {shard.name}, although none of its samples is damaged"
        report.problems.append(Problem(MANIFEST, "", "", what, FIX_CHECKSUM))
    return report


def _stored_index(source: Source, shard: ShardInfo, report: ShardReport) -> ShardIndex | None:
    try:
        index = index_files.load(source.path(index_files.index_name(shard.name)))
    except FileNotFoundError:
        _bad_index(report, shard, "is missing")
        return None
    except (IndexFileError, FetchError) as error:
        _bad_index(report, shard, str(error))
        return None
    if index.num_bytes != shard.num_bytes:
        _bad_index(report, shard, f"is that of a tar of {index.num_bytes} bytes")
        return None
    return index


def _bad_index(report: ShardReport, shard: ShardInfo, what: str) -> None:
    report.index_wrong = True
    name = index_files.index_name(shard.name)
    report.problems.append(Problem(name, "", "", what, FIX_INDEX))


def _survey(
    tar: Path, levels: dict[str, LevelInfo] | None, report: ShardReport, plain: bool = False
) -> ShardIndex | None:
    """Scan a tar; what is wrong with it goes into the report.

    Args:
        tar: its path.
        levels: that it has to have; None if any will do.
        report: receives the problems.
        plain: no manifest says that the tar ever had these levels.
    """
    try:
        found = survey(tar, True, levels, pixels=True, finite=True)
    except OSError as error:
        _cannot_read(tar.name, error, report)
        return None
    report.survey, report.torn = found, found.torn
    report.lost = [f"{show_name(one.key)}: {one.what}" for one in found.problems]
    for one in found.problems:
        report.problems.append(Problem(tar.name, one.key, "", one.what, one.remedy))
    if found.problems and not found.torn:
        report.unfit = str(found.problems[0])
        # The content may be sound.
        report.untouched = found.problems[0].what.startswith("is compressed")
    if found.index is None or levels is None:
        return found.index
    try:
        have = levels_of(found.index, tar.name)
    except ManifestError as error:
        report.problems.append(Problem(tar.name, "", "", str(error), RESTORE))
        return found.index
    if have.keys() != levels.keys():
        what = f"has the levels {', '.join(have) or 'none'}, not {', '.join(levels) or 'none'}"
        remedy = FIX_LEVELS if plain else RESTORE
        report.problems.append(Problem(tar.name, "", "", what, remedy))
        if plain and not found.torn:
            report.unfit, report.untouched = f"{what}; {remedy}", True
    return found.index


def _cannot_read(name: str, error: OSError, report: ShardReport) -> None:
    report.untouched = True
    what = f"cannot be read: {error.strerror or error}"
    report.unfit = f"{what}; {FIX_ACCESS}"
    report.problems.append(Problem(name, "", "", what, FIX_ACCESS))


def _follow(
    stored: ShardIndex, scanned: ShardIndex | None, tar: Path, report: ShardReport
) -> ShardIndex | None:
    """The stored index of an altered tar, with the new offsets of samples that were moved.

    Returns:
        None if none of its samples is in the tar: it is that of another tar.
    """
    if stored.sums is None or scanned is None or scanned.sums is None:
        return stored
    found: dict[tuple[str, str], list[tuple[int, int]]] = {}
    for number, column in enumerate(scanned.columns):
        for row in range(len(scanned)):
            if scanned.offsets[row, number] >= 0:
                found.setdefault((scanned.key(row), column.suffix), []).append((row, number))
    offsets = stored.offsets.copy()
    num_sound = 0
    descriptor = os.open(tar, os.O_RDONLY)
    try:
        for row in range(len(stored)):
            sound, moved = True, False
            for number, column in enumerate(stored.columns):
                if stored.offsets[row, number] < 0:
                    continue
                try:
                    read_member(stored, row, number, tar.name, descriptor)
                    continue
                except CorruptSample:
                    sound = False
                for place in found.get((stored.key(row), column.suffix), []):
                    same_sum = scanned.sums[place] == stored.sums[row, number]
                    if same_sum and scanned.sizes[place] == stored.sizes[row, number]:
                        offsets[row, number] = scanned.offsets[place]
                        sound = moved = True
            num_sound += sound
            if moved:
                what = "is not where its index says: bytes were inserted or lost before it"
                problem = Problem(tar.name, stored.key(row), "", what, FIX_REPAIR)
                report.problems.append(problem)
    finally:
        os.close(descriptor)
    if num_sound == 0 and not report.torn and stored.keys.tolist() != scanned.keys.tolist():
        return None
    if not np.array_equal(offsets, stored.offsets):
        # The tar has to be rewritten: its samples are not where its index says.
        report.torn = True
    return replace(stored, offsets=offsets)


def _compare_headers(
    stored: ShardIndex, scanned: ShardIndex, tar: Path, report: ShardReport
) -> None:
    """Name what other tools will not find in an altered tar, although the index can find it."""
    before = {(fault.row, fault.suffix) for fault in stored.faults}
    rows = {key: row for row, key in enumerate(stored.keys.tolist())}
    for fault in scanned.faults:
        row = rows.get(scanned.keys[fault.row])
        if row is not None and (row, fault.suffix) not in before:
            report.torn = True
            key = scanned.key(fault.row)
            report.problems.append(Problem(tar.name, key, fault.suffix, fault.what, RESTORE))
    if report.torn:
        return
    named = members_of(scanned)
    for key, suffixes in members_of(stored).items():
        for suffix in sorted(suffixes - named.get(key, set())):
            report.torn = True
            what = "no header in the tar names this member"
            report.problems.append(Problem(tar.name, key, suffix, what, RESTORE))


def members_of(index: ShardIndex) -> dict[str, set[str]]:
    """Suffixes of the members of each sample that can be used, by its key."""
    found: dict[str, set[str]] = {}
    for row in range(len(index)):
        mine = found.setdefault(index.key(row), set())
        for column, offset in zip(index.columns, index.offsets[row].tolist(), strict=True):
            if offset != -1:
                mine.add(column.suffix)
    return found


def _check_samples(
    tar: Path,
    levels: dict[str, LevelInfo],
    image_size: int | None,
    has_labels: bool,
    report: ShardReport,
) -> None:
    assert report.index is not None
    index = report.index
    named = {(problem.key, problem.member) for problem in report.problems}
    faults: dict[int, list[tuple[str, str]]] = {}
    for fault in index.faults:
        faults.setdefault(fault.row, []).append((fault.suffix, fault.what))
    descriptor = os.open(tar, os.O_RDONLY)
    try:
        for row in range(len(index)):
            key = index.key(row)
            flaws = faults.get(row, [])
            no_label = index.labels is not None and index.labels[row] == NO_LABEL
            for suffix, what in flaws:
                fatal = _is_needed(suffix, levels) or (has_labels and no_label)
                if suffix in (*LABEL_SUFFIXES, CAPTION_SUFFIX) or fatal:
                    remedy = FIX_SAMPLE if fatal else FIX_META
                    report.problems.append(Problem(tar.name, key, suffix, what, remedy))
                if fatal:
                    report.damaged.setdefault(row, f"{suffix}: {what}")
            try:
                _check_sample(index, row, tar.name, descriptor, levels, image_size)
            except CorruptSample as error:
                if row in report.damaged:
                    continue
                place = f"{error.member}: " if error.member else ""
                report.damaged[row] = f"{place}{error.what}"
                if (error.key, error.member) not in named:
                    problem = Problem(tar.name, error.key, error.member, error.what, RESTORE)
                    report.problems.append(problem)
    finally:
        os.close(descriptor)


def _is_needed(suffix: str, levels: dict[str, LevelInfo]) -> bool:
    return suffix in IMAGE_SUFFIXES or suffix in {level_suffix(name) for name in levels}


def _check_sample(
    index: ShardIndex,
    row: int,
    shard: str,
    descriptor: int,
    levels: dict[str, LevelInfo],
    image_size: int | None,
) -> None:
    """Raise CorruptSample unless a sample can be read, decoded and trained on."""
    key = index.key(row)
    members = {
        column.suffix: read_member(index, row, number, shard, descriptor)
        for number, column in enumerate(index.columns)
        if index.offsets[row, number] != -1
    }
    for name in levels:
        values = members.get(level_suffix(name))
        if not isinstance(values, np.ndarray):
            raise CorruptSample(shard, key, level_suffix(name), "is missing")
        if (what := unusable(values, values.dtype.str)) is not None:
            raise CorruptSample(shard, key, level_suffix(name), what)
    suffix = image_suffix(list(members))
    if suffix is None:
        raise CorruptSample(shard, key, "", "has no image")
    try:
        height, width = decode_image(members[suffix], IMAGE_SUFFIXES[suffix]).shape[:2]
    except ValueError as error:
        raise CorruptSample(shard, key, suffix, str(error)) from error
    if height != width or (image_size is not None and width != image_size):
        needed = f"{image_size}x{image_size}" if image_size else "a square"
        what = f"is {width}x{height}, expected {needed}"
        raise CorruptSample(shard, key, suffix, what)


def _unlisted(data: PackedDataset) -> list[Problem]:
    folder = Path(data.location)
    if "://" in data.location:
        return []
    known = {shard.name for shard in data.manifest.shards}
    what = f"is not in {MANIFEST}"
    remedy = "move it elsewhere, or pack the data again"
    names = sorted(tar.name for tar in folder.glob("*.tar") if not tar.name.startswith("."))
    return [Problem(name, "", "", what, remedy) for name in names if name not in known]


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
                problems.append(Problem(name, "", "", what, FIX_REPAIR))
            elif not np.isclose(variance.mean(dtype=np.float64), data.total_variance(level)):
                what = f"total_variance of {level} is not the mean of its variances"
                problems.append(Problem(MANIFEST, "", "", what, FIX_REPAIR))
    except (ManifestError, FetchError, KeyError, ValueError) as error:
        problems.append(Problem(name, "", "", str(error), FIX_REPAIR))
    return problems
