"""``dinogen pack``: joins faces with their pyramids and packs them as shards."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from dinogen.config import GuideConfig, PackConfig
from dinogen.features import load_guide
from dinogen.prepare.earlier import check_faces, finished_dataset
from dinogen.prepare.export_pt import BadPyramid, PtFiles, pt_paths
from dinogen.prepare.faces.crop import Crop, Rejection
from dinogen.prepare.faces.folder import REJECTED, FaceFolder, read_rejected, write_rejected
from dinogen.prepare.faces.settings import read_settings
from dinogen.prepare.parts import PartFiles
from dinogen.prepare.photos.find import counted, face_number, named
from dinogen.prepare.photos.read import (
    BAD_CAPTION,
    NO_CLASS,
    NO_CLASS_REMEDY,
    PrepareError,
    class_names,
    has_class,
    label_of,
)
from dinogen.prepare.pyramid import Levels
from shards import Sample, pack
from shards.format.manifest import Manifest

Progress = Callable[[int, int], None]

_logger = logging.getLogger(__name__)


def open_pyramids(folder: Path) -> PartFiles | PtFiles:
    """Pyramids by key: those of ``dinogen pyramids``, or ``.pt`` files of the exchange format.

    Raises:
        PrepareError: the folder holds neither, or both.
    """
    parts, exchanged = any(folder.glob("part-*.safetensors")), bool(pt_paths(folder))
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

    Labels are those that ``dinogen faces`` wrote.

    After a kill the same call continues after the last whole shard; a finished dataset is left as
    it is. ``out/rejected.csv`` lists what cannot be packed (source, reason, detail): damaged images
    of a plain folder, those of another size than most, faces whose ``.pt`` file is damaged or
    missing.

    Args:
        faces: as :class:`dinogen.prepare.faces.folder.FaceFolder` reads it.
        pyramids: of the same faces; None packs the faces alone.
        out: folder of the dataset.
        config: shards and splits.
        guide: the main guide of the pyramids, for the manifest; empty if there are none. The other
            networks are named in the pyramids.
        by_folder: the first folder below ``faces`` is the class of an image that was not cut out
            by ``dinogen faces``.
        progress: called with the number of faces done and of all faces.

    Raises:
        PrepareError: faces without pyramid, or with one of another face, or pyramids without face;
            classes are requested, but there are none; or ``out`` holds a dataset of other faces or
            settings.
        ShardsError: they cannot be packed.
    """
    folder = FaceFolder(faces)
    rejected = {line.source: line for line in folder.drop_odd()}
    sources = {key: str(meta.get("source", "")) for key, meta in folder.metas()}
    keys = list(sources)
    names = pyramids.names(sources) if pyramids else {}
    if pyramids:
        missing = _check_join(folder, names, pyramids)
        rejected |= {line.source: line for line in missing.values()}
    numbers = sorted(range(len(keys)), key=lambda n: _photo_order(keys[n], sources[keys[n]]))
    cut_with, classes = _settings_of_faces(faces, sources.values(), by_folder)
    made_with = settings_of(cut_with, pyramids.settings if pyramids else None)
    made_by = {
        "guide": guide,
        "guides": pyramids.guides if pyramids else {},
        "clip": pyramids.clip if pyramids else {},
    }
    # Captions that `dinogen faces` wrote were requested; others are read if there is a clip.
    with_captions = folder.written or bool(made_by["clip"])
    manifest = finished_dataset(out, config, made_by, made_with, classes)
    check_faces(out, folder, sources)
    if manifest is not None:
        if progress is not None:
            progress(len(keys), len(keys))
        _warn_of_rejected(out, read_rejected(out / REJECTED), folder)
        return manifest
    bad_captions: list[Rejection] = []

    def samples() -> Iterator[Sample]:
        done = 0
        for item in folder.read(numbers, with_captions):
            if isinstance(item, Rejection) and item.reason == BAD_CAPTION:
                bad_captions.append(item)
                continue
            done += 1
            if progress is not None:
                progress(done, len(keys))
            key = keys[numbers[done - 1]]
            if isinstance(item, Rejection):
                rejected[item.source] = item
            elif item.key != key:
                raise PrepareError(f"{faces}: changed while it was being packed: run again")
            elif classes and not has_class(source := item.meta["source"]):
                rejected[source] = Rejection(source, NO_CLASS, NO_CLASS_REMEDY)
            elif not pyramids:
                yield sample_of(item, {}, classes)
            elif key not in missing:
                try:
                    levels = levels_of(pyramids, names[key], item)
                except BadPyramid as error:
                    rejected[sources[key] or key] = Rejection(
                        sources[key] or key, "bad_pyramid", str(error)
                    )
                    continue
                yield sample_of(item, levels, classes)

    def checked() -> Iterator[Sample]:
        yield from samples()
        if len(rejected) >= len(folder.found.photos):
            first = next(iter(rejected.values()))
            raise PrepareError(
                f"{faces}: no face can be packed ({len(rejected)} of {len(rejected)} are "
                f"unusable; {first.source}: {first.reason}: {first.detail})"
            )
        lines = [*rejected.values(), *bad_captions]
        if lines:
            write_rejected(out / REJECTED, sorted(lines, key=lambda line: line.source))
            _warn_of_rejected(out, lines, folder)

    return pack(
        checked(),
        out,
        shard_size=config.shard_size,
        val_fraction=config.val_fraction,
        test_fraction=config.test_fraction,
        **made_by,
        prepare=made_with,
        classes=classes,
    )


def levels_of(pyramids: PartFiles | PtFiles, name: str, crop: Crop) -> Levels:
    """The levels of a face.

    Raises:
        PrepareError: they were made of another face.
        BadPyramid: the ``.pt`` file cannot be used.
    """
    if not pyramids.belongs(crop):
        raise PrepareError(
            f"{pyramids.folder}: {crop.key} has changed since its pyramid was made: run "
            "`dinogen pyramids` on these faces into this folder again"
        )
    return pyramids.levels(name)


def _warn_of_rejected(out: Path, rejected: Sequence[Rejection], folder: FaceFolder) -> None:
    """Warn of what was not packed."""
    reasons = Counter(line.reason for line in rejected)
    if num_bad := reasons.pop(BAD_CAPTION, 0):
        _logger.warning(
            "%s packed without caption: see %s", counted(num_bad, "image"), out / REJECTED
        )
    if reasons:
        _logger.warning(
            "%d of %s NOT PACKED (%s): see %s",
            sum(reasons.values()),
            counted(len(folder.found.photos), "image"),
            ", ".join(f"{count} {reason}" for reason, count in reasons.most_common()),
            out / REJECTED,
        )


def guide_of(pyramids: PartFiles | PtFiles, config: GuideConfig | None) -> dict[str, Any]:
    """The guide that made the pyramids, for the manifest.

    Args:
        pyramids: they name it themselves, unless they are ``.pt`` files of another program.
        config: the guide that the user names for those; it is loaded for the hash of its weights.

    Raises:
        PrepareError: no guide is named, or the named guide has another number of channels.
        GuideError: the named guide cannot be loaded.
    """
    if pyramids.guide is not None:
        return pyramids.guide
    if config is None:
        raise PrepareError(
            f"{pyramids.folder}: has no guide.json: name the guide that made these files with "
            "guide.path=... or -c CONFIG"
        )
    info = load_guide(config, torch.device("cpu")).info
    key, num_channels = _some_channels(pyramids)
    if num_channels != info.num_channels:
        raise PrepareError(
            f"guide.path: {info.label} has {info.num_channels} channels, but {key}.pt has "
            f"{num_channels}: name the guide that made these files"
        )
    return info.to_dict()


def _some_channels(pyramids: PartFiles | PtFiles) -> tuple[str, int]:
    """The first key whose pyramid can be read, and the number of its channels."""
    problem: BadPyramid | None = None
    for key in sorted(pyramids.keys()):
        try:
            return key, int(pyramids.levels(key)["p4"].shape[1])
        except BadPyramid as error:
            problem = problem or error
    raise problem or PrepareError(f"{pyramids.folder}: holds no pyramids")


def sample_of(crop: Crop, levels: Levels, classes: Sequence[str] = ()) -> Sample:
    """A crop with its levels and the label of its class, as a sample of a shard.

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
    """What the manifest says about the preparation; the same for both ways to prepare."""
    if not pyramids or "grids" not in pyramids:
        return {"faces": faces}
    decisive = ("grids", "kinds", "base_grid", "resize", "flips")
    return {"faces": faces, "pyramids": {n: pyramids[n] for n in decisive if n in pyramids}}


def _settings_of_faces(
    faces: Path, sources: Iterable[str], by_folder: bool
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """How the faces were cut out, and the names of their classes."""
    written = read_settings(faces)
    if written is None:
        return {}, class_names(faces, sources) if by_folder else ()
    if by_folder and not written[1]:
        raise PrepareError(
            f"{faces}: was made without classes: run `dinogen faces` into a new folder, with "
            "prepare.faces.classes=folders"
        )
    return written


def _photo_order(key: str, source: str) -> tuple[bytes, int, str]:
    """Sorts faces in the order of the photos: by path, then by the face's number."""
    # The further faces of KEY are KEY_1, KEY_2, ... KEY_10.
    return source.encode(), face_number(key) if source else 0, key


def _check_join(
    folder: FaceFolder, names: dict[str, str], pyramids: PartFiles | PtFiles
) -> dict[str, Rejection]:
    """By key, the faces that are left out because they have no pyramid.

    Raises:
        PrepareError: too many are missing, or pyramids have no face.
    """
    there = pyramids.keys()
    missing = sorted(key for key, name in names.items() if name not in there)
    extra = sorted(there - set(names.values()))
    left_out: dict[str, Rejection] = {}
    if isinstance(pyramids, PtFiles):
        # Made by hand or by another program: what matches is packed.
        if extra:
            _logger.warning(
                "%s: %s without face left out (%s)",
                pyramids.folder,
                counted(len(extra), ".pt file"),
                named(extra),
            )
        if 2 * len(missing) <= len(names):
            sources = {key: str(meta.get("source") or key) for key, meta in folder.metas()}
            left_out = {
                key: Rejection(sources[key], "no_pyramid", f"no {names[key]}.pt") for key in missing
            }
            return left_out
        extra = []
    elif missing and not folder.written:
        # Images that cannot be read have no pyramid either: reading them says why.
        numbers = {face.key: number for number, face in enumerate(folder.faces)}
        left_out = {
            key: item
            for key in missing
            for item in folder.read([numbers[key]], with_captions=False)
            if isinstance(item, Rejection)
        }
        missing = [key for key in missing if key not in left_out]
    problems = []
    if missing:
        problems.append(
            f"{len(missing)} of {counted(len(names), 'face', 'has', 'have')} no pyramid "
            f"({named(missing)})"
        )
    if extra:
        problems.append(f"{counted(len(extra), 'pyramid', 'has', 'have')} no face ({named(extra)})")
    if problems:
        raise PrepareError(
            f"{folder.folder}: {' and '.join(problems)}: run `dinogen pyramids` on these faces"
        )
    return left_out
