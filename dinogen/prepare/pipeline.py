"""Photos to shards: faces joined with their pyramids, or all steps in one pass."""

from __future__ import annotations

import csv
import io
import json
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from dinogen import dist
from dinogen.config import FacesConfig, GuideConfig, PackConfig, PrepareConfig
from dinogen.features import load_guide
from dinogen.files import write_json, write_text
from dinogen.prepare.crop import Crop
from dinogen.prepare.curate import Duplicates
from dinogen.prepare.export_pt import PtFiles
from dinogen.prepare.faces import FacesSummary, read_faces
from dinogen.prepare.journal import Journal
from dinogen.prepare.parts import PartFiles
from dinogen.prepare.pyramid import Levels, PyramidMaker
from dinogen.prepare.read import Photos, PrepareError, find_photos
from dinogen.prepare.stream import iter_photos
from shards import Sample, ShardSink, pack
from shards.manifest import Manifest

Progress = Callable[[int, int], None]

_JOURNAL = "prepare.jsonl"
# How fast the work is done does not change what comes out.
_SPEED_ONLY = {"batch", "num_threads"}
_NUM_NAMED = 5


def open_pyramids(folder: Path) -> PartFiles | PtFiles:
    """Pyramids by key: those of ``dinogen pyramids``, or ``.pt`` files of the exchange format.

    Raises:
        PrepareError: the folder holds neither, or both.
    """
    parts, exchanged = any(folder.glob("part-*.safetensors")), any(folder.glob("*.pt"))
    if parts and exchanged:
        raise PrepareError(f"{folder}: holds both part-*.safetensors and .pt files: move one away")
    if not parts and not exchanged:
        raise PrepareError(
            f"{folder}: holds no pyramids, neither part-*.safetensors of `dinogen pyramids` nor "
            "one .pt file per face"
        )
    return PartFiles(folder) if parts else PtFiles(folder)


def pack_faces(
    faces: Path,
    pyramids: PartFiles | PtFiles,
    out: Path,
    config: PackConfig,
    guide: dict[str, Any],
    *,
    progress: Progress | None = None,
) -> Manifest:
    """Join faces and pyramids by key and pack them as shards, in the order of the photos.

    After a kill the same call goes on behind the last whole shard.

    Args:
        faces: as :func:`dinogen.prepare.faces.read_faces` reads it.
        pyramids: of the same faces.
        out: folder of the dataset.
        config: shards and splits.
        guide: who made the pyramids, for the manifest.
        progress: called with the number of faces done and of all faces.

    Raises:
        PrepareError: faces without pyramid, or pyramids without face.
        ShardsError: they cannot be packed.
    """
    order = [_photo_order(crop) for crop in read_faces(faces)]
    keys = [key for *_, key in sorted(order)]
    _check_join(faces, keys, pyramids.keys())

    def samples() -> Iterator[Sample]:
        for number, crop in enumerate(_in_order(faces, keys)):
            yield _sample(crop, pyramids.levels(crop.key))
            if progress is not None:
                progress(number + 1, len(keys))

    settings = faces / "settings.json"
    made_with = json.loads(settings.read_text(encoding="utf-8")) if settings.is_file() else {}
    return pack(
        samples(),
        out,
        shard_size=config.shard_size,
        val_fraction=config.val_fraction,
        test_fraction=config.test_fraction,
        guide=guide,
        prepare=_settings(made_with.get("faces", {}), pyramids.settings),
    )


def prepare(
    src: Path,
    out: Path,
    config: PrepareConfig,
    maker: PyramidMaker,
    *,
    progress: Progress | None = None,
) -> tuple[FacesSummary, Manifest]:
    """Photos to shards in one pass: the same bytes in the tars as by the three steps.

    Beside the shards: ``rejected.csv`` and ``summary.json``. After a kill the same call goes on
    behind the last whole shard of each split; photos that came later are gone through again.

    Args:
        src: folder of photos.
        out: folder of the dataset.
        config: of all three steps.
        maker: guide and settings of the pyramids; the faces are found on its device.
        progress: called with the number of photos done and of all photos.

    Raises:
        PrepareError: ``src`` holds no photo, or none with a face; ``out`` lies below it or holds
            an unfinished preparation of other photos; there are several ranks.
        ShardsError: ``out`` holds something else, or work of other settings.
    """
    started = time.monotonic()
    if dist.world_size() > 1:
        raise PrepareError(
            f"`dinogen prepare` is one process, not {dist.world_size()}: start it without "
            "torchrun, or run `dinogen faces`, then `dinogen pyramids` under torchrun, then "
            "`dinogen pack`"
        )
    if out.resolve().is_relative_to(src.resolve()):
        raise PrepareError(f"{out}: lies below the photos in {src}: choose a folder outside it")
    maker.check_size(config.faces.size)
    photos = find_photos(src)
    sink = ShardSink(
        out,
        shard_size=config.pack.shard_size,
        val_fraction=config.pack.val_fraction,
        test_fraction=config.pack.test_fraction,
        guide=maker.guide.info.to_dict(),
        prepare=_settings(_faces_settings(config.faces), maker.settings()),
    )
    with sink, Journal(out / _JOURNAL, src) as journal:
        completed = sink.completed_keys()
        finished = {
            photo.key: list(journal.outcomes[photo.source].hashes)
            for photo in photos.photos
            if photo.source in journal.outcomes
            and completed.issuperset(journal.outcomes[photo.source].hashes)
        }
        duplicates = Duplicates(config.faces.max_duplicate_distance)
        for photo in photos.photos:
            if photo.key in finished:
                for key, value in journal.outcomes[photo.source].hashes.items():
                    if value is not None:
                        duplicates.add(key, int(value, 16))
        items = iter_photos(
            photos,
            config.faces,
            device=maker.device,
            skip=finished.__contains__,
            progress=progress,
            duplicates=duplicates,
        )
        for crop, levels in maker.levels(journal.record(items)):
            sink.add(_sample(crop, levels))
        kept = sink.seen.union(*finished.values())
        if lost := completed - kept:
            raise PrepareError(
                f"{src}: the photo of {min(lost)}, which an earlier run packed into {out}, is gone "
                f"or changed: put it back, or delete {out}"
            )
        rejected = _write_rejected(out / "rejected.csv", photos, journal)
        if not kept:
            raise PrepareError(
                f"{src}: none of {len(photos.photos)} photos gave a face: see {out}/rejected.csv"
            )
        summary = FacesSummary(
            num_photos=len(photos.photos),
            num_skipped=len(finished),
            num_ignored=photos.num_ignored,
            num_crops=len(kept),
            num_new=len(kept - completed),
            rejected=rejected,
            seconds=round(time.monotonic() - started, 3),
        )
        write_json(out / "summary.json", asdict(summary))
        manifest = sink.finish()
        journal.remove()
    return summary, manifest


def guide_of(pyramids: PartFiles | PtFiles, config: GuideConfig | None) -> dict[str, Any]:
    """Who made the pyramids, for the manifest.

    Args:
        pyramids: say it themselves, unless they are ``.pt`` files of another program.
        config: the guide that the user names for those; it is loaded to learn its weights' hash.

    Raises:
        PrepareError: nothing says it, or the guide named has another number of channels.
        GuideError: the guide named cannot be loaded.
    """
    if pyramids.guide is not None:
        return pyramids.guide
    if config is None:
        raise PrepareError(
            f"{pyramids.folder}: has no guide.json: name the guide that made these files, with "
            "guide.path=... or -c CONFIG"
        )
    info = load_guide(config, torch.device("cpu")).info
    key = min(pyramids.keys())
    num_channels = pyramids.levels(key)["p4"].shape[1]
    if num_channels != info.num_channels:
        raise PrepareError(
            f"guide.path: {info.label} has {info.num_channels} channels, {key}.pt has "
            f"{num_channels}: name the guide that made these files"
        )
    return info.to_dict()


def _sample(crop: Crop, levels: Levels) -> Sample:
    try:
        return Sample(crop.key, crop.image, crop.image_format, crop.meta, dict(levels))
    except ValueError as error:
        raise PrepareError(str(error)) from error


def _faces_settings(config: FacesConfig) -> dict[str, Any]:
    return config.model_dump(mode="json", exclude=_SPEED_ONLY)


def _settings(faces: dict[str, Any], pyramids: dict[str, Any]) -> dict[str, Any]:
    """What the manifest says about the preparation, alike on both ways."""
    return {"faces": faces, "pyramids": {name: pyramids[name] for name in ("grids", "kinds")}}


def _photo_order(crop: Crop) -> tuple[bytes, int, str]:
    """Sorts crops as the photos are gone through: by path, then by the face's number."""
    source: str = crop.meta.get("source", "")
    # The further faces of KEY are KEY_1, KEY_2, ... KEY_10: the shorter key comes first.
    return source.encode(), len(crop.key) if source else 0, crop.key


def _in_order(faces: Path, keys: list[str]) -> Iterator[Crop]:
    """The crops in the order of ``keys``; holds back only those that are read too early."""
    crops = read_faces(faces)
    waiting: dict[str, Crop] = {}
    for key in keys:
        while key not in waiting:
            crop = next(crops, None)
            if crop is None:
                raise PrepareError(f"{faces}: {key} vanished while it was packed: run again")
            waiting[crop.key] = crop
        yield waiting.pop(key)


def _check_join(faces: Path, keys: list[str], pyramids: set[str]) -> None:
    lacking, extra = sorted(set(keys) - pyramids), sorted(pyramids - set(keys))
    problems = []
    if lacking:
        problems.append(f"{len(lacking)} of {len(keys)} faces have no pyramid ({_named(lacking)})")
    if extra:
        problems.append(f"{len(extra)} pyramids have no face ({_named(extra)})")
    if problems:
        raise PrepareError(
            f"{faces}: {' and '.join(problems)}: run `dinogen pyramids` on these faces into a "
            "new folder"
        )


def _named(keys: list[str]) -> str:
    more = ", ..." if len(keys) > _NUM_NAMED else ""
    return ", ".join(keys[:_NUM_NAMED]) + more


def _write_rejected(path: Path, photos: Photos, journal: Journal) -> dict[str, int]:
    """Write the list of what is not used, in the order of the photos; count it by reason."""
    lines = [
        (photo.source, reason, detail)
        for photo in photos.photos
        if photo.source in journal.outcomes
        for reason, detail in journal.outcomes[photo.source].rejected
    ]
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(["source", "reason", "detail"])
    writer.writerows(lines)
    write_text(path, buffer.getvalue())
    return dict(Counter(reason for _, reason, _ in lines).most_common())
