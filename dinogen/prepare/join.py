"""``dinogen pack``: faces joined with their pyramids, packed as shards."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from dinogen.config import GuideConfig
from dinogen.config_prepare import PackConfig
from dinogen.features import load_guide
from dinogen.prepare.classes import class_names, label_of
from dinogen.prepare.crop import Crop
from dinogen.prepare.export_pt import PtFiles
from dinogen.prepare.faces import read_faces, read_metas
from dinogen.prepare.finished import check_faces, finished_dataset
from dinogen.prepare.parts import PartFiles
from dinogen.prepare.pyramid import Levels
from dinogen.prepare.read import PrepareError
from dinogen.prepare.settings import read_settings
from shards import Sample, pack
from shards.manifest import Manifest

Progress = Callable[[int, int], None]

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
    pyramids: PartFiles | PtFiles | None,
    out: Path,
    config: PackConfig,
    guide: dict[str, Any],
    *,
    by_folder: bool = False,
    progress: Progress | None = None,
) -> Manifest:
    """Join faces and pyramids by key and pack them as shards, in the order of the photos.

    Labels are those that ``dinogen faces`` was asked for.

    After a kill the same call goes on behind the last whole shard; a dataset that is finished is
    left as it is.

    Args:
        faces: as :func:`dinogen.prepare.faces.read_faces` reads it.
        pyramids: of the same faces; None packs the faces alone.
        out: folder of the dataset.
        config: shards and splits.
        guide: the main guide of the pyramids, for the manifest; empty if there are none. They say
            themselves who made the rest.
        by_folder: the first folder below ``faces`` is the class of a picture that was not cut out
            by ``dinogen faces``.
        progress: called with the number of faces done and of all faces.

    Raises:
        PrepareError: faces without pyramid, or pyramids without face; classes are asked for, but
            there are none; or ``out`` holds a finished dataset of other faces or settings.
        ShardsError: they cannot be packed.
    """
    sources = {key: str(meta.get("source", "")) for key, meta in read_metas(faces)}
    keys = list(sources)
    numbers = sorted(range(len(keys)), key=lambda n: _photo_order(keys[n], sources[keys[n]]))
    names = pyramids.names(sources) if pyramids else {}
    if pyramids:
        _check_join(faces, names, pyramids.keys())
    cut_with, classes = _settings_of_faces(faces, sources.values(), by_folder)
    made_with = settings_of(cut_with, pyramids.settings if pyramids else None)
    made_by = {
        "guide": guide,
        "guides": pyramids.guides if pyramids else {},
        "clip": pyramids.clip if pyramids else {},
    }
    manifest = finished_dataset(out, config, made_by, made_with, classes)
    if manifest is not None:
        check_faces(out, set(sources))
        if progress is not None:
            progress(len(keys), len(keys))
        return manifest

    def samples() -> Iterator[Sample]:
        for done, crop in enumerate(read_faces(faces, numbers), start=1):
            if crop.key != keys[numbers[done - 1]]:
                raise PrepareError(f"{faces}: changed while it was packed: run again")
            levels = pyramids.levels(names[crop.key]) if pyramids else {}
            yield sample_of(crop, levels, classes)
            if progress is not None:
                progress(done, len(keys))

    return pack(
        samples(),
        out,
        shard_size=config.shard_size,
        val_fraction=config.val_fraction,
        test_fraction=config.test_fraction,
        **made_by,
        prepare=made_with,
        classes=classes,
    )


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


def sample_of(crop: Crop, levels: Levels, classes: Sequence[str] = ()) -> Sample:
    """A crop with its levels and the label of its class, as shards hold it.

    Raises:
        PrepareError: shards cannot hold it.
    """
    try:
        label = label_of(crop.meta["source"], classes) if classes else None
        return Sample(
            crop.key, crop.image, crop.image_format, crop.meta, dict(levels), label, crop.caption
        )
    except ValueError as error:
        raise PrepareError(str(error)) from error


def settings_of(faces: dict[str, Any], pyramids: dict[str, Any] | None) -> dict[str, Any]:
    """What the manifest says about the preparation, alike on both ways."""
    if not pyramids or "grids" not in pyramids:
        return {"faces": faces}
    decisive = ("grids", "kinds", "base_grid", "resize")
    return {"faces": faces, "pyramids": {n: pyramids[n] for n in decisive if n in pyramids}}


def _settings_of_faces(
    faces: Path, sources: Iterable[str], by_folder: bool
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """How the faces were cut out, and names of their classes."""
    written = read_settings(faces)
    if written is None:
        return {}, class_names(faces, sources) if by_folder else ()
    if by_folder and not written[1]:
        raise PrepareError(
            f"{faces}: was made without classes: run `dinogen faces` with "
            "prepare.faces.classes=folders into a new folder"
        )
    return written


def _photo_order(key: str, source: str) -> tuple[bytes, int, str]:
    """Sorts faces as the photos are gone through: by path, then by the face's number."""
    # The further faces of KEY are KEY_1, KEY_2, ... KEY_10: the shorter key comes first.
    return source.encode(), len(key) if source else 0, key


def _check_join(faces: Path, names: dict[str, str], pyramids: set[str]) -> None:
    lacking = sorted(key for key, name in names.items() if name not in pyramids)
    extra = sorted(pyramids - set(names.values()))
    problems = []
    if lacking:
        problems.append(f"{len(lacking)} of {len(names)} faces have no pyramid ({_named(lacking)})")
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
