"""Cuts an aligned square out of a photo.

Points are in pixels with (0, 0) at the outer corner of the first pixel, so pixel i reaches from i
to i + 1 and its centre is at i + 0.5. The detector's landmarks are such points. So a crop of 64 is
the same view as a crop of 256 shrunk to a quarter, and x on a photo of width W is W - x on its
mirror image, whose crop is the mirrored crop.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, floor

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image
from scipy.ndimage import gaussian_filter
from skimage.transform import SimilarityTransform

# Left eye, right eye, nose, left and right corner of the mouth on a 128 x 128 image.
REFERENCE = ((38.0, 51.0), (90.0, 51.0), (64.0, 71.0), (45.0, 95.0), (83.0, 95.0))

Points = Sequence[tuple[float, float]]


class AlignError(ValueError):
    """The points define no square: they coincide, or are not finite."""


@dataclass(frozen=True)
class Square:
    """A square on a photo, possibly rotated and reaching beyond its edge.

    Attributes:
        centre: ``(2,)`` x, y, pixels.
        right: ``(2,)`` from the centre to the middle of the crop's right side; its length is
            half the side.
    """

    centre: NDArray[np.float64]
    right: NDArray[np.float64]

    @property
    def down(self) -> NDArray[np.float64]:
        """From the centre to the middle of the crop's lower side."""
        return np.array([-self.right[1], self.right[0]])

    @property
    def side(self) -> float:
        """Pixels."""
        return 2 * float(np.hypot(*self.right))

    def bounds(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Least and greatest x, y of its corners."""
        reach = np.abs(self.right) + np.abs(self.down)
        return self.centre - reach, self.centre + reach


def align_landmarks(photo: NDArray[np.uint8], landmarks: Points, size: int) -> NDArray[np.uint8]:
    """Move five points onto the reference by rotation, scale and shift (Umeyama 1991).

    Args:
        photo: ``(H, W, 3)`` uint8 RGB.
        landmarks: left eye, right eye, nose, left and right corner of the mouth, pixels.
        size: side of the crop, pixels. The points are moved to :data:`REFERENCE` times
            ``size / 128``.

    Returns:
        ``(size, size, 3)`` uint8; outside the photo its mirror image.

    Raises:
        AlignError: the points coincide.
    """
    points = np.asarray(landmarks, np.float64)
    to_crop = np.isfinite(points).all() and SimilarityTransform.from_estimate(
        points, np.array(REFERENCE)
    )
    if not to_crop or to_crop.scale <= 0:
        raise AlignError(f"landmarks {_show(landmarks)} define no similarity transform")
    centre, right = to_crop.inverse(np.array([[64.0, 64.0], [128.0, 64.0]]))
    return extract(photo, Square(centre, right - centre), size)


def align_ffhq(photo: NDArray[np.uint8], landmarks: Points, size: int) -> NDArray[np.uint8]:
    """Cut out the square of the FFHQ data set (Karras et al. 2019, appendix A, recreate_aligned).

    The square is aligned with the eyes and with the line from eyes to mouth; its side is 4 times
    the distance of the eyes or 3.6 times that from eyes to mouth, whichever is larger. If the
    photo ends inside it, the photo is mirrored, blurred and faded to its median colour. FFHQ
    computes the eyes' centres as means of six landmarks each; here they are landmarks themselves.

    Args:
        photo: ``(H, W, 3)`` uint8 RGB.
        landmarks: left eye, right eye, nose, left and right corner of the mouth, pixels.
        size: side of the crop, pixels.

    Returns:
        ``(size, size, 3)`` uint8.

    Raises:
        AlignError: the points coincide.
    """
    left_eye, right_eye, _, left_mouth, right_mouth = np.asarray(landmarks, np.float64)
    eyes = (left_eye + right_eye) / 2
    eye_to_eye = right_eye - left_eye
    eye_to_mouth = (left_mouth + right_mouth) / 2 - eyes
    direction = eye_to_eye + np.array([eye_to_mouth[1], -eye_to_mouth[0]])
    length = float(np.hypot(*direction))
    half = max(2.0 * np.hypot(*eye_to_eye), 1.8 * np.hypot(*eye_to_mouth))
    if not (np.isfinite(half) and length > 0 and half > 0):
        raise AlignError(f"landmarks {_show(landmarks)} define no FFHQ square")
    square = Square(eyes + 0.1 * eye_to_mouth, direction / length * half)
    return extract(photo, square, size, fade=True)


def align_box(
    photo: NDArray[np.uint8], box: Sequence[float], size: int, margin: float
) -> NDArray[np.uint8]:
    """Cut out the upright square around a face box.

    Args:
        photo: ``(H, W, 3)`` uint8 RGB.
        box: left, top, right, bottom, pixels; the square has the same centre, and its side is the
            longer one of the box.
        size: side of the crop, pixels.
        margin: added on each of the four sides, as a fraction of the square's side.

    Returns:
        ``(size, size, 3)`` uint8; outside the photo its mirror image.

    Raises:
        AlignError: the box has no area.
    """
    left, top, right, bottom = box
    half = max(right - left, bottom - top) * (0.5 + margin)
    if not (np.isfinite(half) and half > 0):
        raise AlignError(f"box {tuple(box)} has no area")
    centre = np.array([(left + right) / 2, (top + bottom) / 2])
    return extract(photo, Square(centre, np.array([half, 0.0])), size)


def centre_crop(photo: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    """Cut out the largest centred square: ``(H, W, 3)`` -> ``(size, size, 3)``, uint8 RGB."""
    height, width = photo.shape[:2]
    half = min(height, width) / 2
    return extract(photo, Square(np.array([width / 2, height / 2]), np.array([half, 0.0])), size)


def whole(photo: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    """The whole photo, squeezed to a square: ``(H, W, 3)`` -> ``(size, size, 3)``, uint8 RGB."""
    resized = Image.fromarray(photo).resize((size, size), Image.Resampling.LANCZOS)
    return np.asarray(resized)


def extract(
    photo: NDArray[np.uint8], square: Square, size: int, fade: bool = False
) -> NDArray[np.uint8]:
    """Resample a square of a photo: bicubic, with antialias when shrinking.

    Args:
        photo: ``(H, W, 3)`` uint8 RGB.
        square: what to cut out.
        size: side of the result, pixels.
        fade: blur the photo's mirrored surroundings and fade them to its median colour, as FFHQ
            does, instead of only mirroring.

    Returns:
        ``(size, size, 3)`` uint8.
    """
    zoom = size / square.side
    # Shrunk along the pixel grid first, where antialias is exact and cheap. At 1.5 times the final
    # resolution, the rotation (sampled at twice the final resolution) aliases no detail into what
    # the last halving keeps, at any angle.
    shrink = min(1.0, 1.5 * zoom)
    low, high = square.bounds()
    margin = 4 / shrink
    region, origin, scale = _region(photo, low - margin, high + margin, shrink)
    low, high = (low - origin) * scale, (high - origin) * scale
    start = np.floor(low).astype(int) - 3
    stop = np.ceil(high).astype(int) + 3
    columns = _mirror(start[0], stop[0], region.shape[1])
    rows = _mirror(start[1], stop[1], region.shape[0])
    window = region[rows[:, None], columns]
    if fade and _leaves(photo, square):
        window = _fade(window, photo, square, origin + start / scale, scale)
    samples = size if zoom >= 1 else 2 * size
    corner = (square.centre - square.right - square.down - origin) * scale - start
    step_x = 2 * square.right * scale / samples
    step_y = 2 * square.down * scale / samples
    crop = Image.fromarray(window).transform(
        (samples, samples),
        Image.Transform.AFFINE,
        (step_x[0], step_y[0], corner[0], step_x[1], step_y[1], corner[1]),
        Image.Resampling.BICUBIC,
    )
    if samples != size:
        crop = crop.resize((size, size), Image.Resampling.LANCZOS)
    return np.asarray(crop)


def _region(
    photo: NDArray[np.uint8], low: NDArray[np.float64], high: NDArray[np.float64], shrink: float
) -> tuple[NDArray[np.uint8], NDArray[np.float64], NDArray[np.float64]]:
    """The part of the photo that a window needs, shrunk; its corner, and its scale."""
    spans = []
    for length, first, last in zip(photo.shape[1::-1], low, high, strict=True):
        # Mirroring may reach any depth, so if the window leaves the photo all of it is kept.
        leaves = first < 0 or last > length
        spans.append((0, length) if leaves else (floor(first), ceil(last)))
    (left, right), (top, bottom) = spans
    part = photo[top:bottom, left:right]
    size = [max(1, round((b - a) * shrink)) for a, b in spans]
    if shrink < 1:
        part = np.asarray(
            Image.fromarray(part).resize(
                (size[0], size[1]), Image.Resampling.LANCZOS, reducing_gap=3
            )
        )
    scale = np.array(part.shape[1::-1]) / np.array([right - left, bottom - top])
    return part, np.array([left, top], np.float64), scale


def _mirror(start: int, stop: int, length: int) -> NDArray[np.int64]:
    """Indices ``start`` to ``stop - 1`` reflected into a row of ``length``; its ends repeat."""
    position = np.arange(start, stop) % (2 * length)
    return np.minimum(position, 2 * length - 1 - position)


def _leaves(photo: NDArray[np.uint8], square: Square) -> bool:
    """Whether the square comes within FFHQ's 4 pixels of the photo's edge."""
    low, high = square.bounds()
    return bool((low < 4).any() or (high > np.array(photo.shape[1::-1]) - 4).any())


def _fade(
    window: NDArray[np.uint8],
    photo: NDArray[np.uint8],
    square: Square,
    origin: NDArray[np.float64],
    scale: NDArray[np.float64],
) -> NDArray[np.uint8]:
    """FFHQ's surroundings; ``origin`` and ``scale`` say where the window is on the photo."""
    low, high = square.bounds()
    border = max(round(0.1 * square.side), 3)
    depth = []
    for axis in (0, 1):
        length = photo.shape[1 - axis]
        place = origin[axis] + (np.arange(window.shape[1 - axis]) + 0.5) / scale[axis]
        before = max(border - low[axis], 0.3 * square.side)
        after = max(high[axis] + border - length, 0.3 * square.side)
        depth.append(np.maximum(-place / before, (place - length) / after))
    # 0 at the photo's edge, 1 at the far end of the surroundings, negative inside the photo
    outside = np.maximum(depth[0][None, :], depth[1][:, None])[..., None].astype(np.float32)
    pixels = window.astype(np.float32)
    sigma = 0.02 * square.side * float(scale.mean())
    blurred = gaussian_filter(pixels, (sigma, sigma, 0))
    pixels += (blurred - pixels) * np.clip(3 * outside + 1, 0, 1)
    pixels += (np.median(pixels, axis=(0, 1)) - pixels) * np.clip(outside, 0, 1)
    return np.rint(pixels).clip(0, 255).astype(np.uint8)


def _show(landmarks: ArrayLike) -> str:
    return str(np.asarray(landmarks).round(1).tolist())
