"""Videos of walks through the latents of a run, ``dinogen video``."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dinogen.errors import UserError
from dinogen.families.abilities import (
    AddsNoise,
    AdjustsSampling,
    LatentSpace,
    adjustable,
    decode_in,
    num_classes_of,
    spaces_of,
    to_space,
    truncates,
)
from dinogen.files import why_not_writable
from dinogen.hub import working_path
from dinogen.projection.latents import Projected, as_projected, read_projected, snapshot_of
from dinogen.report.images import to_uint8
from dinogen.report.video import (
    MISSING,
    can_write_mp4,
    check_frames,
    check_video,
    enlarged,
    tiled,
    write_video,
)
from dinogen.runs.layout import checkpoint_name
from dinogen.training.checkpointing.snapshot import Snapshot, load_snapshot
from dinogen.visualize.drawings import linear, spherical
from dinogen.visualize.latents import in_layers, layers_of
from dinogen.visualize.scene import PIXELS_PER_PART

log = logging.getLogger(__name__)

Pixels = NDArray[np.uint8]
LAYERS = ("coarse", "fine")


@dataclass(frozen=True)
class VideoRequest:
    """A walk.

    Attributes:
        run: folder of a run, an exported file, or an address of the hub.
        out: ``*.mp4`` or ``*.gif``; in ``RUN/videos`` unless given.
        keys: latents that each image of the grid walks through, by the seed.
        seed: of the latents.
        latents: files of projections, or folders of them, to walk through instead.
        columns: of the grid.
        rows: of the grid.
        size: side of each image in pixels; that of the stage unless given.
        seconds: length.
        fps: frames per second.
        space: of the walk; ``w`` where the family has it, else ``z``, unless given.
        layers: ``coarse`` or ``fine``: only that half of the layers walks, and the others stay at
            the first latents; None: all walk.
        psi: truncation, 1 for none.
        label: class of all images; None: of each as samples have it.
        steps: of DDIM, for diffusion.
        loop: whether the walk leads back to its beginning.
        resolution: the stage; the largest trained unless given.
        nimg: the checkpoint; the newest unless given.
    """

    run: Path
    out: Path | None = None
    keys: int = 6
    seed: int = 0
    latents: tuple[Path, ...] = ()
    columns: int = 1
    rows: int = 1
    size: int | None = None
    seconds: float = 8.0
    fps: int = 30
    space: str | None = None
    layers: str | None = None
    psi: float = 1.0
    label: int | None = None
    steps: int | None = None
    loop: bool = True
    resolution: int | None = None
    nimg: int | None = None

    @property
    def num_frames(self) -> int:
        """At least one."""
        return max(1, round(self.seconds * self.fps))


@dataclass(frozen=True)
class Walk:
    """The latents of each frame.

    Attributes:
        snapshot: its moving averages make the images.
        space: of the latents.
        keys: (K, T, *shape): what each of the T images of a frame walks through.
        noise: (K, T, values) maps of noise of the decoder, or None for that of samples.
        indices: (T,) int64, as in ``Family.decode``.
        num_frames: of the video.
        loop: whether the last key leads back to the first.
        layers: see :class:`VideoRequest`.
    """

    snapshot: Snapshot
    space: LatentSpace
    keys: Tensor
    noise: Tensor | None
    indices: Tensor
    num_frames: int
    loop: bool
    layers: str | None

    def at(self, frame: int) -> tuple[Tensor, Tensor | None]:
        """Latents (T, *shape) of a frame, and its noise."""
        num = len(self.keys)
        # a loop ends a step before its beginning, which is shown next
        legs, steps = (num, self.num_frames) if self.loop else (num - 1, self.num_frames - 1)
        position = frame * legs / max(1, steps)
        leg = min(int(position), max(0, legs - 1))
        t = position - leg
        # Normal latents keep their length on the great circle; w has no such shell.
        between = spherical if self.space.normal else linear
        found = self._between(between, self.keys, leg, t)
        if self.layers is not None:
            found = found.clone()
            half = self.space.shape[0] // 2
            still = slice(half, None) if self.layers == "coarse" else slice(None, half)
            found[:, still] = self.keys[0][:, still]
        noise = None if self.noise is None else self._between(spherical, self.noise, leg, t)
        return found, noise

    def _between(
        self, between: Callable[[Tensor, Tensor, float], Tensor], keys: Tensor, leg: int, t: float
    ) -> Tensor:
        return between(keys[leg], keys[(leg + 1) % len(keys)], t)

    @torch.no_grad()
    def images(self) -> Iterator[Pixels]:
        """Images (T, R, R, 3) of each frame in turn; a few frames are made together."""
        device = self.snapshot.family.device
        each = len(self.indices)
        together = max(1, min(64, PIXELS_PER_PART // self.snapshot.resolution**2) // each)
        for first in range(0, self.num_frames, together):
            numbers = range(first, min(first + together, self.num_frames))
            latents, noises = zip(*(self.at(number) for number in numbers), strict=True)
            noise = None if noises[0] is None else torch.cat(noises).to(device)
            made = decode_in(
                self.snapshot.family,
                self.snapshot.ema.networks,
                self.space.name,
                torch.cat(latents).to(device),
                self.indices.repeat(len(latents)),
                noise,
            )
            pixels = to_uint8(made.float().clamp(-1, 1).cpu().numpy())
            yield from pixels.reshape(len(latents), each, *pixels.shape[1:])


Progress = Callable[[int, int], None]


def write_walk(
    request: VideoRequest, progress: Progress = lambda done, total: None
) -> tuple[Path, int]:
    """Write a walk as a video; returns its file and number of frames.

    Args:
        request: the walk.
        progress: called with the number of frames done and of all.

    Raises:
        ConfigError: no such run, stage or checkpoint.
        UserError: the family cannot do what an option asks for, or the file cannot be written.
    """
    if request.out is not None:
        check_video(request.out, request.fps)
    walk = walk_of(request)
    path = request.out or _default_path(request, walk)
    if problem := why_not_writable(path, make=True):
        raise UserError(f"{path}: cannot be written: {problem}: give --out FILE")
    size = request.size or walk.snapshot.resolution
    check_frames(path, request.columns, request.rows, size)

    def frames() -> Iterator[Pixels]:
        for number, images in enumerate(walk.images(), 1):
            yield tiled(enlarged(images, size), request.columns)
            progress(number, walk.num_frames)

    return path, write_video(path, frames(), request.fps)


def _default_path(request: VideoRequest, walk: Walk) -> Path:
    suffix = ".mp4"
    if not can_write_mp4():
        log.warning("the video is a GIF: %s", MISSING)
        suffix = ".gif"
    snapshot = walk.snapshot
    name = f"{snapshot.place.name}_{checkpoint_name(snapshot.nimg)}_{walk.space.name}"
    name += "_projected" if request.latents else f"_seed{request.seed}"
    name += f"_{request.layers}" if request.layers else ""
    path = snapshot.place.run.videos_folder / f"{name}{snapshot.mark}{suffix}"
    check_video(path, request.fps)
    return path


def walk_of(request: VideoRequest) -> Walk:
    """The latents of a request.

    Raises:
        ConfigError: no such run, stage or checkpoint.
        UserError: the family cannot do what an option asks for.
    """
    request = replace(request, run=working_path(request.run))
    if request.layers not in (None, *LAYERS):
        raise UserError(f"--layers {request.layers}: choose coarse or fine")
    return _through_projections(request) if request.latents else _through_samples(request)


def _through_projections(request: VideoRequest) -> Walk:
    """From photo to photo; the images of a grid begin at different photos."""
    for option, given in {
        "--psi": request.psi != 1,
        "--class": request.label is not None,
        "--steps": request.steps is not None,
        "--nimg": request.nimg is not None,
        "--space": request.space is not None,
        "--seed": request.seed != 0,
        "--keys": request.keys != VideoRequest.keys,
    }.items():
        if given:
            raise UserError(f"{option}: the projections of --latents settle it: leave it out")
    projected = read_projected(request.latents)
    snapshot, space = snapshot_of(request.run, projected, request.resolution)
    if len(projected) < 2:
        raise UserError("--latents: a walk needs two projections or more")
    _check_alike(projected, space)
    snapshot = as_projected(snapshot, projected[0])
    keys = torch.stack([one.latents for one in projected])
    if request.layers:
        space = layers_of(snapshot, space, "--layers")
        keys = torch.stack([in_layers(one, space) for one in keys])
    noises = [one.noise for one in projected if one.noise is not None]
    tiles = range(request.columns * request.rows)

    def spread(values: Tensor) -> Tensor:
        return torch.cat([values.roll(-tile, 0) for tile in tiles], 1)

    return Walk(
        snapshot,
        space,
        spread(keys),
        None if not noises else spread(torch.stack(noises)),
        projected[0].index.expand(len(tiles)),
        request.num_frames,
        request.loop,
        request.layers,
    )


def _check_alike(projected: list[Projected], space: LatentSpace) -> None:
    """Refuse projections between which there is no way, as their images are made differently.

    Raises:
        UserError: naming two of them.
    """

    def made_by(one: Projected) -> dict[str, Any]:
        own = {"sampling": one.settings["sampling"], "noise": one.noise is not None}
        return own | ({"label": one.settings["label"]} if space.normal else {})

    first = projected[0]
    for one in projected[1:]:
        for what, value in made_by(first).items():
            if made_by(one)[what] != value:
                raise UserError(
                    f"--latents: {one.path} and {first.path} have not the same {what}: project all "
                    "photos of a video alike"
                )


@torch.no_grad()
def _through_samples(request: VideoRequest) -> Walk:
    """Image t of a grid of T walks through the samples t, t + T, t + 2T, ... of the seed."""
    snapshot = load_snapshot(request.run, request.resolution, request.nimg)
    family = snapshot.family
    name = f"family {family.config.family.name}"
    if request.psi != 1 and not truncates(family):
        raise UserError(f"--psi: {name} does not truncate: leave it out")
    num_classes = num_classes_of(family)
    if request.label is not None and request.label >= num_classes:
        what = f"classes are 0 to {num_classes - 1}" if num_classes else "it has no classes"
        raise UserError(f"--class {request.label}: {name}: {what}")
    if isinstance(family, AdjustsSampling) and "steps" in adjustable(family):
        steps = {} if request.steps is None else {"steps": request.steps}
        noiseless = family.without_noise if isinstance(family, AddsNoise) else {}
        family = family.with_sampling({**noiseless, **steps})
        snapshot = replace(snapshot, family=family)
    elif request.steps is not None:
        raise UserError(f"--steps: {name} does not sample in steps: leave it out")
    spaces = spaces_of(family)
    layered = next((one for one in spaces.values() if one.per_layer), None)
    if request.layers and layered is None:
        raise UserError(f"--layers: {name} has no layers that can be chosen: leave it out")
    default = layered if request.layers and layered else next(iter([*spaces.values()][1:2]), None)
    chosen = request.space or (default.name if default else "z")
    if chosen not in spaces:
        raise UserError(f"--space {chosen}: {name} has {', '.join(spaces)}: choose one of them")
    space = spaces[chosen]
    if request.layers and not space.per_layer:
        raise UserError(f"--layers: latents in {chosen} have no layers: leave --space out")
    if request.psi != 1 and space.normal:
        raise UserError("--psi: z is not truncated: leave --space out")
    tiles = request.columns * request.rows
    numbers = torch.arange(request.keys * tiles)
    # the class of a walk is that of its first sample
    indices = numbers[:tiles] if request.label is None else torch.full((tiles,), request.label)
    keys = to_space(
        family,
        snapshot.ema.networks,
        chosen,
        family.latents(numbers, request.seed),
        indices.repeat(request.keys),
        request.psi,
    )
    keys = keys.unflatten(0, (request.keys, tiles)).cpu()
    return Walk(
        snapshot, space, keys, None, indices, request.num_frames, request.loop, request.layers
    )
