"""Whether a folder holds the finished dataset that is asked for, or another one."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from math import isclose
from pathlib import Path
from typing import Any

from dinogen.config.prepare import PackConfig
from dinogen.features.base import guide_identity
from dinogen.prepare.faces.crop import Rejection
from dinogen.prepare.faces.folder import REJECTED, FaceFolder, read_rejected
from dinogen.prepare.faces.settings import todays_settings
from dinogen.prepare.parts import network_of
from dinogen.prepare.photos.changed import PHOTOS, changes_since, read_photos
from dinogen.prepare.photos.find import Photos, counted, face_number, named
from dinogen.prepare.photos.read import PrepareError
from dinogen.prepare.photos.summary import SUMMARY, FacesSummary, summary_of
from shards import open_dataset
from shards.files import sum64
from shards.format.index import ShardIndex, index_name
from shards.format.index import load as load_index
from shards.format.manifest import MANIFEST, PACKING, Manifest

_logger = logging.getLogger(__name__)


def begun_with(out: Path) -> dict[str, Any]:
    """What a dataset in ``out``, finished or not, says about its preparation; empty if none does.

    What is damaged says nothing: whoever takes it up tells it.
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

    One with pyramids does where none are asked for, and one with more guides where fewer are.

    Args:
        out: folder of the dataset.
        config: shards and splits asked for.
        made_by: who would make the features, as ``PyramidMaker.identity`` says it.
        prepare: settings asked for, as the manifest says them.
        classes: names of the classes.

    Raises:
        PrepareError: it was made with other guides or settings; naming them.
        ShardsError: its manifest cannot be read.
    """
    if not (out / MANIFEST).is_file():
        return None
    manifest = open_dataset(out).manifest
    made_with, asked_for = (
        said | {"faces": todays_settings(said.get("faces", {}))}
        for said in (manifest.prepare, json.loads(json.dumps(prepare)))
    )
    if "pyramids" not in prepare:
        made_with.pop("pyramids", None)
    changed = [*_changed("prepare", made_with, asked_for)]
    if manifest.classes != tuple(classes):
        changed.append(f"classes: {_listed(manifest.classes)}, now {_listed(classes)}")
    changed += _other_networks(manifest, made_by)
    wanted = {
        "train": 1.0 - config.val_fraction - config.test_fraction,
        "val": config.val_fraction,
        "test": config.test_fraction,
    }
    for split, info in manifest.splits.items():
        # A split that got no sample is not in the manifest, but then the others' shares tell.
        if info.fraction is not None and not isclose(info.fraction, wanted[split], abs_tol=1e-9):
            changed.append(f"share of {split}: {info.fraction:g}, now {wanted[split]:g}")
        sizes = [shard.num_samples for shard in manifest.of_split(split)]
        # The last shard of a split is smaller, and repaired ones may be.
        most, full = max(sizes), config.shard_size
        if most > full or (len(sizes) > 1 and most < full):
            changed.append(f"prepare.pack.shard_size: {most}, now {full}")
            break
    if changed:
        raise _other(out, "; ".join(changed))
    return manifest


def finished_summary(src: Path, out: Path, photos: Photos, with_captions: bool) -> FacesSummary:
    """What became of the photos of a finished dataset.

    Args:
        src: folder of the photos.
        out: folder of the dataset.
        photos: what lies in ``src`` now.
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
            raise _other(out, f"the photos have changed: {changes}", again=True)
    else:
        num_photos = summary.get("num_photos", len(photos.photos))
        if num_photos != len(photos.photos):
            raise _other(
                out, f"photos: {num_photos}, now {len(photos.photos)} in {src}", again=True
            )
        newer = [p.source for p in photos.photos if _time(p.path) > _time(out / MANIFEST)]
        if newer:
            _logger.warning(
                "%s: %s newer than the dataset, which an earlier version made without a list of "
                "its photos (%s): if any were replaced, add --repack to make it again",
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
            raise _other(out, f"the photo of {key} is not in {src}", again=True)
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
    """Keys of all samples of a dataset; of an unfinished one, of those in whole shards."""
    return {key for key, _ in _rows_of(data)}


def check_faces(out: Path, faces: FaceFolder, sources: Mapping[str, str]) -> None:
    """Make sure that a dataset, finished or not, was packed from the faces as they are now.

    Args:
        out: folder of the dataset.
        faces: the folder that was packed.
        sources: by the key of each face, in order, the photo that it comes from, or "".

    Raises:
        PrepareError: faces of it were removed or replaced, or there are new ones in a finished
            one; naming them.
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
    said = ", ".join(
        f"{len(names)} {what} ({named(names)})" for what, names in found.items() if names
    )
    if said:
        raise _other(out, f"the faces have changed: {said}", again=True)


def _is_another(
    faces: FaceFolder, number: int, index_path: Path, index: ShardIndex, row: int
) -> bool:
    """Whether a face differs from what was packed; only what may differ is read."""
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
    """Key of each sample in whole shards, and where its index says what it is."""
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
    """When a file was last changed, in ns; 0 where there is none."""
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
    return [] if old == new else [f"{name}: {old}, now {new}"]


def _other_networks(manifest: Manifest, made_by: Mapping[str, dict[str, Any]]) -> list[str]:
    guide, guides, clip = made_by["guide"], made_by["guides"], made_by["clip"]
    pairs = [(f"guides.{name}", manifest.guides.get(name, {}), guides[name]) for name in guides]
    if guide and manifest.levels:
        pairs.insert(0, ("guide", manifest.guide, guide))
    changed = [
        f"{key}: {_label(before)}, now {_label(now)}"
        for key, before, now in pairs
        if guide_identity(before) != guide_identity(now)
    ]
    if clip and network_of(manifest.clip) != network_of(clip):
        changed.append(f"clip: {manifest.clip.get('path', 'none')}, now {clip.get('path')}")
    return changed


def _listed(classes: Sequence[str]) -> str:
    return ", ".join(classes) or "none"


def _label(guide: dict[str, Any]) -> str:
    if not guide:
        return "none"
    return f"{guide.get('name')} ({guide.get('path')}) layer {guide.get('layer')}"


def _other(out: Path, what: str, again: bool = False) -> PrepareError:
    """The error of a folder that holds another dataset.

    Args:
        out: the folder.
        what: is different.
        again: whether the dataset can be made again in its place.
    """
    if not (out / MANIFEST).is_file():
        return PrepareError(
            f"{out}: holds an unfinished dataset that was made otherwise ({what}): delete it to "
            "begin again, or choose another folder"
        )
    remedy = (
        "add --repack to make it again, or choose another folder"
        if again
        else "choose another folder, or delete this one"
    )
    return PrepareError(
        f"{out}: holds a finished dataset that was made otherwise ({what}): {remedy}"
    )
