"""``dinogen prepare``: photos to shards in one pass."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from dinogen.config import FacesConfig, PrepareConfig
from dinogen.distributed import process_group
from dinogen.features.pyramid import resized_with_antialias
from dinogen.files import write_json
from dinogen.prepare.earlier import JOURNAL, Journal, begun_with, finished_dataset, finished_summary
from dinogen.prepare.faces.crop import Duplicates, Rejection
from dinogen.prepare.faces.folder import REJECTED, write_rejected
from dinogen.prepare.faces.settings import faces_settings, landmark_offset_of, warn_of_offset
from dinogen.prepare.faces.stream import iter_faces
from dinogen.prepare.join import sample_of, settings_of
from dinogen.prepare.photos.changed import PHOTOS, gone, same_file, write_photos
from dinogen.prepare.photos.find import Photos, counted, find_photos, named
from dinogen.prepare.photos.read import PrepareError, class_names
from dinogen.prepare.photos.summary import SUMMARY, FacesSummary, summary_of
from dinogen.prepare.pyramid import PyramidMaker
from shards import ShardWriter
from shards.format.manifest import Manifest

Progress = Callable[[int, int], None]


class NoFaceError(PrepareError):
    """No photo gave a face.

    Attributes:
        rejected: number of photos for each reason, most frequent first.
    """

    def __init__(self, message: str, rejected: dict[str, int]) -> None:
        super().__init__(message)
        self.rejected = rejected


def in_words(rejected: dict[str, int]) -> str:
    """The reasons of a summary, as ``3 no_face, 1 empty``."""
    return ", ".join(f"{count} {reason}" for reason, count in rejected.items())


def noun(config: FacesConfig) -> str:
    """What a crop of a photo is called."""
    return "image" if config.detect == "none" else "face"


def prepare(
    src: Path,
    out: Path,
    config: PrepareConfig,
    maker: PyramidMaker | None,
    *,
    photos: Photos | None = None,
    progress: Progress | None = None,
) -> tuple[FacesSummary, Manifest]:
    """Photos to shards in one pass; the tars have the same bytes as those of the three steps.

    It also writes ``rejected.csv``, ``summary.json`` and ``photos.csv``, which lists the photos
    that the dataset was made from. After a kill the same call continues after the last whole shard
    of each split; later photos are processed again. A finished dataset is left as it is. Captions
    are read if the maker has an embedder.

    Args:
        src: folder of photos.
        out: folder of the dataset.
        config: of all three steps.
        maker: guides and settings of the pyramids; the faces are detected on its device. None packs
            the faces without pyramids.
        photos: what :func:`find_photos` found in ``src``, if the caller has it already.
        progress: called with the number of photos done and of all photos.

    Raises:
        NoFaceError: no photo has a face.
        PrepareError: ``src`` holds no photo, or has no folder per class if that is requested;
            ``out`` is below it, or holds a preparation of other photos or a finished dataset of
            other photos or settings; there are several ranks.
        ShardsError: ``out`` holds something else, or work of other settings.
    """
    started = time.monotonic()
    if process_group.world_size() > 1:
        raise PrepareError(
            f"`dinogen prepare` runs in one process, not {process_group.world_size()}: start it "
            "without torchrun, or run `dinogen faces`, then `dinogen pyramids` under torchrun, "
            "then `dinogen pack`"
        )
    if out.resolve().is_relative_to(src.resolve()):
        raise PrepareError(f"{out}: is below the photos in {src}: choose a folder outside it")
    if maker is not None:
        maker.check_size(config.faces.size)
    photos = photos or find_photos(src)
    by_folder = config.faces.classes == "folders"
    classes = class_names(src, (p.source for p in photos.photos)) if by_folder else ()
    made_by = maker.identity() if maker else {"guide": {}, "guides": {}, "clip": {}}
    # What an earlier version began continues in the same way, so that all samples are alike.
    begun = begun_with(out)
    landmark_offset = landmark_offset_of(begun.get("faces", {}))
    if maker is not None:
        maker.antialias = resized_with_antialias(begun)
    cut_with = faces_settings(config.faces, landmark_offset)
    made_with = settings_of(cut_with, maker.settings() if maker else None)
    manifest = finished_dataset(out, config.pack, made_by, made_with, classes)
    if manifest is not None:
        summary = finished_summary(
            src, out, photos, maker is not None and maker.embedder is not None
        )
        if progress is not None:
            progress(summary.num_photos, summary.num_photos)
        return summary, manifest
    if config.faces.detect != "none":
        warn_of_offset(out, landmark_offset)
    if maker is not None:
        maker.warn_of_resize(out)
    writer = ShardWriter(
        out,
        shard_size=config.pack.shard_size,
        val_fraction=config.pack.val_fraction,
        test_fraction=config.pack.test_fraction,
        **made_by,
        prepare=made_with,
        classes=classes,
    )
    with_captions = maker is not None and maker.embedder is not None
    with writer, Journal(out / JOURNAL, src) as journal:
        completed = writer.completed_keys()
        _check_packed(src, out, photos, journal, completed)
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
        items = iter_faces(
            photos,
            config.faces,
            device=maker.device if maker else "auto",
            skip=finished.__contains__,
            progress=progress,
            duplicates=duplicates,
            with_captions=with_captions,
            landmark_offset=landmark_offset,
        )
        crops = journal.record(items)
        with_text = with_captions and any(photo.has_caption for photo in photos.photos)
        made = maker.levels(crops, with_text) if maker else ((crop, {}) for crop in crops)
        for crop, levels in made:
            writer.add(sample_of(crop, levels, classes))
        kept = writer.seen.union(*finished.values())
        if lost := completed - kept:
            raise _gone(src, out, f"the photo of {min(lost)}")
        outcomes = [
            journal.outcomes[photo.source]
            for photo in photos.photos
            if photo.source in journal.outcomes
        ]
        lines = [Rejection(one.source, *line) for one in outcomes for line in one.rejected]
        write_rejected(out / REJECTED, lines)
        summary = summary_of(
            photos,
            {one.source for one in outcomes if one.hashes},
            (line.reason for line in lines),
            with_captions=with_captions,
            num_skipped=len(finished),
            num_crops=len(kept),
            num_new=len(kept - completed),
            seconds=time.monotonic() - started,
        )
        if not kept:
            what = "an image" if config.faces.detect == "none" else "a face"
            raise NoFaceError(
                f"{src}: none of {counted(len(photos.photos), 'photo')} gave {what} "
                f"({in_words(summary.rejected)}): see {out / REJECTED}",
                summary.rejected,
            )
        write_photos(
            out / PHOTOS,
            (
                (one.source, len(one.hashes), one.file, one.caption if with_captions else None)
                for one in outcomes
            ),
        )
        write_json(out / SUMMARY, asdict(summary))
        manifest = writer.finish()
        journal.remove()
    return summary, manifest


def _check_packed(
    src: Path, out: Path, photos: Photos, journal: Journal, completed: set[str]
) -> None:
    """Raise PrepareError if a photo in a whole shard of an earlier run is gone or replaced."""
    packed = {
        source: outcome
        for source, outcome in journal.outcomes.items()
        if not completed.isdisjoint(outcome.hashes)
    }
    changed = gone(packed, photos)
    for photo in photos.photos:
        record = packed[photo.source].file if photo.source in packed else None
        if record is not None and not same_file(photo.path, record):
            changed.append(photo.source)
    if changed:
        keys = [key for source in changed for key in packed[source].hashes]
        raise _gone(src, out, f"the photo of {named(keys)}")


def _gone(src: Path, out: Path, what: str) -> PrepareError:
    return PrepareError(
        f"{src}: {what}, which an earlier run packed into {out}, is gone or changed: restore it, "
        f"or delete the unfinished {out} to start again"
    )
