"""Finds faces with MTCNN: boxes, five landmarks and probabilities.

Zhang et al. 2016, Joint Face Detection and Alignment using Multi-task Cascaded Convolutional
Networks, https://arxiv.org/abs/1604.02878. The three networks and their weights are
facenet-pytorch's. The cascade around them is written here because facenet-pytorch's suppresses
boxes of one photo by those of another in the same batch if a box reaches beyond its photo, and
fails or mixes up faces if a candidate has no pixel inside the photo.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from dinogen._torchvision import ensure_torchvision
from dinogen.distributed import process_group
from dinogen.prepare.photos.read import PrepareError

ensure_torchvision()

from facenet_pytorch.models import mtcnn  # noqa: E402
from facenet_pytorch.models.utils import detect_face as cascade  # noqa: E402

MAX_SIDE = 2048  # px; larger photos are searched at this size
MIN_FACE = 20  # px; MTCNN finds many false faces below it
_WINDOW = 12  # px; what the first network looks at
_PYRAMID_FACTOR = 0.709
_THRESHOLDS = (0.6, 0.7, 0.7)
# px, x and y: a patch begins and ends at whole pixels, because cascade.pad cuts off the fractions
# of its box, but the networks' answers are relative to the original box. The authors cut the box
# itself, facenet-pytorch does not, so its points are too far right and down: by half a pixel on
# average, for any size of the face.
_CUT_OFF = 0.5


@dataclass(frozen=True)
class Detection:
    """One face, in pixels of the photo; (0, 0) is the outer corner of the first pixel.

    Attributes:
        box: left, top, right, bottom; may reach beyond the photo.
        landmarks: x, y of left eye, right eye, nose, left and right corner of the mouth, as seen
            in the image.
        probability: 0 to 1.
    """

    box: tuple[float, float, float, float]
    landmarks: tuple[tuple[float, float], ...]
    probability: float

    @property
    def side(self) -> float:
        """The shorter side of the box, pixels."""
        return min(self.box[2] - self.box[0], self.box[3] - self.box[1])


class FaceDetector:
    """MTCNN on one device.

    Args:
        device: ``auto`` (the GPU of this rank if there is one), or a torch device.
        min_face: smallest face that is searched, pixels; above 20 it has no effect, so that a
            small face can be distinguished from none.
        landmark_offset: how far too far right and down landmarks are put, pixels of the photo as
            it is searched; 0.5 in versions whose settings do not have it.

    Attributes:
        device: where the networks are.
        prefers_batches: whether photos of equal size are faster in a batch; on CPU they are faster
            in one thread each.

    Raises:
        PrepareError: there is no such device.
    """

    def __init__(
        self,
        device: str | torch.device = "auto",
        min_face: int = MIN_FACE,
        landmark_offset: float = 0.0,
    ) -> None:
        self.device = process_group.device() if device == "auto" else _device(device)
        self.prefers_batches = self.device.type != "cpu"
        self._min_face = max(_WINDOW, min(min_face, MIN_FACE))
        self._shift = landmark_offset - _CUT_OFF
        self._nets = [
            _load(net, name).to(self.device)
            for net, name in ((mtcnn.PNet, "pnet"), (mtcnn.RNet, "rnet"), (mtcnn.ONet, "onet"))
        ]
        # On CPU always the same number, because matrix products of another shape may round
        # differently; small, because photos rarely have more candidates.
        self._chunk = 8 if self.device.type == "cpu" else 256

    def detect(self, photos: Sequence[NDArray[np.uint8]], batch: int = 1) -> list[list[Detection]]:
        """Find the faces of each photo, largest box first.

        Args:
            photos: RGB, ``(H, W, 3)`` uint8, of any sizes.
            batch: largest number of photos of equal size that go through the network together.
                With 1 a photo's result is bitwise independent of other photos; otherwise it may
                differ by rounding.

        Returns:
            For each photo its faces with probability above 0.7; an empty list if there is none.
        """
        groups: dict[tuple[int, int], list[int]] = defaultdict(list)
        resized = [_limit_side(photo) for photo in photos]
        for index, photo in enumerate(resized):
            groups[photo.shape[:2]].append(index)
        found: list[list[Detection]] = [[] for _ in photos]
        for members in groups.values():
            for start in range(0, len(members), batch):
                chosen = members[start : start + batch]
                pixels = torch.from_numpy(np.stack([resized[i] for i in chosen])).to(self.device)
                with torch.inference_mode():
                    results = self._cascade(pixels.permute(0, 3, 1, 2).float())
                for index, result in zip(chosen, results, strict=True):
                    height, width = photos[index].shape[:2]
                    small_height, small_width = resized[index].shape[:2]
                    found[index] = _detections(result, width / small_width, height / small_height)
        return found

    def _cascade(self, pixels: Tensor) -> list[tuple[Tensor, Tensor]]:
        """(N, 3, H, W) of 0 to 255 -> per photo (K, 5) box and probability, (K, 5, 2) points."""
        boxes, owners = self._propose(pixels)
        boxes, owners, patches = _patches(pixels, boxes, owners, 24)
        shifts, scores = self._run(1, patches)
        boxes, owners, shifts = _pass(boxes, owners, shifts, scores[:, 1], _THRESHOLDS[1])
        keep = _suppress(boxes, owners, 0.7)
        boxes = cascade.rerec(cascade.bbreg(boxes[keep], shifts[keep]))
        boxes, owners, patches = _patches(pixels, boxes, owners[keep], 48)
        shifts, points, scores = self._run(2, patches)
        both = torch.cat([shifts, points], dim=1)
        boxes, owners, both = _pass(boxes, owners, both, scores[:, 1], _THRESHOLDS[2])
        shifts, points = both[:, :4], both[:, 4:]
        # Five x, then five y, as fractions of the patch; the boxes count pixels from 1. The boxes
        # themselves are not corrected: their sides are wrong by some pixels in either direction,
        # so half a pixel does not matter.
        sides = boxes[:, 2:4] - boxes[:, :2] + 1
        points = points.view(-1, 2, 5).transpose(1, 2) * sides[:, None] + boxes[:, None, :2] - 1
        points = points + self._shift
        boxes = cascade.bbreg(boxes, shifts).cpu()
        points, owners = points.cpu(), owners.cpu()
        results = []
        for photo in range(len(pixels)):
            mine = torch.nonzero(owners == photo)[:, 0]
            own = boxes[mine].numpy()
            if len(own):
                kept = cascade.nms_numpy(own[:, :4], own[:, 4], 0.7, "Min")
                mine = mine[torch.from_numpy(kept.astype(np.int64))]
            results.append((boxes[mine], points[mine]))
        return results

    def _propose(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """First stage: square boxes (K, 5) with score, and the photo of each (K,)."""
        height, width = pixels.shape[2:]
        scale = _WINDOW / self._min_face
        found: list[Tensor] = []
        owners: list[Tensor] = []
        groups: list[Tensor] = []  # boxes are compared within one scale of one photo
        while min(height, width) * scale >= _WINDOW:
            size = (int(height * scale + 1), int(width * scale + 1))
            shifts, scores = self._nets[0](_normalise(cascade.imresample(pixels, size)))
            boxes, owner = cascade.generateBoundingBox(shifts, scores[:, 1], scale, _THRESHOLDS[0])
            groups.append(owner + len(pixels) * len(groups))
            found.append(boxes)
            owners.append(owner)
            scale *= _PYRAMID_FACTOR
        if not found:
            return pixels.new_zeros(0, 5), pixels.new_zeros(0, dtype=torch.int64)
        boxes, owner = torch.cat(found), torch.cat(owners)
        keep = _suppress(boxes, torch.cat(groups), 0.5)
        boxes, owner = boxes[keep], owner[keep]
        keep = _suppress(boxes, owner, 0.7)
        boxes, owner = boxes[keep], owner[keep]
        sides = boxes[:, 2:4] - boxes[:, :2]
        corners = boxes[:, :4] + boxes[:, 5:] * sides.repeat(1, 2)
        return cascade.rerec(torch.cat([corners, boxes[:, 4:5]], dim=1)), owner

    def _run(self, stage: int, patches: Tensor) -> tuple[Tensor, ...]:
        """A later network on (K, 3, S, S), in chunks of one size."""
        num = len(patches)
        rest = -num % self._chunk if num else self._chunk
        padded = F.pad(_normalise(patches), (0, 0, 0, 0, 0, 0, 0, rest))
        # pools these few channels twice as fast on CPU
        padded = padded.contiguous(memory_format=torch.channels_last)
        parts = [self._nets[stage](chunk) for chunk in padded.split(self._chunk)]
        return tuple(torch.cat(part)[:num] for part in zip(*parts, strict=True))


def _device(name: str | torch.device) -> torch.device:
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise PrepareError(f"device '{name}': {reason}: use auto or cpu") from None
    return device


def _load(net: type[nn.Module], name: str) -> nn.Module:
    """A network with the weights of facenet-pytorch's wheel, read without unpickling code."""
    module = net(pretrained=False)
    path = Path(mtcnn.__file__).parents[1] / "data" / f"{name}.pt"
    module.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    return module.eval().requires_grad_(False)


def _normalise(pixels: Tensor) -> Tensor:
    return (pixels - 127.5) / 128


def _limit_side(photo: NDArray[np.uint8]) -> NDArray[np.uint8]:
    height, width = photo.shape[:2]
    shrink = MAX_SIDE / max(height, width)
    if shrink >= 1:
        return photo
    size = (max(1, round(width * shrink)), max(1, round(height * shrink)))
    return np.asarray(
        Image.fromarray(photo).resize(size, Image.Resampling.BILINEAR, reducing_gap=2)
    )


def _patches(
    pixels: Tensor, boxes: Tensor, owners: Tensor, size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Cut out each box that has a pixel inside its photo; also those boxes and their photos."""
    height, width = pixels.shape[2:]
    tops, bottoms, lefts, rights = cascade.pad(boxes, width, height)
    inside = np.flatnonzero((bottoms >= tops) & (rights >= lefts))
    photo_of = owners.tolist()
    patches = [
        cascade.imresample(
            pixels[photo_of[i], None, :, tops[i] - 1 : bottoms[i], lefts[i] - 1 : rights[i]],
            (size, size),
        )
        for i in inside
    ]
    kept = torch.from_numpy(inside).to(boxes.device)
    return (
        boxes[kept],
        owners[kept],
        torch.cat(patches) if patches else pixels.new_zeros(0, 3, size, size),
    )


def _pass(
    boxes: Tensor, owners: Tensor, values: Tensor, scores: Tensor, threshold: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Keep boxes that score above the threshold, with the new score in the boxes."""
    good = scores > threshold
    return torch.cat([boxes[good, :4], scores[good, None]], dim=1), owners[good], values[good]


def _suppress(boxes: Tensor, groups: Tensor, threshold: float) -> Tensor:
    """Indices of the boxes (K, 5 or more) that survive within their group, best score first."""
    from torchvision.ops import batched_nms

    if not len(boxes):
        return groups
    # batched_nms moves the groups apart by their largest coordinate: without negative ones they
    # cannot overlap again, and in float64 the shift does not change any overlap.
    corners = boxes[:, :4].double()
    kept: Tensor = batched_nms(corners - corners.min(), boxes[:, 4].double(), groups, threshold)
    return kept


def _detections(
    result: tuple[Tensor, Tensor], stretch_x: float, stretch_y: float
) -> list[Detection]:
    """To pixels of the photo, largest box first; equal ones from left to right."""
    stretch = np.array([stretch_x, stretch_y])
    boxes, points = (part.numpy().astype(np.float64) for part in result)
    faces = [
        Detection(
            box=tuple((box[:4].reshape(2, 2) * stretch).ravel().tolist()),
            landmarks=tuple((float(x), float(y)) for x, y in point * stretch),
            probability=float(box[4]),
        )
        for box, point in zip(boxes, points, strict=True)
    ]

    def rank(face: Detection) -> tuple[float, ...]:
        left, top, right, bottom = face.box
        return (-(right - left) * (bottom - top), left, top)

    return sorted(faces, key=rank)
