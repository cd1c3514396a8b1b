"""Whether a folder holds the finished dataset that is asked for, or another one."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Mapping, Sequence
from math import isclose
from pathlib import Path
from typing import Any

from dinogen.config_prepare import PackConfig
from dinogen.features.base import guide_identity
from dinogen.prepare.faces import FacesSummary
from dinogen.prepare.find import Photos
from dinogen.prepare.parts import network_of
from dinogen.prepare.read import PrepareError
from dinogen.prepare.settings import todays_settings
from shards import open_dataset
from shards.manifest import MANIFEST, PACKING, Manifest

SUMMARY = "summary.json"


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


def finished_summary(src: Path, out: Path, photos: Photos) -> FacesSummary:
    """What became of the photos of a finished dataset.

    Raises:
        PrepareError: the dataset was made of other photos than those in ``src``.
    """
    started = time.monotonic()
    path = out / SUMMARY
    before = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    num_photos = before.get("num_photos", len(photos.photos))
    if num_photos != len(photos.photos):
        raise _other(out, f"photos: {num_photos}, now {len(photos.photos)} in {src}")
    keys, known = _keys_of(out), {photo.key for photo in photos.photos}
    for key in sorted(keys):
        # The second, third, ... face of a photo is KEY_1, KEY_2, ...
        if key not in known and key.rpartition("_")[0] not in known:
            raise _other(out, f"the photo of {key} is not in {src}")
    return FacesSummary(
        num_photos=num_photos,
        num_skipped=num_photos,
        num_ignored=photos.num_ignored,
        num_crops=len(keys),
        num_new=0,
        rejected=before.get("rejected", {}),
        seconds=round(time.monotonic() - started, 3),
    )


def check_faces(out: Path, keys: set[str]) -> None:
    """Raise PrepareError unless these are the keys of a finished dataset's faces."""
    if odd := keys ^ _keys_of(out):
        raise _other(out, f"of other faces: {min(odd)} is not in both, nor are {len(odd) - 1} more")


def _keys_of(data: Path) -> set[str]:
    dataset = open_dataset(data)
    return set(itertools.chain.from_iterable(map(dataset.keys, dataset.manifest.splits)))


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


def _other(out: Path, what: str) -> PrepareError:
    return PrepareError(
        f"{out}: holds a finished dataset that was made otherwise ({what}): choose another folder, "
        "or delete this one"
    )
