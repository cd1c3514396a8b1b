"""A folder of aligned faces: ``dinogen faces`` writes it, the later steps read it."""

from __future__ import annotations

import csv
import io
import logging
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from dinogen.config import FacesConfig
from dinogen.files import write_json, write_text
from dinogen.prepare.faces.crop import Crop, Duplicates, Rejection
from dinogen.prepare.faces.settings import (
    SETTINGS,
    check_settings,
    exclusive_in,
    read_json,
    warn_of_offset,
)
from dinogen.prepare.faces.stream import Progress, iter_faces
from dinogen.prepare.photos.changed import emptied, gone, looks_like_an_accident
from dinogen.prepare.photos.find import Photo, Photos, counted, find_photos, kept_apart, named
from dinogen.prepare.photos.read import (
    BAD_CAPTION,
    PrepareError,
    Unusable,
    class_names,
    decode_photo,
    probe_photo,
    try_caption,
)
from dinogen.prepare.photos.summary import (
    SUMMARY,
    FacesSummary,
    replaced_words,
    summary_of,
    withdrawn_words,
)
from dinogen.prepare.written import (
    CAPTION,
    FILE,
    crops_in,
    damage_of,
    is_same,
    is_whole,
    remove_crops,
    replace_crops,
    update_caption,
    write_crop,
)
from shards.image.kinds import is_hidden

if TYPE_CHECKING:
    import torch

__all__ = [
    "Crop",
    "FaceFolder",
    "FacesSummary",
    "PrepareError",
    "Rejection",
    "iter_faces",
    "read_faces",
    "read_metas",
    "read_rejected",
    "write_faces",
    "write_rejected",
]

REJECTED = "rejected.csv"
_NUM_READERS = 8

_logger = logging.getLogger(__name__)


def write_faces(
    src: Path,
    out: Path,
    config: FacesConfig,
    *,
    with_captions: bool = True,
    withdraw: bool = False,
    device: str | torch.device = "auto",
    progress: Progress | None = None,
) -> FacesSummary:
    """Write the faces of all photos below ``src`` as ``out/KEY.jpg`` (or png) and ``KEY.json``.

    The caption of a photo, ``NAME.txt`` beside it, becomes ``KEY.txt`` of each of its faces.

    It also writes ``rejected.csv`` (source, reason, detail), ``summary.json`` and
    ``settings.json``. Photos whose crops exist are skipped; rejected photos are tried again, so a
    repaired file is used. Crops of photos that are gone are removed, and those of photos whose
    file was replaced are made again; the same holds for captions. After a kill the same call
    completes the folder.

    Args:
        src: folder of photos.
        out: folder to write; created if missing.
        config: what is accepted, and how it is cut out.
        with_captions: whether captions are read.
        withdraw: crops are removed even if all or most of their photos are gone.
        device: as in :func:`iter_faces`.
        progress: as in :func:`iter_faces`.

    Raises:
        PrepareError: ``src`` is missing or holds no photo, or has no folder per class if that is
            requested; ``out`` is below ``src``, or holds something else, faces made with other
            settings, or faces of photos most of which are gone.
        OSError: ``out`` cannot be written.
    """
    started = time.monotonic()
    if out.resolve().is_relative_to(src.resolve()):
        raise PrepareError(f"{out}: is below the photos in {src}: choose a folder outside it")
    photos = _find(src, out)
    by_folder = config.classes == "folders"
    classes = class_names(src, (p.source for p in photos.photos)) if by_folder else ()
    check_settings(src, out, config, classes)  # before writing a lock into an unrelated folder
    with exclusive_in(out, "faces"):
        return _write(
            photos, src, out, config, classes, with_captions, withdraw, device, progress, started
        )


def _write(
    photos: Photos,
    src: Path,
    out: Path,
    config: FacesConfig,
    classes: tuple[str, ...],
    with_captions: bool,
    withdraw: bool,
    device: str | torch.device,
    progress: Progress | None,
    started: float,
) -> FacesSummary:
    """What :func:`write_faces` does once it has found the photos and has ``out`` to itself."""
    landmark_offset, settings = check_settings(src, out, config, classes)
    before = crops_in(out)
    withdrawn = gone(before, photos)
    # Earlier versions used hidden files as photos: those are not missing by accident.
    missing = [s for s in withdrawn if not any(map(is_hidden, s.split("/")))]
    accident = looks_like_an_accident(len(missing), len(before)) or emptied(src, before, missing)
    if not withdraw and accident:
        raise PrepareError(
            f"{src}: {len(missing)} of the {counted(len(before), 'photo')} whose crops are in "
            f"{out} {'is' if len(missing) == 1 else 'are'} gone ({named(missing)}). Nothing was "
            "removed: check that the folder is mounted and complete. If they were removed on "
            "purpose, add --withdraw"
        )
    if settings is not None:
        write_json(out / SETTINGS, settings)
    warn_of_offset(out, landmark_offset)
    if (out / SETTINGS.upper()).exists():  # a case-insensitive file system
        photos = kept_apart(photos)
    num_removed = sum(remove_crops(out, before.pop(source), config) for source in withdrawn)
    if photos.unlistable:
        _logger.warning(
            "%s: cannot be listed: crops of photos there are kept", named(photos.unlistable)
        )
    if withdrawn:
        _logger.warning("%s (%s)", withdrawn_words(len(withdrawn), num_removed), named(withdrawn))
    done: dict[str, list[dict[str, Any]]] = {}
    replaced: list[str] = []
    old: dict[str, list[dict[str, Any]]] = {}  # crops that stay until new ones exist
    rejections: dict[str, list[Rejection]] = {}
    for photo in photos.photos:
        metas = before.get(photo.source)
        if not metas:
            continue
        if is_whole(out, photo, metas, config):
            if is_same(out, photo, metas, config):
                done[photo.key] = metas
                continue
            if damage := damage_of(photo, config):
                done[photo.key] = metas
                rejections[photo.source] = [damage]
                _logger.warning(
                    "%s: was replaced by a file that cannot be read (%s): its crops are kept",
                    photo.source,
                    damage.reason,
                )
                continue
            replaced.append(photo.source)
        old[photo.source] = metas
    if replaced:
        _logger.warning("%s (%s)", replaced_words(len(replaced)), named(replaced))
    duplicates = Duplicates(config.max_duplicate_distance)
    used: set[str] = set()
    for photo in photos.photos:
        if photo.key in done:
            used.add(photo.source)
            metas = done[photo.key]
            earlier = [Rejection(photo.source, *i) for i in metas[0]["rejected"]]
            rejections[photo.source] = earlier + rejections.get(photo.source, [])
            if with_captions and (bad := update_caption(out, photo, metas, config)):
                rejections[photo.source].append(Rejection(photo.source, BAD_CAPTION, bad))
            for meta in metas:
                if "phash" in meta:
                    duplicates.add(meta["key"], int(meta["phash"], 16))
    num_new = 0
    new: list[Crop] = []  # of a photo that has old crops, until they are complete
    try:
        for item in iter_faces(
            photos,
            config,
            device=device,
            skip=done.__contains__,
            progress=progress,
            duplicates=duplicates,
            with_captions=with_captions,
            landmark_offset=landmark_offset,
        ):
            if isinstance(item, Rejection):
                rejections.setdefault(item.source, []).append(item)
                remove_crops(out, old.pop(item.source, ()), config)  # there are no new ones
                continue
            source = item.meta["source"]
            if source in old:
                new.append(item)
                if len(new) == item.meta["num_crops"]:
                    replace_crops(out, old.pop(source), new, config)
                    new = []
            else:
                write_crop(out, item)
            used.add(source)
            num_new += 1
    finally:
        # In the order of the photos, also after an interruption.
        lines = [line for photo in photos.photos for line in rejections.get(photo.source, [])]
        write_rejected(out / REJECTED, lines)
    summary = summary_of(
        photos,
        used,
        (line.reason for line in lines),
        with_captions=with_captions,
        num_skipped=len(done),
        num_crops=sum(map(len, done.values())) + num_new,
        num_new=num_new,
        num_withdrawn=len(withdrawn),
        num_removed=num_removed,
        num_replaced=len(replaced),
        seconds=time.monotonic() - started,
    )
    write_json(out / SUMMARY, asdict(summary))
    return summary


class FaceFolder:
    """Aligned faces in a folder, sorted by key; the folder is listed once.

    It was written by :func:`write_faces`, or is any folder of aligned images, searched with its
    subfolders. Then each image's key comes from its path
    (:func:`dinogen.prepare.photos.find.photo_key`), its metadata are only that path, and an image
    that is not a plain RGB JPEG or PNG is encoded again as an upright PNG.

    Args:
        folder: where they are.

    Attributes:
        folder: where they are.
        written: whether :func:`write_faces` wrote it.
        faces: the files, sorted by key.
        found: all that was found.

    Raises:
        PrepareError: the folder is missing or empty.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.written = (folder / SETTINGS).is_file()
        self.found = find_photos(folder)
        self.faces = sorted(
            self.found.photos, key=lambda face: face.path.stem if self.written else face.key
        )

    def __len__(self) -> int:
        return len(self.faces)

    @property
    def has_captions(self) -> bool:
        """Whether there is a text file beside any face."""
        return any(face.has_caption for face in self.faces)

    def metas(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Key and metadata of every face, without its image.

        Raises:
            PrepareError: the metadata of a face are damaged (when it is reached).
        """
        return map(self._meta, self.faces)

    def read(
        self, numbers: Iterable[int] | None = None, with_captions: bool = True
    ) -> Iterator[Crop | Rejection]:
        """The faces, in order; a rejection for one that cannot be used.

        Args:
            numbers: only these faces, in this order; they are counted in the order of the keys.
            with_captions: whether captions beside images are read. If one cannot be used, its face
                has no caption and is followed by a rejection.

        Raises:
            PrepareError: the metadata of a face are damaged (when it is reached).
        """
        for face in self.faces if numbers is None else (self.faces[n] for n in numbers):
            caption, bad = None, ""
            if with_captions:
                caption, bad = try_caption(face.caption)
            try:
                yield (
                    self._read_written(face, caption)
                    if self.written
                    else _read_plain(face, caption)
                )
            except Unusable as error:
                yield Rejection(face.source, error.reason, error.detail)
                continue
            if bad:
                yield Rejection(face.source, BAD_CAPTION, bad)

    def drop_odd(self) -> list[Rejection]:
        """Leave out images that are not square, or of another size than most; returns them.

        Images that cannot be read are reported by :meth:`read`. What :func:`write_faces` wrote has
        one size, and is not checked.

        Raises:
            PrepareError: more than half of them would be left out.
        """
        if self.written:
            return []
        with ThreadPoolExecutor(_NUM_READERS) as pool:
            sizes = list(pool.map(_size, self.faces))
        squares = Counter(size for size in sizes if size and size[0] == size[1])
        usual = max(squares, key=lambda size: (squares[size], size)) if squares else None
        odd = [
            (face, size)
            for face, size in zip(self.faces, sizes, strict=True)
            if size is not None and size != usual
        ]
        if 2 * len(odd) > len(self.faces):
            face, size = odd[0]
            raise PrepareError(
                f"{self.folder}: {len(odd)} of "
                f"{counted(len(self.faces), 'image', 'is', 'are')} not square or of another size "
                f"than most ({face.source} is {size[0]}x{size[1]}): make them the same size with "
                "`dinogen faces` (prepare.faces.detect=none)"
            )
        dropped = {face.source for face, _ in odd}
        self.faces = [face for face in self.faces if face.source not in dropped]
        return [
            Rejection(
                face.source,
                "not_square" if size[0] != size[1] else "other_size",
                f"{size[0]}x{size[1]} pixels, most are {usual[0]}x{usual[1]}" if usual else "",
            )
            for face, size in odd
        ]

    def _meta(self, face: Photo) -> tuple[str, dict[str, Any]]:
        if not self.written:
            return face.key, _plain_meta(face)
        meta = read_json(face.path.with_suffix(".json"))
        meta.pop(FILE, None)
        meta.pop(CAPTION, None)
        return meta.pop("key"), meta

    def _read_written(self, face: Photo, caption: str | None) -> Crop:
        key, meta = self._meta(face)
        return Crop(key, face.path.read_bytes(), face.path.suffix[1:], meta, caption)


def read_faces(folder: Path) -> Iterator[Crop]:
    """Read aligned faces back, sorted by key; see :class:`FaceFolder`.

    Raises:
        PrepareError: the folder is missing or empty (at once), or a file cannot be used (when it
            is reached).
    """

    def crops() -> Iterator[Crop]:
        for item in faces.read():
            if isinstance(item, Rejection):
                raise PrepareError(f"{folder / item.source}: {item.reason}: {item.detail}")
            yield item

    faces = FaceFolder(folder)
    return crops()


def read_metas(folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Key and metadata of every face that :func:`read_faces` reads, without its image."""
    return FaceFolder(folder).metas()


def write_rejected(path: Path, rejections: Iterable[Rejection]) -> None:
    """Write the list of what is not used: source, reason and detail of each."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(["source", "reason", "detail"])
    writer.writerows([line.source, line.reason, line.detail] for line in rejections)
    write_text(path, buffer.getvalue())


def read_rejected(path: Path) -> list[Rejection]:
    """What :func:`write_rejected` wrote; empty if there is no such file."""
    try:
        with path.open(encoding="utf-8", newline="") as file:
            return [
                Rejection(s, r, d) for s, r, d in (row for row in csv.reader(file) if len(row) == 3)
            ][1:]
    except OSError:
        return []


def _plain_meta(face: Photo) -> dict[str, Any]:
    return {"source": face.source}


def _size(face: Photo) -> tuple[int, int] | None:
    try:
        return probe_photo(face.path, FacesConfig().max_pixels)
    except Unusable:
        return None


def _read_plain(face: Photo, caption: str | None) -> Crop:
    """An image as it is, or encoded again if other programs would show it differently.

    Raises:
        Unusable: it is damaged, or not an image that can be read.
    """
    found, data = decode_photo(face.path, FacesConfig().max_pixels)
    meta = _plain_meta(face)
    image_format = {"JPEG": "jpg", "PNG": "png"}.get(found.kind.name)
    if image_format and found.plain:
        return Crop(face.key, data, image_format, meta, caption)
    buffer = io.BytesIO()
    Image.fromarray(found.pixels).save(buffer, "PNG")
    return Crop(face.key, buffer.getvalue(), "png", meta, caption)


def _find(src: Path, out: Path) -> Photos:
    """The photos; if there are none, the error says what that means for existing crops."""
    try:
        return find_photos(src)
    except PrepareError as error:
        if (out / SETTINGS).is_file() and crops_in(out):
            raise PrepareError(
                f"{error}. {out} still holds crops of photos from there: if those were removed on "
                f"purpose, delete {out}"
            ) from None
        raise
