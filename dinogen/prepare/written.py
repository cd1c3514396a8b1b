"""The files of a folder of faces: ``KEY.jpg`` or png, ``KEY.json`` and ``KEY.txt``."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from dinogen.config import FacesConfig
from dinogen.files import write_bytes, write_json, write_text
from dinogen.prepare.faces.crop import Crop, Rejection, still_matches
from dinogen.prepare.faces.settings import SETTINGS
from dinogen.prepare.photos.changed import NO_FILE, record_of, same_file
from dinogen.prepare.photos.find import Photo, face_key, face_number
from dinogen.prepare.photos.read import Unusable, caption_path, read_photo, try_caption
from dinogen.prepare.photos.summary import SUMMARY

# In a crop's JSON, but not in a dataset.
FILE = "file"
CAPTION = "caption_sha256"  # of the caption as it was written beside the crop

_logger = logging.getLogger(__name__)


def crops_in(out: Path) -> dict[str, list[dict[str, Any]]]:
    """By source, the metadata of the crops of each photo, in the order of its faces."""
    found: dict[str, list[dict[str, Any]]] = {}
    for path in sorted(out.glob("*.json")):
        if path.name in (SETTINGS, SUMMARY):
            continue
        try:
            meta = json.loads(path.read_bytes())
        except (OSError, ValueError):
            _logger.warning("%s: damaged: its photo is processed again", path)
            continue
        if (
            isinstance(meta, dict)
            and meta.get("key") == path.stem
            and {"num_crops", "source"} <= meta.keys()
        ):
            found.setdefault(meta["source"], []).append(meta)
    for metas in found.values():
        metas.sort(key=lambda meta: face_number(meta["key"]))
    return found


def is_whole(out: Path, photo: Photo, metas: Sequence[dict[str, Any]], config: FacesConfig) -> bool:
    """Whether these are all crops of a photo, with its current keys."""
    keys = [face_key(photo.key, number) for number in range(metas[0]["num_crops"])]
    return keys == [meta["key"] for meta in metas] and all(
        (out / f"{key}.{config.format}").exists() for key in keys
    )


def is_same(out: Path, photo: Photo, metas: Sequence[dict[str, Any]], config: FacesConfig) -> bool:
    """Whether crops are of the photo as it is now; updates the record of its file."""
    meta = metas[0]
    record = meta.get(FILE)
    try:
        mtime_ns = photo.path.stat().st_mtime_ns
        made_ns = (out / f"{meta['key']}.{config.format}").stat().st_mtime_ns
    except OSError:
        return True
    if record is None:  # written by an earlier version
        same = mtime_ns <= made_ns or still_matches(
            photo,
            metas,
            [(out / f"{m['key']}.{config.format}").read_bytes() for m in metas],
            config,
        )
    else:
        same = same_file(photo.path, record)
    if same and (record is None or record["mtime_ns"] != mtime_ns):
        meta[FILE] = record_of(photo.path)
        write_json(out / f"{meta['key']}.json", meta)
    return same


def damage_of(photo: Photo, config: FacesConfig) -> Rejection | None:
    """Why a photo cannot be read (damaged, or still being copied); None if it can."""
    try:
        read_photo(photo.path, config.max_pixels)
    except Unusable as error:
        if error.reason in ("unreadable", "empty", "truncated", "corrupt"):
            return Rejection(photo.source, error.reason, error.detail)
    return None


def remove_crops(out: Path, metas: Collection[dict[str, Any]], config: FacesConfig) -> int:
    """Remove the crops of a photo; returns how many there were."""
    num_removed = 0
    for meta in metas:
        # The metadata last: as long as they exist, the rest is found again.
        path = out / f"{meta['key']}.{config.format}"
        num_removed += path.exists()
        path.unlink(missing_ok=True)
        for suffix in ("txt", "json"):
            (out / f"{meta['key']}.{suffix}").unlink(missing_ok=True)
    return num_removed


def write_crop(out: Path, item: Crop) -> None:
    """Write a crop with its metadata and caption."""
    # The image comes last: if it exists, the rest does too.
    _write_meta(out, item)
    _write_caption(out, item)
    write_bytes(out / f"{item.key}.{item.image_format}", item.image)


def replace_crops(
    out: Path, old: Sequence[dict[str, Any]], new: Sequence[Crop], config: FacesConfig
) -> None:
    """Replace older crops of a photo by new ones.

    The metadata of the first crop say whether the crops are of the photo as it is now. They are
    written last, so after a kill at any point the next run makes the crops again.
    """
    before = {meta["key"] for meta in old}
    if old[0].get(FILE) is None:  # written by an earlier version: mark these as outdated
        write_json(out / f"{old[0]['key']}.json", {**old[0], FILE: NO_FILE})
    for item in reversed(new):
        path = caption_path(out / f"{item.key}.{item.image_format}")
        write_bytes(out / f"{item.key}.{item.image_format}", item.image)
        if item.caption is not None:
            _write_caption(out, item)
        elif item.key in before:
            path.unlink(missing_ok=True)
        if item is new[0]:
            taken = {crop.key for crop in new}
            remove_crops(out, [meta for meta in old if meta["key"] not in taken], config)
        _write_meta(out, item)


def _write_meta(out: Path, item: Crop) -> None:
    meta = {"key": item.key, **item.meta, FILE: item.file}
    if item.caption is not None:
        meta[CAPTION] = _sha256(item.caption.encode())
    write_json(out / f"{item.key}.json", meta)


def _write_caption(out: Path, item: Crop) -> None:
    if item.caption is not None:
        write_text(caption_path(out / f"{item.key}.{item.image_format}"), item.caption)


def update_caption(
    out: Path, photo: Photo, metas: Sequence[dict[str, Any]], config: FacesConfig
) -> str:
    """Copy the caption of a photo to its crops; returns why it cannot be used, or "".

    A caption that was written or edited beside a crop is kept.
    """
    caption, bad = try_caption(photo.caption)
    for meta in metas:
        path = caption_path(out / f"{meta['key']}.{config.format}")
        there = path.read_bytes() if path.exists() else None
        wanted = None if caption is None else caption.encode()
        if there is not None and there != wanted and _sha256(there) != meta.get(CAPTION):
            _logger.warning("%s: was not copied from the photos: kept as it is", path)
            continue
        if wanted is None:
            path.unlink(missing_ok=True)
            continue
        if there != wanted:
            write_bytes(path, wanted)
        # Second: after a kill in between, the next run finds the same caption and adds this.
        if meta.get(CAPTION) != _sha256(wanted):
            meta[CAPTION] = _sha256(wanted)
            write_json(out / f"{meta['key']}.json", meta)
    return bad


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
