"""A folder of aligned faces: ``dinogen faces`` writes it, the later steps read it."""

from __future__ import annotations

import csv
import io
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from dinogen.config_prepare import FacesConfig
from dinogen.files import write_bytes, write_json, write_text
from dinogen.prepare.captions import caption_path, has_captions, read_caption
from dinogen.prepare.classes import class_names
from dinogen.prepare.crop import Crop, Rejection
from dinogen.prepare.curate import Duplicates
from dinogen.prepare.find import Photo, find_photos
from dinogen.prepare.read import PrepareError, Unusable, decode_photo
from dinogen.prepare.settings import SETTINGS, check_settings, read_json
from dinogen.prepare.stream import Progress, iter_faces

if TYPE_CHECKING:
    import torch

__all__ = [
    "Crop",
    "FacesSummary",
    "PrepareError",
    "Rejection",
    "faces_have_captions",
    "iter_faces",
    "read_faces",
    "read_metas",
    "write_faces",
]

_SUMMARY = "summary.json"
_REJECTED = "rejected.csv"


@dataclass(frozen=True)
class FacesSummary:
    """What became of a folder of photos.

    Attributes:
        num_photos: files with an image suffix.
        num_skipped: of these, photos done by an earlier run.
        num_ignored: files with another suffix.
        num_crops: crops in the folder now, those of earlier runs included.
        num_new: of these, crops of this run.
        rejected: number of rejected photos or faces for each reason, most frequent first.
        seconds: of this run.
    """

    num_photos: int
    num_skipped: int
    num_ignored: int
    num_crops: int
    num_new: int
    rejected: dict[str, int]
    seconds: float


class UnusableImage(PrepareError):
    """One image of a folder that is packed as it lies cannot be used.

    Attributes:
        source: its path relative to the folder.
        reason: as :class:`Unusable` says it.
        detail: likewise.
    """

    def __init__(self, picture: Photo, error: Unusable) -> None:
        self.source, self.reason, self.detail = picture.source, error.reason, error.detail
        super().__init__(
            f"{picture.path}: {error.reason}: {error.detail}: remove the file, or run "
            "'dinogen faces' with prepare.faces.detect=none, which lists such files and goes on"
        )


def write_faces(
    src: Path,
    out: Path,
    config: FacesConfig,
    *,
    device: str | torch.device = "auto",
    progress: Progress | None = None,
) -> FacesSummary:
    """Write the faces of all photos below ``src`` as ``out/KEY.jpg`` (or png) and ``KEY.json``.

    The caption of a photo, ``NAME.txt`` beside it, becomes ``KEY.txt`` of each of its faces.

    Beside them: ``rejected.csv`` (source, reason, detail), ``summary.json`` and
    ``settings.json``. Photos whose crops are there already are skipped; a rejected photo is tried
    again, so a mended file is taken up. After a kill the same call completes the folder.

    Args:
        src: folder of photos.
        out: folder to write; made if missing.
        config: what is accepted, and how it is cut out.
        device: as in :func:`iter_faces`.
        progress: as in :func:`iter_faces`.

    Raises:
        PrepareError: ``src`` is missing or holds no photo, or has no folder per class where that
            is asked for; ``out`` lies below ``src``, or holds something else or faces made with
            other settings; a caption cannot be used.
        OSError: ``out`` cannot be written.
    """
    started = time.monotonic()
    if out.resolve().is_relative_to(src.resolve()):
        raise PrepareError(f"{out}: lies below the photos in {src}: choose a folder outside it")
    photos = find_photos(src)
    by_folder = config.classes == "folders"
    classes = class_names(src, (p.source for p in photos.photos)) if by_folder else ()
    landmark_offset = check_settings(src, out, config, classes)
    done: set[str] = set()
    rejections: dict[str, list[Rejection]] = {}
    duplicates = Duplicates(config.max_duplicate_distance)
    num_crops = 0
    for photo in photos.photos:
        metas = _finished(out, photo, config)
        if metas:
            done.add(photo.key)
            num_crops += len(metas)
            rejections[photo.source] = [Rejection(photo.source, *i) for i in metas[0]["rejected"]]
            for meta in metas:
                if "phash" in meta:
                    duplicates.add(meta["key"], int(meta["phash"], 16))
    num_new = 0
    try:
        for item in iter_faces(
            photos,
            config,
            device=device,
            skip=done.__contains__,
            progress=progress,
            duplicates=duplicates,
            landmark_offset=landmark_offset,
        ):
            if isinstance(item, Rejection):
                rejections.setdefault(item.source, []).append(item)
                continue
            # The picture comes last: where it is, its metadata and caption are too.
            write_json(out / f"{item.key}.json", {"key": item.key, **item.meta})
            if item.caption is not None:
                write_text(caption_path(out / f"{item.key}.{item.image_format}"), item.caption)
            write_bytes(out / f"{item.key}.{item.image_format}", item.image)
            num_new += 1
    finally:
        # In the order of the photos, also after an interruption.
        lines = [line for photo in photos.photos for line in rejections.get(photo.source, [])]
        _write_rejected(out / _REJECTED, lines)
    summary = FacesSummary(
        num_photos=len(photos.photos),
        num_skipped=len(done),
        num_ignored=photos.num_ignored,
        num_crops=num_crops + num_new,
        num_new=num_new,
        rejected=dict(Counter(line.reason for line in lines).most_common()),
        seconds=round(time.monotonic() - started, 3),
    )
    write_json(out / _SUMMARY, asdict(summary))
    return summary


def read_faces(folder: Path, numbers: Iterable[int] | None = None) -> Iterator[Crop]:
    """Read aligned faces back, sorted by key.

    Args:
        folder: written by :func:`write_faces`, or any folder of aligned pictures, searched with
            its subfolders. There each picture's key comes from its path (see
            :func:`dinogen.prepare.read.photo_key`), its metadata are that path alone, and what is
            no plain RGB JPEG or PNG is encoded anew as PNG, upright.
        numbers: read these faces alone, in this order; they are counted in the order of the keys.

    Raises:
        PrepareError: the folder is missing or empty (at once), or a file cannot be used (when it
            is reached).
    """
    pictures, written = _list_faces(folder)
    chosen = pictures if numbers is None else (pictures[number] for number in numbers)
    return (_read_written(photo) if written else _read_plain(photo) for photo in chosen)


def read_metas(folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Key and metadata of every face that :func:`read_faces` reads, without its picture."""
    pictures, written = _list_faces(folder)
    return (_read_meta(photo) if written else (photo.key, _plain_meta(photo)) for photo in pictures)


def faces_have_captions(folder: Path) -> bool:
    """Whether any face that :func:`read_faces` reads has a caption."""
    return has_captions(photo.path for photo in find_photos(folder).photos)


def _list_faces(folder: Path) -> tuple[list[Photo], bool]:
    """The pictures in the order of their keys, and whether write_faces wrote them."""
    pictures = find_photos(folder).photos
    if (folder / SETTINGS).is_file():
        return sorted(pictures, key=lambda picture: picture.path.stem), True
    return sorted(pictures, key=lambda picture: picture.key), False


def _read_meta(picture: Photo) -> tuple[str, dict[str, Any]]:
    meta = read_json(picture.path.with_suffix(".json"))
    return meta.pop("key"), meta


def _plain_meta(picture: Photo) -> dict[str, Any]:
    return {"source": picture.source}


def _read_written(picture: Photo) -> Crop:
    key, meta = _read_meta(picture)
    caption = read_caption(picture.path)
    return Crop(key, picture.path.read_bytes(), picture.path.suffix[1:], meta, caption)


def _read_plain(picture: Photo) -> Crop:
    """An image as it lies there, or encoded again where another program would show it otherwise.

    Raises:
        UnusableImage: it is damaged, or no image that can be read.
    """
    try:
        found, data = decode_photo(picture.path, FacesConfig().max_pixels)
    except Unusable as error:
        raise UnusableImage(picture, error) from None
    meta, caption = _plain_meta(picture), read_caption(picture.path)
    image_format = {"JPEG": "jpg", "PNG": "png"}.get(found.kind.name)
    if image_format and found.plain:
        return Crop(picture.key, data, image_format, meta, caption)
    buffer = io.BytesIO()
    Image.fromarray(found.pixels).save(buffer, "PNG")
    return Crop(picture.key, buffer.getvalue(), "png", meta, caption)


def _finished(out: Path, photo: Photo, config: FacesConfig) -> list[dict[str, Any]]:
    """The metadata of a photo's crops, or nothing unless all of them are there."""
    if not (out / f"{photo.key}.{config.format}").exists():
        return []
    first = read_json(out / f"{photo.key}.json")
    keys = [photo.key, *(f"{photo.key}_{i}" for i in range(1, first["num_crops"]))]
    if not all((out / f"{key}.{config.format}").exists() for key in keys):
        return []
    return [first, *(read_json(out / f"{key}.json") for key in keys[1:])]


def _write_rejected(path: Path, rejections: list[Rejection]) -> None:
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(["source", "reason", "detail"])
    writer.writerows([line.source, line.reason, line.detail] for line in rejections)
    write_text(path, buffer.getvalue())
