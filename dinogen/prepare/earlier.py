"""Earlier preparations of a dataset: finished, unfinished, or to be replaced by a new one."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import isclose
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from dinogen.config import PackConfig
from dinogen.prepare.faces.crop import Crop, Rejection
from dinogen.prepare.faces.folder import REJECTED, FaceFolder, read_rejected
from dinogen.prepare.faces.settings import current_settings, locked, removed_at_end
from dinogen.prepare.parts import change_of, changes_of_guides, network_of
from dinogen.prepare.photos.changed import (
    PHOTOS,
    FileRecord,
    caption_record,
    changes_since,
    looks_like_an_accident,
    read_photos,
)
from dinogen.prepare.photos.find import Photos, counted, face_number, named
from dinogen.prepare.photos.read import PrepareError
from dinogen.prepare.photos.summary import SUMMARY, FacesSummary, summary_of
from shards import open_dataset
from shards.errors import PackError
from shards.files import is_locked, sum64
from shards.format.index import ShardIndex, index_name
from shards.format.index import load as load_index
from shards.format.manifest import MANIFEST, PACKING, Manifest

_logger = logging.getLogger(__name__)


def begun_with(out: Path) -> dict[str, Any]:
    """The preparation settings of a dataset in ``out``, finished or not; empty if there is none.

    A damaged file counts as none: the code that uses it reports the damage.
    """
    for name, holder in ((MANIFEST, None), (PACKING, "settings")):
        try:
            found = json.loads((out / name).read_bytes())
            prepare = (found[holder] if holder else found)["prepare"]
        except (OSError, ValueError, KeyError, TypeError):
            continue
        return prepare if isinstance(prepare, dict) else {}
    return {}


def finished_dataset(
    out: Path,
    config: PackConfig,
    made_by: Mapping[str, dict[str, Any]],
    prepare: dict[str, Any],
    classes: Sequence[str] = (),
) -> Manifest | None:
    """The manifest of the finished dataset in ``out``; None if there is none yet.

    A dataset with pyramids is accepted if none are requested, one with more guides if fewer are,
    and one with those of mirrored images if only the others are.

    Args:
        out: folder of the dataset.
        config: requested shards and splits.
        made_by: networks that would make the features, as from ``PyramidMaker.identity``.
        prepare: requested settings, as in a manifest.
        classes: names of the classes.

    Raises:
        PrepareError: it was made with other guides or settings, which the message names.
        ShardsError: its manifest cannot be read.
    """
    if not (out / MANIFEST).is_file():
        return None
    manifest = open_dataset(out).manifest
    made_with, requested = (
        settings | {"faces": current_settings(settings.get("faces", {}))}
        for settings in (manifest.prepare, json.loads(json.dumps(prepare)))
    )
    if "pyramids" not in prepare:
        made_with.pop("pyramids", None)
    elif "flips" not in prepare["pyramids"] and "pyramids" in made_with:
        own = made_with["pyramids"]
        made_with["pyramids"] = {key: value for key, value in own.items() if key != "flips"}
    changed = [*_changed("prepare", made_with, requested)]
    if manifest.classes != tuple(classes):
        changed.append(f"classes: {_listed(manifest.classes)}, now {_listed(classes)}")
    changed += _other_networks(manifest, made_by)
    wanted = {
        "train": 1.0 - config.val_fraction - config.test_fraction,
        "val": config.val_fraction,
        "test": config.test_fraction,
    }
    for split, info in manifest.splits.items():
        # A split without samples is not in the manifest, but then the other fractions differ.
        if info.fraction is not None and not isclose(info.fraction, wanted[split], abs_tol=1e-9):
            changed.append(f"fraction of {split}: {info.fraction:g}, now {wanted[split]:g}")
        sizes = [shard.num_samples for shard in manifest.of_split(split)]
        # The last shard of a split is smaller, and repaired ones may be.
        most, full = max(sizes), config.shard_size
        if most > full or (len(sizes) > 1 and most < full):
            changed.append(f"prepare.pack.shard_size: {most}, now {full}")
            break
    if changed:
        raise _differs(out, "; ".join(changed))
    return manifest


def finished_summary(src: Path, out: Path, photos: Photos, with_captions: bool) -> FacesSummary:
    """The summary of the photos of a finished dataset.

    Args:
        src: folder of the photos.
        out: folder of the dataset.
        photos: what is in ``src`` now.
        with_captions: whether captions are read.

    Raises:
        PrepareError: the dataset was made of other photos than those in ``src``.
    """
    started = time.monotonic()
    path = out / SUMMARY
    summary = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    keys, there = keys_of(out), {photo.key: photo.source for photo in photos.photos}
    before = read_photos(out / PHOTOS)
    if before is not None:
        if changes := changes_since(before, photos, with_captions):
            raise _differs(out, f"the photos have changed: {changes}", again=True)
    else:
        num_photos = summary.get("num_photos", len(photos.photos))
        if num_photos != len(photos.photos):
            raise _differs(
                out, f"photos: {num_photos}, now {len(photos.photos)} in {src}", again=True
            )
        newer = [p.source for p in photos.photos if _time(p.path) > _time(out / MANIFEST)]
        if newer:
            _logger.warning(
                "%s: %s newer than the dataset, which an earlier version made without a list of "
                "its photos (%s): if any were replaced, add --repack to make the dataset again",
                out,
                counted(len(newer), "photo", "is", "are"),
                named(newer),
            )
    used = set()
    for key in sorted(keys):
        # The second, third, ... face of a photo is KEY_1, KEY_2, ...
        own = key if key in there or not face_number(key) else key.rpartition("_")[0]
        if own in there:
            used.add(there[own])
        elif before is None:
            raise _differs(out, f"the photo of {key} is not in {src}", again=True)
    rejected = summary.get("rejected", {})
    return summary_of(
        photos,
        used,
        (reason for reason, count in rejected.items() for _ in range(count)),
        with_captions=with_captions,
        num_skipped=len(photos.photos),
        num_crops=len(keys),
        num_new=0,
        seconds=time.monotonic() - started,
    )


def keys_of(data: Path) -> set[str]:
    """Keys of all samples of a dataset; if it is unfinished, of the samples in whole shards."""
    return {key for key, _ in _rows_of(data)}


def check_faces(out: Path, faces: FaceFolder, sources: Mapping[str, str]) -> None:
    """Make sure that a dataset, finished or not, was packed from the faces as they are now.

    Args:
        out: folder of the dataset.
        faces: the folder that was packed.
        sources: by the key of each face, in order, the photo that it comes from, or "".

    Raises:
        PrepareError: faces were removed or replaced, or a finished dataset lacks new ones; the
            message names them.
    """
    if not (out / MANIFEST).is_file() and not (out / PACKING).is_file():
        return
    rows = dict(_rows_of(out))
    left_out = {line.source for line in read_rejected(out / REJECTED)}
    removed = sorted(rows.keys() - sources.keys())
    added, replaced = [], []
    for number, (key, face) in enumerate(zip(sources, faces.faces, strict=True)):
        if key not in rows:
            if (sources[key] or key) not in left_out or _time(face.path) > _time(out / REJECTED):
                added.append(key)
        elif _is_another(faces, number, *rows[key]):
            replaced.append(key)
    found = {"removed": removed, "replaced": replaced}
    if (out / MANIFEST).is_file():
        found["new"] = added
    changes = ", ".join(
        f"{len(names)} {what} ({named(names)})" for what, names in found.items() if names
    )
    if changes:
        raise _differs(out, f"the faces have changed: {changes}", again=True)


def _is_another(
    faces: FaceFolder, number: int, index_path: Path, index: ShardIndex, row: int
) -> bool:
    """Whether a face differs from what was packed; only faces that may differ are read."""
    path = faces.faces[number].path
    columns = [n for n in map(index.column, ("jpg", "png", "jpeg", "webp")) if n is not None]
    column = next((n for n in columns if index.offsets[row, n] >= 0), None)
    if column is None:
        return True
    size = int(index.sizes[row, column])
    if path.stat().st_size == size and _time(path) <= _time(index_path):
        return False
    item = next(faces.read([number], with_captions=False))
    if isinstance(item, Rejection):
        return True
    same_sum = index.sums is None or int(index.sums[row, column]) == sum64(item.image)
    return len(item.image) != size or not same_sum


def _rows_of(out: Path) -> Iterator[tuple[str, tuple[Path, ShardIndex, int]]]:
    """Key of each sample in whole shards, and its row in the index."""
    if (out / MANIFEST).is_file():
        shards = [shard.name for shard in open_dataset(out).manifest.shards]
    elif (out / PACKING).is_file():
        shards = [shard["name"] for shard in json.loads((out / PACKING).read_bytes())["shards"]]
    else:
        shards = []
    for name in shards:
        path = out / index_name(name)
        index = load_index(path)
        for row in range(len(index)):
            yield index.key(row), (path, index, row)


def _time(path: Path) -> int:
    """When a file was last changed, in ns; 0 if there is none."""
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return 0


def _changed(name: str, old: Any, new: Any) -> list[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        return [
            line
            for key in {**old, **new}
            for line in _changed(f"{name}.{key}", old.get(key), new.get(key))
        ]
    return [] if old == new else [change_of(name, old, new)]


def _other_networks(manifest: Manifest, made_by: Mapping[str, dict[str, Any]]) -> list[str]:
    guide, guides, clip = made_by["guide"], made_by["guides"], made_by["clip"]
    wanted = {"": guide, **guides} if guide and manifest.levels else guides
    found = {name: manifest.guides.get(name, {}) if name else manifest.guide for name in wanted}
    changed = changes_of_guides(found, wanted, _label)
    if clip and network_of(manifest.clip) != network_of(clip):
        changed.append(f"clip: {manifest.clip.get('path', 'none')}, now {clip.get('path')}")
    return changed


def _listed(classes: Sequence[str]) -> str:
    return ", ".join(classes) or "none"


def _label(guide: dict[str, Any]) -> str:
    if not guide:
        return "none"
    return f"{guide.get('name')} ({guide.get('path')}) layer {guide.get('layer')}"


def _differs(out: Path, what: str, again: bool = False) -> PrepareError:
    """The error for a folder that holds another dataset.

    Args:
        out: the folder.
        what: differs.
        again: whether --repack can make the dataset again in its place.
    """
    if not (out / MANIFEST).is_file():
        return PrepareError(
            f"{out}: holds an unfinished dataset that was made differently ({what}): delete it to "
            "start again, or choose another folder"
        )
    remedy = (
        "add --repack to make it again, or choose another folder"
        if again
        else "choose another folder, or delete this one"
    )
    return PrepareError(
        f"{out}: holds a finished dataset that was made differently ({what}): {remedy}"
    )


JOURNAL = "prepare.jsonl"
_FORMAT = "dinogen-journal"


@dataclass
class Outcome:
    """One photo that was processed.

    Attributes:
        source: its path relative to the folder searched.
        hashes: per crop, key and perceptual hash (16 hex digits; None if none was computed).
        rejected: reason and detail of each face, or of the photo, that is not used.
        file: identifies the photo's file, see
            :func:`dinogen.prepare.photos.changed.record_of`; None if an older version wrote it.
        caption: identifies the caption of its crops, see
            :func:`dinogen.prepare.photos.changed.caption_record`; None as for ``file``.
    """

    source: str
    hashes: dict[str, str | None] = field(default_factory=dict)
    rejected: list[tuple[str, str]] = field(default_factory=list)
    file: FileRecord | None = None
    caption: str | None = None


class Journal:
    """One line per photo, appended once the photo is done; an incomplete last line is dropped.

    Shards hold what was accepted, but not which photos were rejected; without the journal each
    resumed run would detect faces in those again. Use it as a context manager.

    Args:
        path: the file; created, or continued if an interrupted run left it.
        src: folder of the photos.

    Attributes:
        outcomes: by the photo's source; the latest one counts.

    Raises:
        PrepareError: the file belongs to other photos, or is damaged before its last line.
    """

    def __init__(self, path: Path, src: Path) -> None:
        self.outcomes: dict[str, Outcome] = {}
        self._path = path
        header = {"format": _FORMAT, "src": str(src.resolve())}
        whole = b""
        if path.exists():
            data = path.read_bytes()
            whole = data[: data.rfind(b"\n") + 1]
        if whole:
            self._load(whole.splitlines(), header)
        self._file = path.open("r+b" if path.exists() else "w+b")
        self._file.truncate(len(whole))
        self._file.seek(len(whole))
        if not whole:
            self._append(header)

    def record(self, items: Iterable[Crop | Rejection]) -> Iterator[Crop]:
        """Pass crops on and record each photo's outcome when it is complete.

        Args:
            items: crops and rejections; those of one photo are consecutive.
        """
        current: Outcome | None = None
        for item in items:
            source = item.source if isinstance(item, Rejection) else item.meta["source"]
            if current is None or current.source != source:
                if current is not None:
                    self._write(current)
                current = Outcome(source, file=item.file)
            if isinstance(item, Rejection):
                current.rejected.append((item.reason, item.detail))
            else:
                current.hashes[item.key] = item.meta.get("phash")
                current.caption = caption_record(item.caption)
                yield item
        if current is not None:
            self._write(current)

    def remove(self) -> None:
        """Delete the file: the preparation is finished."""
        self._path.unlink()

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()

    def _load(self, lines: list[bytes], header: dict[str, str]) -> None:
        try:
            found, *outcomes = (json.loads(line) for line in lines)
            if found != header:
                raise PrepareError(
                    f"{self._path}: belongs to an unfinished preparation of other photos "
                    f"({found.get('src')}): continue with those, or delete {self._path.parent}"
                )
            for values in outcomes:
                outcome = Outcome(
                    values["source"],
                    values["hashes"],
                    [(r, d) for r, d in values["rejected"]],
                    values.get("file"),
                    values.get("caption"),
                )
                self.outcomes[outcome.source] = outcome
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise PrepareError(
                f"{self._path}: damaged ({error}): delete it; photos that were rejected are then "
                "processed again"
            ) from error

    def _write(self, outcome: Outcome) -> None:
        self.outcomes[outcome.source] = outcome
        self._append(vars(outcome))

    def _append(self, value: object) -> None:
        self._file.write(json.dumps(value).encode() + b"\n")
        self._file.flush()


_OURS = frozenset({MANIFEST, PACKING, PHOTOS, REJECTED, SUMMARY, JOURNAL, "stats.safetensors"})
_SHARD = re.compile(r"(train|val|test)-[0-9]{5,}\.(tar|index\.npz)|\..*\.tmp|\.packing\.lock")

T = TypeVar("T")


def repack(out: Path, work: Callable[[Path], T]) -> T:
    """Pack into a hidden folder beside ``out`` that replaces ``out`` when it is complete.

    Until then ``out`` stays as it is, and after a kill the same call continues, or starts again if
    the unfinished folder does not fit any more. Only files that dinogen wrote are removed from the
    older dataset. If most of its samples are not in the new one, nothing is removed and it is kept
    as ``OUT.before-repack``.

    Args:
        out: folder of a dataset, finished or not, that was packed from faces or photos.
        work: packs into the folder that it is called with.

    Raises:
        PrepareError: ``out`` holds something else or cannot be renamed, or another process is
            repacking it; ``out`` is unchanged.
    """
    target = out.resolve()
    fresh = target.with_name(f".{target.name}.repack")
    before = target.with_name(f"{target.name}.before-repack")
    if _is_mounted(target):
        raise PrepareError(
            f"{out}: is a mount point, so no other folder can replace it: pack into a new folder "
            "inside it or elsewhere"
        )
    with _exclusive(out, target.with_name(f".{target.name}.repack.lock")):
        if before.exists() and not target.exists():
            before.rename(target)  # killed between the two renames of _swap
            _logger.warning("%s: moved back from %s after an interruption", out, before)
        if before.exists():
            raise PrepareError(
                f"{before}: already exists, from an earlier --repack: move it elsewhere, or delete "
                "it"
            )
        _check_ours(out)
        is_stale = fresh.is_dir() and any(fresh.iterdir())
        if is_stale:
            _logger.warning("%s: continuing an earlier --repack that was interrupted", fresh)
        try:
            result = work(fresh)
        except (PrepareError, PackError) as error:
            if not is_stale or is_locked(fresh / ".packing.lock"):
                raise
            _logger.warning("%s: does not fit any more (%s): removed, starting again", fresh, error)
            shutil.rmtree(fresh)
            result = work(fresh)
        if (fresh / MANIFEST).is_file():
            _swap(out, target, fresh, before)
    return result


def warn_of_interrupted(out: Path) -> None:
    """Warn if an earlier --repack of ``out`` was interrupted."""
    target = out.resolve()
    fresh = target.with_name(f".{target.name}.repack")
    before = target.with_name(f"{target.name}.before-repack")
    if before.exists() and not target.exists():
        _logger.warning(
            "%s: was left in %s by an interrupted --repack: rename it back", out, before
        )
    if fresh.exists() and not is_locked(fresh.with_name(f"{fresh.name}.lock")):
        _logger.warning(
            "%s: left by an interrupted --repack: add --repack to continue it, or delete it",
            fresh,
        )


def _swap(out: Path, target: Path, fresh: Path, before: Path) -> None:
    """Replace the dataset in ``target`` by the finished one in ``fresh``."""
    if not target.exists():
        fresh.rename(target)
        return
    old_keys, new_keys = keys_of(target), keys_of(fresh)
    try:
        target.rename(before)
    except OSError as error:
        raise PrepareError(
            f"{out}: cannot be renamed ({error.strerror}), so it is unchanged. The new dataset is "
            f"complete in {fresh}: move it where you need it"
        ) from None
    try:
        fresh.rename(target)
    except OSError as error:
        before.rename(target)
        raise PrepareError(
            f"{fresh}: cannot be renamed to {target} ({error.strerror}), which is unchanged. "
            f"The new dataset is complete in {fresh}: move it where you need it"
        ) from None
    num_gone = len(old_keys - new_keys)
    if looks_like_an_accident(num_gone, len(old_keys)):
        _logger.warning(
            "%s: %d of %s of the previous dataset are not in the new one. The previous one is kept "
            "in %s: delete it if you do not need it",
            out,
            num_gone,
            counted(len(old_keys), "sample"),
            before,
        )
        return
    for path in list(before.iterdir()):
        if path.name in _OURS or _SHARD.fullmatch(path.name):
            path.unlink()
        elif not (target / path.name).exists():
            path.rename(target / path.name)
    if any(before.iterdir()):
        _logger.warning("%s: holds other files from the folder of the previous dataset", before)
    else:
        before.rmdir()
    _logger.info(
        "%s: packed again: %d samples added, %d removed", out, len(new_keys - old_keys), num_gone
    )


@contextmanager
def _exclusive(out: Path, path: Path) -> Iterator[None]:
    """Keep other processes from repacking the same dataset; the lock ends with its process."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        file = locked(path, f"{out}: another process is repacking it: wait until it has ended")
    except OSError as error:
        raise PrepareError(
            f"{path.parent}: cannot be written ({error.strerror}), but the new dataset is made "
            f"there before it replaces {out}: pack into a new folder elsewhere"
        ) from None
    with file, removed_at_end(path):
        yield


def _is_mounted(folder: Path) -> bool:
    """Whether a folder is a mount point, bind mounts included."""
    if folder.is_mount():
        return True
    try:
        lines = Path("/proc/self/mountinfo").read_bytes().splitlines()
    except OSError:  # not Linux
        return False
    wanted = os.fsencode(folder)
    return any(
        re.sub(rb"\\([0-7]{3})", lambda m: bytes([int(m[1], 8)]), line.split()[4]) == wanted
        for line in lines
    )


def _check_ours(out: Path) -> None:
    """Raise PrepareError unless ``out`` is missing, empty or a dataset packed from photos."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if "faces" not in begun_with(out):
        raise PrepareError(
            f"{out}: was not packed from photos or faces, so it cannot be packed again: choose "
            "another folder"
        )
