"""Turns one photo into aligned face crops, or into the reasons why there are none."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import imagehash
import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy.ndimage import laplace

from dinogen.config import FacesConfig
from dinogen.prepare.faces import align
from dinogen.prepare.photos.changed import FileRecord, record_of
from dinogen.prepare.photos.find import Photo
from dinogen.prepare.photos.read import NO_CLASS, NO_CLASS_REMEDY, Unusable, has_class, read_photo
from shards.image.decode import decode_image

if TYPE_CHECKING:
    from dinogen.prepare.faces.detect import Detection, FaceDetector


_ROUNDING = 8  # of 255

Pixels = NDArray[np.uint8]


@dataclass(frozen=True)
class Crop:
    """One aligned face, or one photo as it is.

    Attributes:
        key: the photo's key; with ``which: all`` followed by ``_1``, ``_2``, ... for its second,
            third, ... accepted face.
        image: encoded RGB image, ``size`` x ``size`` pixels.
        image_format: ``jpg`` or ``png``.
        meta: JSON values. ``source`` (path relative to the folder searched), ``original_size``
            ([width, height] of the upright photo, pixels), ``size`` (pixels), ``blur``
            (variance of the Laplacian), ``num_crops`` (of this photo) and ``rejected`` ([reason,
            detail] of this photo's other faces, in its first crop only); if faces are detected
            ``align``, ``box`` ([left, top, right, bottom], pixels), ``landmarks`` (five [x, y],
            pixels) and ``probability``, else ``fit``; if duplicates are searched ``phash`` (16
            hex digits). For an existing image without metadata only ``source``.
        caption: of the photo, if there is a text file beside it.
        file: identifies the photo's file, see
            :func:`dinogen.prepare.photos.changed.record_of`; it is not part of a dataset.
    """

    key: str
    image: bytes
    image_format: str
    meta: dict[str, Any] = field(default_factory=dict)
    caption: str | None = None
    file: FileRecord | None = field(default=None, compare=False)


@dataclass(frozen=True)
class Rejection:
    """One photo, or one face of it, that is not used.

    Attributes:
        source: the photo's path relative to the folder searched.
        reason: ``unreadable``, ``empty``, ``not_an_image``, ``truncated``, ``corrupt``,
            ``too_large``, ``unsupported``, ``no_face``, ``low_probability``, ``small_face``,
            ``bad_landmarks``, ``blurred`` or ``duplicate``; ``no_class`` if classes are folders
            and it is in none; ``bad_caption`` for a photo that is used without its caption.
        detail: what was found, for a person.
        file: as in :class:`Crop`, for a photo none of whose faces is used.
    """

    source: str
    reason: str
    detail: str
    file: FileRecord | None = field(default=None, compare=False)


@dataclass(frozen=True)
class Candidate:
    """A crop before the comparison with other photos' crops."""

    image: bytes
    meta: dict[str, Any]
    phash: int | None


@dataclass
class Result:
    """The outcome for one photo; ``file`` identifies its file."""

    photo: Photo
    candidates: list[Candidate] = field(default_factory=list)
    rejected: list[tuple[str, str]] = field(default_factory=list)
    file: FileRecord | None = None


def read(photo: Photo, config: FacesConfig) -> Pixels | Unusable:
    """The photo's ``(H, W, 3)`` uint8 RGB pixels, or why it cannot be used."""
    # A folder that cannot be listed is in the list of photos too, and may be a class.
    if config.classes == "folders" and not has_class(photo.source) and not photo.path.is_dir():
        return Unusable(NO_CLASS, NO_CLASS_REMEDY)
    try:
        return read_photo(photo.path, config.max_pixels)
    except Unusable as error:
        return error


def read_and_cut(photo: Photo, config: FacesConfig, detector: FaceDetector | None) -> Result:
    """All steps for one photo; without a detector the whole image is one face."""
    pixels = read(photo, config)
    if detector is None or isinstance(pixels, Unusable):
        return cut(photo, pixels, config, None)
    return cut(photo, pixels, config, detector.detect([pixels])[0])


def cut(
    photo: Photo,
    pixels: Pixels | Unusable,
    config: FacesConfig,
    detections: Sequence[Detection] | None,
) -> Result:
    """Align, check and encode the accepted faces of one photo.

    Args:
        photo: the photo.
        pixels: ``(H, W, 3)`` uint8 RGB, or why there are none.
        config: what is accepted, and how it is cut out.
        detections: faces, largest first; None uses the whole image as one face.
    """
    record = record_of(photo.path)
    if isinstance(pixels, Unusable):
        return Result(photo, rejected=[(pixels.reason, pixels.detail)], file=record)
    result = Result(photo, file=record)
    faces: Sequence[Detection | None] = [None]
    if detections is not None:
        faces, result.rejected = _select(detections, config)
    for face in faces:
        try:
            crop = _align(pixels, face, config)
        except align.AlignError as error:
            result.rejected.append(("bad_landmarks", str(error)))
            continue
        blur = laplacian_variance(crop)
        if blur < config.min_blur:
            detail = f"variance of Laplacian {blur:.1f}, minimum {config.min_blur:g}"
            result.rejected.append(("blurred", detail))
            continue
        phash = perceptual_hash(crop) if config.max_duplicate_distance >= 0 else None
        meta = _meta(photo, pixels, face, blur, phash, config)
        result.candidates.append(Candidate(_encode(crop, config), meta, phash))
    return result


def still_matches(
    photo: Photo, metas: Sequence[dict[str, Any]], images: Sequence[bytes], config: FacesConfig
) -> bool:
    """Whether crops of an earlier version match a photo as it is now.

    They are cut out again at the stored positions, without detection, and compared. Landmarks are
    rounded in the metadata, so pixels may differ slightly.

    Args:
        photo: the photo.
        metas: of its crops.
        images: its crops, encoded.
        config: how they were cut out.
    """
    from dinogen.prepare.faces.detect import Detection

    try:
        pixels = read_photo(photo.path, config.max_pixels)
        for meta, image in zip(metas, images, strict=True):
            if meta["original_size"] != [pixels.shape[1], pixels.shape[0]]:
                return False
            face = None
            if "landmarks" in meta:
                left, top, right, bottom = meta["box"]
                points = tuple((x, y) for x, y in meta["landmarks"])
                face = Detection((left, top, right, bottom), points, meta["probability"])
            crop = _encode(_align(pixels, face, config), config)
            now, before = (
                decode_image(data, config.format).astype(np.int16) for data in (crop, image)
            )
            if now.shape != before.shape or np.abs(now - before).max() > _ROUNDING:
                return False
    except (Unusable, align.AlignError, ValueError, KeyError, TypeError):
        return False
    return True


def _select(
    detections: Sequence[Detection], config: FacesConfig
) -> tuple[list[Detection], list[tuple[str, str]]]:
    """The faces that are used, and the reasons why others are not."""
    good = []
    unlikely = []
    small = []
    for face in detections:
        if face.probability < config.min_probability:
            detail = f"{face.probability:.3f}, minimum {config.min_probability:g}"
            unlikely.append(("low_probability", detail))
        elif face.side < config.min_face:
            small.append(("small_face", f"{face.side:.0f} px, minimum {config.min_face}"))
        else:
            good.append(face)
    rejected = [*small, *unlikely] or [("no_face", "no face found")]
    if config.which == "all":
        return good, rejected if small or unlikely or not good else []
    # One line per photo: the face that came closest to being used.
    return good[:1], [] if good else rejected[:1]


def _align(pixels: Pixels, face: Detection | None, config: FacesConfig) -> Pixels:
    if face is None:
        cut_out = align.whole if config.fit == "resize" else align.centre_crop
        return cut_out(pixels, config.size)
    if config.align == "landmarks":
        return align.align_landmarks(pixels, face.landmarks, config.size)
    if config.align == "ffhq":
        return align.align_ffhq(pixels, face.landmarks, config.size)
    return align.align_box(pixels, face.box, config.size, config.margin)


def _meta(
    photo: Photo,
    pixels: Pixels,
    face: Detection | None,
    blur: float,
    phash: int | None,
    config: FacesConfig,
) -> dict[str, Any]:
    meta: dict[str, Any] = {
        "source": photo.source,
        "original_size": [pixels.shape[1], pixels.shape[0]],
        "size": config.size,
        "blur": round(blur, 3),
    }
    if face is None:
        meta["fit"] = config.fit
    else:
        meta["align"] = config.align
        meta["box"] = [round(value, 3) for value in face.box]
        meta["landmarks"] = [[round(x, 3), round(y, 3)] for x, y in face.landmarks]
        meta["probability"] = round(face.probability, 6)
    if phash is not None:
        meta["phash"] = f"{phash:016x}"
    return meta


def _encode(crop: Pixels, config: FacesConfig) -> bytes:
    buffer = io.BytesIO()
    image = Image.fromarray(crop)
    if config.format == "png":
        image.save(buffer, "PNG")
    else:
        image.save(buffer, "JPEG", quality=config.quality, subsampling="4:4:4")
    return buffer.getvalue()


def laplacian_variance(image: NDArray[np.uint8]) -> float:
    """Variance of the Laplacian of the luma (Pech-Pacheco et al. 2000); low means blurred.

    It depends on the image's size, so compare only crops of one size.

    Args:
        image: ``(H, W, 3)`` uint8 RGB.

    Returns:
        Squared grey levels (0 to 255), 0 for a flat image.
    """
    luma = np.asarray(Image.fromarray(image).convert("L"), np.float32)
    return float(laplace(luma).var())


def perceptual_hash(image: NDArray[np.uint8]) -> int:
    """64-bit DCT hash (``imagehash.phash``) of ``(H, W, 3)`` uint8 RGB; similar if close."""
    return int(str(imagehash.phash(Image.fromarray(image))), 16)


class Duplicates:
    """The hashes accepted so far; the first of several near-duplicates is kept.

    Args:
        max_distance: hashes that differ in this many bits or fewer (0 to 64) are duplicates.
    """

    def __init__(self, max_distance: int) -> None:
        self._max_distance = max_distance
        self._keys: list[str] = []
        self._hashes = np.zeros(1024, np.uint64)

    def find(self, value: int) -> tuple[str, int] | None:
        """Key and distance in bits of the nearest accepted hash, if it is near enough.

        The first accepted one if several are equally near.
        """
        known = self._hashes[: len(self._keys)]
        if not len(known):
            return None
        distances = np.bitwise_count(known ^ np.uint64(value))
        nearest = int(distances.argmin())
        distance = int(distances[nearest])
        return (self._keys[nearest], distance) if distance <= self._max_distance else None

    def add(self, key: str, value: int) -> None:
        """Accept the hash of the crop ``key``."""
        if len(self._keys) == len(self._hashes):
            self._hashes = np.concatenate([self._hashes, np.zeros_like(self._hashes)])
        self._hashes[len(self._keys)] = value
        self._keys.append(key)
