"""What a stage is trained on: the batches of its stream, the reference batch, and augmentation."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from dinogen.batch import Batch
from dinogen.config import AugmentConfig
from dinogen.distributed import process_group, rng
from dinogen.training.data import check_labels
from dinogen.training.state import StageState
from dinogen.transfer import to_device
from shards.read.stream import Stream


@dataclass(frozen=True)
class Loaded:
    """A batch, and what reading it has met.

    Attributes:
        batch: on the device, but for positions and keys.
        num_skipped: damaged samples that were replaced, up to this batch.
    """

    batch: Batch
    num_skipped: int


class Dataloader:
    """Endless batches of this rank from where the stage is; a context, to be closed.

    Args:
        state: the stage, fresh or resumed.

    Raises:
        ManifestError: the data lack something that the family reads.
    """

    def __init__(self, state: StageState) -> None:
        inputs, stage, progress = state.family.inputs, state.stage, state.progress
        self._streams = [
            _stream(
                state,
                stage.batch,
                state.config.seed,
                progress.nimg,
                inputs.image_size,
                inputs.per_class,
            )
        ]
        if inputs.reference_batch:
            num_steps = (progress.nimg - state.plan.start) // stage.batch
            # the purpose of earlier versions: another one would give other batches
            first, second = rng.derive(state.config.seed, f"bank/{stage.resolution}")
            seed, start = first << 32 | second, num_steps * inputs.reference_batch
            self._streams.append(_stream(state, inputs.reference_batch, seed, start, None))
        self._stack = ExitStack()
        self._family = state.family
        self._ahead = _Ahead(state.device)

    def __iter__(self) -> Iterator[Loaded]:
        return self

    def __next__(self) -> Loaded:
        batch = cast(Batch, next(self._streams[0]))
        for stream in self._streams[1:]:
            batch["reference_batch"] = cast(Batch, next(stream))
        check_labels(self._family, batch)
        num_skipped = sum(stream.num_skipped for stream in self._streams)
        return Loaded(self._ahead.send(batch), num_skipped)

    def __enter__(self) -> Dataloader:
        for stream in self._streams:
            self._stack.enter_context(stream)
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.close()


class _Ahead:
    """Sends batches to a GPU on a stream of their own, beside the steps that are queued there.

    Args:
        device: of the run; on others than GPUs batches stay where they are.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def send(self, batch: Batch) -> Batch:
        """The batch with its tensors on the device, but for the positions."""
        if self._stream is None:
            return batch
        with torch.cuda.stream(self._stream):
            sent = cast(Batch, self._sent(batch))
        torch.cuda.current_stream(self._device).wait_stream(self._stream)
        if "image" in sent:
            sent["image"] = in_unit_range(sent["image"])
        return sent

    def _sent(self, batch: Mapping[Any, Any]) -> dict[Any, Any]:
        found: dict[Any, Any] = {}
        for name, value in batch.items():
            if isinstance(value, Mapping):
                found[name] = self._sent(value)
            elif isinstance(value, Tensor) and name != "position":
                found[name] = to_device(value, self._device)
                # or its memory would be given to the next batch while a step still reads it
                found[name].record_stream(torch.cuda.current_stream(self._device))
            else:
                found[name] = value
        return found


def in_unit_range(images: Tensor) -> Tensor:
    """Bytes as float32 in [-1, 1], the same to the bit as the shards' reader makes them."""
    # a tensor, not a number: GPUs multiply by a number's reciprocal, which rounds differently
    half = torch.full((), 127.5, device=images.device)
    return (images - half) / half


def _stream(
    state: StageState,
    batch: int,
    seed: int,
    start: int,
    image_size: int | None,
    per_class: int = 0,
) -> Stream:
    config = state.config.data
    return state.data.stream(
        batch_size=batch,
        seed=seed,
        rank=process_group.rank(),
        world_size=process_group.world_size(),
        start=start,
        image_size=image_size,
        levels=state.family.inputs.levels,
        split=config.split,
        num_threads=config.num_threads,
        num_lanes=config.num_lanes,
        window_shards=config.window_shards,
        on_error=config.on_error,
        pin_memory=state.device.type == "cuda",
        # a quarter of the bytes to send
        image_dtype="uint8" if state.device.type == "cuda" else "float32",
        need_labels=state.family.inputs.labels,
        per_class=per_class,
        first=state.plan.start,
    )


# Rec. 601, as Pillow and torchvision turn RGB into grey
_LUMA = (0.299, 0.587, 0.114)


def augment(batch: Batch, seed: int, config: AugmentConfig, device: torch.device) -> Batch:
    """Flip, rotate and recolour images, in this order; a strength of 0 skips the transform.

    Args:
        batch: of its samples ``position`` (B,), indices in the global order, which decide: the same
            image is changed differently in each epoch, and in the same way on any number of ranks;
            and ``image`` (B, 3, R, R) in [-1, 1], if it is read.
        seed: of the run.
        config: strengths of the transforms.
        device: of the images.

    Returns:
        What changes: ``image`` (B, 3, R, R) in [-1, 1], and, if some images are mirrored,
        ``flipped`` (B,) bool, which. Batches without images have it too, as levels may be stored
        for both orientations.
    """

    def drawn(purpose: str) -> Tensor:
        return rng.uniform(seed, f"augment/{purpose}", batch["position"], device=device)

    changed: Batch = {}
    if config.flip:
        changed["flipped"] = drawn("flip") < config.flip
    if "image" not in batch:
        return changed
    images = batch["image"]
    if config.flip:
        images = flip(images, changed["flipped"])
    if config.rotate:
        images = rotate(images, (2 * drawn("rotate") - 1) * config.rotate)
    if config.brightness:
        images = brightness(images, 1 + (2 * drawn("brightness") - 1) * config.brightness)
    if config.contrast:
        images = contrast(images, 1 + (2 * drawn("contrast") - 1) * config.contrast)
    if config.saturation:
        images = saturation(images, 1 + (2 * drawn("saturation") - 1) * config.saturation)
    changed["image"] = images
    return changed


def flip(images: Tensor, chosen: Tensor) -> Tensor:
    """Mirror the chosen images, (B,) bool."""
    return torch.where(chosen[:, None, None, None], images.flip(3), images)


def rotate(images: Tensor, degrees: Tensor) -> Tensor:
    """Turned counter-clockwise about the centre by (B,) degrees; the border is mirrored."""
    angle = degrees * (math.pi / 180)
    cos, sin, zero = torch.cos(angle), torch.sin(angle), torch.zeros_like(angle)
    rows = [torch.stack([cos, -sin, zero], 1), torch.stack([sin, cos, zero], 1)]
    grid = F.affine_grid(torch.stack(rows, 1), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="reflection", align_corners=False)


def brightness(images: Tensor, factor: Tensor) -> Tensor:
    """Intensities in [0, 1] times (B,) factors."""
    return _blend(images, -torch.ones_like(images), factor)


def contrast(images: Tensor, factor: Tensor) -> Tensor:
    """Scale the distance from each image's mean grey by (B,) factors."""
    return _blend(images, _grey(images).mean((2, 3), keepdim=True), factor)


def saturation(images: Tensor, factor: Tensor) -> Tensor:
    """Scale the distance from each pixel's grey by (B,) factors."""
    return _blend(images, _grey(images), factor)


def _grey(images: Tensor) -> Tensor:
    weights = torch.tensor(_LUMA, device=images.device)[None, :, None, None]
    return (images * weights).sum(1, keepdim=True)


def _blend(images: Tensor, other: Tensor, factor: Tensor) -> Tensor:
    return (other + (images - other) * factor[:, None, None, None]).clamp(-1, 1)
