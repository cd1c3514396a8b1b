"""Reads the photos to project, and cuts and shrinks them as the images of a run were."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import ValidationError
from torch import Tensor

from dinogen.config import Config, FacesConfig
from dinogen.errors import UserError
from dinogen.prepare.faces.crop import Crop
from dinogen.prepare.faces.settings import landmark_offset_of
from dinogen.prepare.faces.stream import iter_faces
from dinogen.prepare.photos.find import Photo, Photos, find_photos, photo_key
from dinogen.prepare.photos.read import PrepareError, Unusable, read_photo
from dinogen.training.data import open_data
from shards.errors import ShardsError
from shards.image.decode import decode_image, shrink, write_into

log = logging.getLogger(__name__)

Pixels = NDArray[np.uint8]


@dataclass(frozen=True)
class Cutting:
    """How photos become training images.

    Attributes:
        config: of the faces.
        landmark_offset: as in :class:`dinogen.prepare.faces.detect.FaceDetector`.
        source: where the settings come from, for results.
    """

    config: FacesConfig
    landmark_offset: float
    source: str


@dataclass(frozen=True)
class Target:
    """An image to project.

    Attributes:
        name: of its folder: the photo's key, and behind it the number of its further face.
        photo: the file that it comes from.
        sha256: of that file.
        image: (3, R, R) float32 in [-1, 1].
    """

    name: str
    photo: Path
    sha256: str
    image: Tensor

    def whole_photo(self, max_pixels: int) -> Pixels | None:
        """(H, W, 3) uint8 RGB; None if it has become unreadable."""
        try:
            return read_photo(self.photo, max_pixels)
        except Unusable:
            return None


@dataclass(frozen=True)
class Rejected:
    """A photo that is not projected, and why."""

    photo: Path
    reason: str


def cutting_of(config: Config, align: bool) -> Cutting:
    """How the images of a run were cut out of photos.

    Args:
        config: of the run. The manifest of its data says how they were prepared; where they are
            gone, or are plain tars, its section ``prepare`` does.
        align: False for images that are crops already: of each the largest centred square is taken.
    """
    found, source, offset = config.prepare.faces, "prepare.faces of the run's config", 0.0
    try:
        saved = open_data(config).sets[0].manifest.prepare.get("faces") or {}
        if saved:
            settings = {key: value for key, value in saved.items() if key != "landmark_offset"}
            found, source = FacesConfig.model_validate(settings), "the manifest of the run's data"
            offset = landmark_offset_of(saved)
        else:
            log.warning("the run's data do not say how they were cut out: photos are by %s", source)
    except (UserError, ShardsError, OSError, ValidationError) as error:
        log.warning("the run's data cannot be read, so photos are cut out by %s: %s", source, error)
    own = found.model_copy(update={"max_duplicate_distance": -1, "classes": "none"})
    if not align:
        own = own.model_copy(update={"detect": "none", "fit": "crop"})
        source = "--no-align: the largest centred square"
    return Cutting(own, offset, source)


def read_targets(
    photos: Sequence[Path], cutting: Cutting, resolution: int, device: torch.device
) -> tuple[list[Target], list[Rejected], list[str]]:
    """The images of photos, those that cannot be used, and what else the user should know.

    Args:
        photos: files, and folders that hold some.
        cutting: from :func:`cutting_of`.
        resolution: R of the images; they are shrunk as for training.
        device: where faces are detected.

    Raises:
        PrepareError: there is no photo in a folder, or the data have smaller images than R.
    """
    config = cutting.config
    if config.size < resolution:
        raise PrepareError(
            f"photos would be cut to {config.size} pixels by {cutting.source}, but the stage makes "
            f"images of {resolution}: give a smaller --stage"
        )
    listed = _listed(photos)
    # With `largest` the other faces would go unsaid. The largest is the first of all.
    counts = config.which == "largest" and config.detect != "none" and not config.min_blur
    chosen = config.model_copy(update={"which": "all"}) if counts else config
    targets: list[Target] = []
    rejected: list[Rejected] = []
    notes: list[str] = []
    by_source = {photo.source: photo for photo in listed}
    used: set[str] = set()
    for item in iter_faces(
        Photos(tuple(listed)),
        chosen,
        device=device,
        with_captions=False,
        landmark_offset=cutting.landmark_offset,
    ):
        source = item.meta["source"] if isinstance(item, Crop) else item.source
        photo = by_source[source]
        if not isinstance(item, Crop):
            # a further face that is too small does not reject a photo
            if source not in used:
                used.add(source)
                rejected.append(Rejected(photo.path, f"{item.reason}: {item.detail}"))
            continue
        if source in used and counts:
            continue
        used.add(source)
        num_faces = item.meta["num_crops"]
        if num_faces > 1 and item.key == photo.key:
            what = "the largest is projected" if counts else "each is projected"
            notes.append(f"{photo.path}: {num_faces} faces: {what}, as in the run's data")
        pixels = shrink(decode_image(item.image, item.image_format), resolution)
        image = np.empty((3, resolution, resolution), np.float32)
        write_into(pixels, image)
        assert item.file is not None
        digest = str(item.file["sha256"])
        targets.append(Target(item.key, photo.path, digest, torch.from_numpy(image)))
    return targets, rejected, notes


def _listed(photos: Sequence[Path]) -> list[Photo]:
    """Each file once, by a key of its own, in the order given; a folder's photos by their paths."""
    found: list[Photo] = []
    for place in photos:
        if place.is_dir():
            found += find_photos(place).photos
        else:
            # a name that is missing is reported like a photo that cannot be read
            found.append(Photo(place, os.fspath(place), photo_key(place.name)))
    unique: dict[Path, Photo] = {}
    taken: set[str] = set()
    for photo in found:
        resolved = photo.path.resolve()
        if resolved in unique:
            continue
        path = os.fspath(photo.path)
        key = photo.key if photo.key not in taken else photo_key(path.lstrip("./"))
        taken.add(key)
        unique[resolved] = Photo(photo.path, path, key)
    return list(unique.values())
