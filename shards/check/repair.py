"""Rebuilds what can be rebuilt: indexes, shards without their damaged samples, the manifest."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np

from shards.check.adopt import adopt, complete, recount, split_of_name
from shards.check.verify import ShardReport, inspect_plain, inspect_shard, members_of
from shards.errors import IndexFileError, ManifestError, ShardsError, show_name
from shards.files import keep, sha256_file
from shards.format import index as index_files
from shards.format.index import ShardIndex
from shards.format.manifest import (
    MADE_AGAIN,
    MANIFEST,
    STATISTICS,
    Manifest,
    ShardInfo,
    parse_manifest,
)
from shards.format.sample import encode_npy
from shards.format.scan import listed, scan, survey
from shards.read.dataset import Folder
from shards.read.reader import read_member
from shards.write.shard_writer import write_shard

# This many lost samples of a shard are named one by one.
_SHOWN = 20


def rebuild_indexes(folder: Path) -> list[str]:
    """Rebuild the indexes that are missing or wrong; give plain tars a manifest as well.

    Returns:
        One line for each thing done.

    Raises:
        IndexFileError: if a tar is damaged or differs from the manifest.
    """
    if not (folder / MANIFEST).is_file():
        return _adopt(folder)
    try:
        manifest = _manifest(folder)
    except ManifestError as error:
        raise ManifestError(str(error).replace(MADE_AGAIN, "run this command again")) from error
    done = []
    for shard in manifest.shards:
        tar = folder / shard.name
        if not tar.is_file() or sha256_file(tar) != shard.sha256:
            raise IndexFileError(
                f"{tar} is missing or differs from {MANIFEST}; run `dinogen shards verify`"
            )
        name = index_files.index_name(shard.name)
        found = survey(tar, True, manifest.levels, pixels=manifest.image_size is None, finite=True)
        if found.problems or found.index is None:
            raise IndexFileError(f"{tar}: {found.problems[0]}")
        index = found.index
        if not _stored_equals(folder / name, index):
            index_files.save(index, folder / name)
            done.append(f"{name}: rebuilt")
    return done


@dataclass
class RepairPlan:
    """What a repair would do; nothing is changed until `run`.

    Attributes:
        lines: what would be done, and which samples would be lost and why.
        num_lost: samples that would be lost.
        unfit: tars that cannot be repaired, each with its reason and remedy. They stay as they
            are; `run` adds those that it failed on. The others are repaired.
        rewrites: whether a tar would be rewritten or set aside.
    """

    lines: list[str] = field(default_factory=list)
    num_lost: int = 0
    unfit: list[str] = field(default_factory=list)
    rewrites: bool = False
    _steps: list[tuple[str, Callable[[], str]]] = field(default_factory=list)
    _last: Callable[[], list[str]] = list

    def run(self) -> list[str]:
        """Carry it out. A step that fails is added to `unfit`, and the others are done.

        Returns:
            One line for each thing done.
        """
        done = []
        for name, step in self._steps:
            try:
                done.append(step())
            except (ShardsError, OSError) as error:
                self.unfit.append(f"{name}: {error}")
        return done + self._last()

    def add(self, name: str, step: Callable[[], str]) -> None:
        """Plan one more step, for the file of this name."""
        self._steps.append((name, step))

    def refuse(self, name: str, what: str) -> None:
        """Leave a tar as it is that cannot be repaired; `what` is the reason and the remedy."""
        self.unfit.append(f"{name}: {what}")
        self.lines.append(f"{name}: cannot be repaired and is left as it is: {what}")

    def finally_do(self, step: Callable[[], list[str]]) -> None:
        """Plan what comes last."""
        self._last = step

    def lose(self, shard: str, count: int, reasons: Sequence[str]) -> None:
        """Plan to drop samples of a shard."""
        self.num_lost += count
        shown = list(reasons[:_SHOWN])
        if len(reasons) > _SHOWN:
            shown.append(f"and {len(reasons) - _SHOWN} more")
        self.lines += [f"{shard}: {reason}" for reason in shown]


def repair(folder: Path, allow_loss: bool = False) -> list[str]:
    """Make a damaged dataset usable again; see `plan_repair`.

    Args:
        folder: of the dataset.
        allow_loss: go on although samples that cannot be read are dropped from the dataset.

    Returns:
        One line for each thing done.

    Raises:
        ManifestError: if there is no dataset, nothing of it is left, or samples would be lost;
            after the repair of the others, if some tars cannot be repaired.
    """
    plan = plan_repair(folder)
    if plan.num_lost and not allow_loss:
        raise ManifestError(f"{folder}: {plan.num_lost} samples would be lost; nothing was changed")
    done = plan.run()
    if plan.unfit:
        raise ManifestError("\n".join(plan.unfit))
    return done


def plan_repair(folder: Path) -> RepairPlan:
    """Find out what has to be done to make a damaged dataset usable again.

    Shards with damaged samples or headers are rewritten without what cannot be read; missing
    ones are removed from the manifest; indexes, checksums, counts and statistics are corrected.
    Every tar that is rewritten or set aside is kept as `NAME.tar.before-repair`. A tar that this
    would not help is left as it is, and does not stop the repair of others.

    Raises:
        ManifestError: if there is no dataset, or nothing of it would be left.
    """
    if not (folder / MANIFEST).is_file():
        return _plan_plain(folder)
    manifest = _manifest(folder)
    plan = RepairPlan()
    kept: dict[str, ShardInfo] = {}
    for shard in manifest.shards:
        _plan_shard(folder, manifest, shard, plan, kept)
    if not any(shard.split == "train" for shard in kept.values()):
        raise ManifestError(
            f"{folder}: no sample of the train split is left; restore the folder from a copy"
        )

    def finish() -> list[str]:
        shards = tuple(kept[shard.name] for shard in manifest.shards if shard.name in kept)
        done = []
        if plan.num_lost:
            copy = keep(folder / MANIFEST)
            done.append(f"{MANIFEST}: kept as {copy.name}, because it names what was lost")
        if plan.unfit:
            if recount(folder, manifest, shards) != manifest:
                done.append(
                    f"{MANIFEST}: shards and counts updated; statistics stay as they are until "
                    "the other tars are repaired"
                )
            return done
        repaired = complete(folder, manifest.model_copy(update={"shards": shards}))
        if repaired != manifest:
            done.append(f"{MANIFEST}: shards, counts and statistics updated")
        return done

    plan.finally_do(finish)
    return plan


def _plan_shard(
    folder: Path,
    manifest: Manifest,
    shard: ShardInfo,
    plan: RepairPlan,
    kept: dict[str, ShardInfo],
) -> None:
    """Plan what a shard needs; `kept` receives its new entry in the manifest."""
    report = inspect_shard(Folder(folder), manifest, shard)
    tar, index_path = folder / shard.name, folder / index_files.index_name(shard.name)
    if report.missing:
        reason = f"the shard is missing, with {shard.num_samples} samples"
        plan.lose(shard.name, shard.num_samples, [reason])

        def drop() -> str:
            _set_aside(index_path)
            return f"{shard.name}: missing, removed from {MANIFEST}"

        plan.add(shard.name, drop)
        return
    # A file that the system cannot read now may be sound. One with faults other than damage gets
    # no new index, and dropping samples of it would not help.
    not_ours = report.unfit is not None and report.index is not None and report.index_wrong
    if report.unfit is not None and (report.untouched or (not_ours and not report.torn)):
        kept[shard.name] = shard
        plan.refuse(shard.name, report.unfit)
        return
    sound = _sound_rows(report)
    if report.index is None or not sound:
        reasons = [f"none of its {shard.num_samples} samples can be read", *_reasons(report)]
        plan.lose(shard.name, shard.num_samples, reasons)
        plan.rewrites = True
        plan.add(shard.name, lambda: _set_tar_aside(tar))
        return
    index = report.index
    kept[shard.name] = shard
    if report.torn or report.damaged:
        plan.rewrites = True
        lost = max(shard.num_samples - len(sound), 0)
        left_out = _left_out(report, sound)
        _announce(plan, shard.name, lost, len(sound), report, left_out)

        def rewrite() -> str:
            kept[shard.name], line = _rewrite(tar, shard.split, index, sound, lost, left_out)
            return line

        plan.add(shard.name, rewrite)
        return
    num_samples = len(index)
    if report.index_wrong:
        plan.lines.append(f"{index_path.name}: will be rebuilt")

        def rebuild() -> str:
            found = scan(tar, with_sums=True, levels=manifest.levels)
            index_files.save(found, index_path)
            kept[shard.name] = _described(tar, shard, len(found))
            return f"{index_path.name}: rebuilt"

        plan.add(shard.name, rebuild)
    kept[shard.name] = _described(tar, shard, num_samples)


def _described(tar: Path, shard: ShardInfo, num_samples: int) -> ShardInfo:
    return shard.model_copy(
        update={
            "num_samples": num_samples,
            "num_bytes": tar.stat().st_size,
            "sha256": sha256_file(tar),
        }
    )


def _sound_rows(report: ShardReport) -> list[int]:
    return [row for row in range(len(report.index or ())) if row not in report.damaged]


def _reasons(report: ShardReport) -> list[str]:
    """Why samples of a shard would be lost, one line each."""
    reasons = list(report.lost)
    if report.index is not None:
        name = report.index.key
        reasons += [f"{show_name(name(row))}: {what}" for row, what in report.damaged.items()]
    return reasons


def _left_out(report: ShardReport, rows: list[int]) -> str:
    """The entries that a rewritten tar will not have, without losing a sample; or ""."""
    index, found = report.index, report.survey
    assert index is not None
    names = []
    faults = {(fault.row, fault.suffix): fault.what for fault in index.faults}
    stored = members_of(index)
    in_tar = members_of(found.index) if found is not None and found.index is not None else {}
    for row in rows:
        key = index.key(row)
        for number, column in enumerate(index.columns):
            member = show_name(f"{key}.{column.suffix}")
            if index.offsets[row, number] != -1:
                if not _can_be_written(column.suffix):
                    names.append(member)
            elif (what := faults.get((row, column.suffix))) is not None:
                names.append(f"{member} ({what})")
        # What was added to the tar after it was packed.
        unknown = in_tar.get(key, set()) - stored.get(key, set())
        names += [show_name(f"{key}.{suffix}") for suffix in sorted(unknown)]
    links = []
    if found is not None:
        names += found.not_needed
        links = found.link_counts()
    parts = [f"{len(names)} not needed by any sample ({listed(names)})"] if names else []
    return " and ".join(parts + ([", ".join(links)] if links else []))


def _announce(
    plan: RepairPlan,
    name: str,
    num_lost: int,
    num_sound: int,
    report: ShardReport,
    left_out: str,
) -> None:
    plan.lines.append(
        f"{name}: will be rewritten with {num_sound} samples, {num_lost} will be lost"
    )
    if left_out:
        plan.lines.append(f"{name}: entries that will be left out: {left_out}")
    plan.lose(name, num_lost, _reasons(report))


def _rewrite(
    tar: Path, split: str, index: ShardIndex, rows: list[int], num_lost: int, left_out: str
) -> tuple[ShardInfo, str]:
    """Rewrite a tar with some of its samples; the original is kept first."""
    copy = keep(tar)
    info, _ = write_shard(tar, split, _members(copy, index, rows))
    line = (
        f"{tar.name}: rewritten with {info.num_samples} samples, {num_lost} lost; "
        f"the original is kept as {copy.name}"
    )
    if left_out:
        line += f"; entries left out: {left_out}"
    return info, line


def _set_tar_aside(tar: Path) -> str:
    copy = keep(tar)
    tar.unlink()
    _set_aside(tar.with_name(index_files.index_name(tar.name)))
    return f"{tar.name}: no sample can be read; kept as {copy.name}"


def _set_aside(path: Path) -> None:
    """Remove a file that is no longer used, and keep its content under another name."""
    if path.is_file():
        keep(path)
        path.unlink()


def _plan_plain(folder: Path) -> RepairPlan:
    plan = RepairPlan()
    unusable = []
    num_left = 0
    for tar, report in inspect_plain(folder):
        sound = _sound_rows(report)
        if report.unfit is not None and (report.untouched or (report.index is not None and sound)):
            # Its samples are there, but not as they should be: dropping some would not help.
            plan.refuse(tar.name, report.unfit)
            continue
        if not sound or report.index is None:
            what = report.unfit or "none of its samples can be read"
            unusable.append((tar, what, len(report.index or ()) + _num_lost(report)))
            continue
        num_left += len(sound)
        if report.torn or report.damaged:
            _plan_rewrite(tar, report, sound, plan)
    if not num_left:
        why = [f"{folder / line}" for line in plan.unfit] + [
            f"{tar}: {what}" for tar, what, _ in unusable
        ]
        raise ManifestError("\n".join(why))
    for tar, what, count in unusable:
        # How many samples it held may be unknown; it held at least one.
        plan.lose(tar.name, max(count, 1), [f"{what}; it will be set aside"])
        plan.rewrites = True
        plan.add(tar.name, partial(_set_tar_aside, tar))
    if plan.unfit:
        plan.lines.append(f"{MANIFEST}: cannot be made until every tar can be read")
    else:
        plan.lines.append(f"{MANIFEST}: will be made from the tars, with their indexes")
    plan.finally_do(lambda: [] if plan.unfit else _adopt(folder))
    return plan


def _plan_rewrite(tar: Path, report: ShardReport, sound: list[int], plan: RepairPlan) -> None:
    assert report.index is not None
    index = report.index
    gone = _cut_off(tar, report)
    report.lost += [f"{show_name(key)}: was in the part that is cut off" for key in gone]
    lost = len(index) - len(sound) + max(_num_lost(report), len(gone))
    plan.rewrites = True
    left_out = _left_out(report, sound)
    _announce(plan, tar.name, lost, len(sound), report, left_out)
    split = split_of_name(tar.name)
    plan.add(tar.name, lambda: _rewrite(tar, split, index, sound, lost, left_out)[1])


def _num_lost(report: ShardReport) -> int:
    """Samples of a plain tar that are not in its index: a lost file may have been a sample."""
    found = report.survey
    return 0 if found is None else max(len(found.lost), found.num_holes)


def _cut_off(tar: Path, report: ShardReport) -> list[str]:
    """Keys that were in the lost end of a tar, if an index from before the cut exists."""
    found = report.survey
    if found is None or found.index is None or not found.torn:
        return []
    try:
        before = index_files.load(tar.with_name(index_files.index_name(tar.name)))
    except (OSError, IndexFileError):
        return []
    keys, left = before.keys.tolist(), found.index.keys.tolist()
    # The index of another tar that once had this name does not help.
    if before.num_bytes <= found.index.num_bytes or keys[: len(left)] != left:
        return []
    return [before.key(row) for row in range(len(left), len(keys))]


def _adopt(folder: Path) -> list[str]:
    manifest, notes = adopt(folder)
    count = len(manifest.shards)
    tars = (
        "1 plain tar, with its index" if count == 1 else f"{count} plain tars, with their indexes"
    )
    done = [f"{MANIFEST}: made from {tars}"]
    if manifest.guide:
        done.append(f"{MANIFEST}: guide and prepare taken from {STATISTICS}")
    elif manifest.levels:
        done.append(f"{MANIFEST}: guide is empty: nothing here says which guide made the levels")
    return done + notes


def _members(
    tar: Path, index: ShardIndex, rows: list[int]
) -> Iterator[tuple[str, dict[str, bytes]]]:
    """(key, members) of some rows, as stored in the tar."""
    descriptor = os.open(tar, os.O_RDONLY)
    try:
        for row in rows:
            members = {}
            for number, column in enumerate(index.columns):
                if index.offsets[row, number] == -1 or not _can_be_written(column.suffix):
                    continue
                data = read_member(index, row, number, tar.name, descriptor)
                # No checksum covers the header in the tar, so it is rewritten.
                is_level = isinstance(data, np.ndarray)
                members[column.suffix] = encode_npy(data) if is_level else data
            yield index.key(row), members
    finally:
        os.close(descriptor)


def _can_be_written(suffix: str) -> bool:
    """webdataset's writer keeps names like `__key__` for itself, and needs a suffix."""
    return suffix[:1] not in ("", "_")


def _manifest(folder: Path) -> Manifest:
    path = folder / MANIFEST
    return parse_manifest(path.read_bytes(), str(path), counted=False)


def _stored_equals(path: Path, index: ShardIndex) -> bool:
    try:
        return index_files.load(path).same_as(index)
    except (FileNotFoundError, IndexFileError):
        return False
