"""Looks that compare with real pictures, or ask D: worst, neighbours, reconstructions."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from dinogen.report.sheets import Sheet
from dinogen.training.looks_scene import LeftOut, Look, Scene

SIDE = 32  # pixels at which pictures are compared
MAX_REAL = 50_000
NUM_WORST = 16
NUM_PAIRS = 8
NUM_NEAREST = 3
NUM_ENCODED = 8
BATCH = 512


@dataclass(frozen=True)
class Nearest:
    """Nearest pictures of the training set.

    Attributes:
        distances: (N, k) root mean square difference of a pixel value, 0 to 255, ascending.
        numbers: (N, k) int64, of the samples in their split.
        mirrored: (N, k) bool, whether the mirrored picture is the near one.
        num: pictures that were compared with.
    """

    distances: Tensor
    numbers: Tensor
    mirrored: Tensor
    num: int


def worst(scene: Scene) -> Look:
    """The pictures of those drawn that are least real, and what says so."""
    opinions = scene.opinions
    if opinions is not None:
        order = torch.nan_to_num(opinions, nan=-torch.inf).argsort()[:NUM_WORST]
        labels = [f"D {opinions[i]:+.3g}" for i in order]
        why = "that the discriminator finds least real"
    else:
        distances = nearest_of(scene, scene.drawn).distances[:, 0]
        order = torch.nan_to_num(distances, nan=torch.inf).argsort(descending=True)[:NUM_WORST]
        labels = [f"rms {distances[i]:.1f}" for i in order]
        why = "that lie farthest from every training picture (pixels at 32x32)"
    caption = f"Of the first {len(scene.drawn)} samples the {len(order)} {why}, the worst first."
    return Look((Sheet(scene.drawn[order].numpy(), 4, labels),), caption)


def neighbours(scene: Scene) -> Look:
    """The samples that lie nearest to training pictures, above their neighbours."""
    found = nearest_of(scene, scene.drawn)
    order = found.distances[:, 0].argsort()[:NUM_PAIRS]
    rows = [scene.drawn[order]]
    labels = [""] * len(order)
    for k in range(found.numbers.shape[1]):
        images = _real(scene, found.numbers[order, k].tolist(), scene.resolution)
        turned = found.mirrored[order, k][:, None, None, None]
        rows.append(torch.where(turned, images.flip(3), images))
        labels += [f"rms {d:.1f}" for d in found.distances[order, k]]
    caption = (
        f"Of the first {len(scene.drawn)} samples the {len(order)} nearest to a training picture, "
        f"each above its neighbours among {found.num:,}; the distance is the root mean square "
        f"difference of a value of 0 to 255 at {min(SIDE, scene.resolution)} pixels"
    )
    usual = _usual_distance(scene)
    if usual is not None:
        caption += f", for held-out pictures {usual:.1f} at the median"
    left = ["sample", "nearest", *[f"{k + 1}." for k in range(1, found.numbers.shape[1])]]
    return Look((Sheet(torch.cat(rows).numpy(), len(order), labels, left),), caption + ".")


@torch.no_grad()
def reconstructions(scene: Scene) -> Look:
    """Real pictures above what their encoding decodes to."""
    split = "val" if scene.data.num_samples("val") else scene.family.config.data.split
    numbers = np.linspace(0, scene.data.num_samples(split) - 1, NUM_ENCODED).astype(int)
    images = _real(scene, numbers.tolist(), scene.resolution, split)
    batch = {
        "image": images.to(scene.family.device),
        "position": torch.from_numpy(numbers),
        "key": [str(number) for number in numbers],
    }
    found = scene.family.reconstruct(scene.networks, batch)
    if found is None:
        raise LeftOut("this family encodes no pictures")
    both = torch.cat([images, found.cpu()])
    caption = f"Pictures of split {split} above their reconstructions."
    sheet = Sheet(both.numpy(), NUM_ENCODED, left=["real", "decoded"])
    return Look((sheet,), caption)


def nearest_of(scene: Scene, images: Tensor) -> Nearest:
    """Nearest training pictures of ``images`` (N, 3, R, R); mirrored ones count if trained on."""
    split = scene.family.config.data.split
    available = scene.data.num_samples(split)
    chosen = np.linspace(0, available - 1, min(available, MAX_REAL)).astype(int)
    with_mirrored = scene.family.config.augment.flip > 0
    queries = _values(images, scene.resolution)
    parts = []
    for numbers, real in _blocks(scene, chosen.tolist(), split):
        distances = _rms(queries, _values(real, scene.resolution))
        mirrored = torch.zeros_like(distances, dtype=torch.bool)
        if with_mirrored:
            turned = _rms(queries, _values(real.flip(3), scene.resolution))
            mirrored = turned < distances
            distances = torch.minimum(distances, turned)
        parts.append(_closest(distances, numbers.expand_as(distances), mirrored))
    best = _closest(*(torch.cat(columns, 1) for columns in zip(*parts, strict=True)))
    return Nearest(*best, num=len(chosen))


def _closest(distances: Tensor, numbers: Tensor, mirrored: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of each row the nearest few."""
    order = distances.argsort(1)[:, :NUM_NEAREST]
    return distances.gather(1, order), numbers.gather(1, order), mirrored.gather(1, order)


def _usual_distance(scene: Scene) -> float | None:
    """Median distance of held-out pictures to training, None without any."""
    count = scene.data.num_samples("val")
    if not count or scene.family.config.data.split == "val":
        return None
    numbers = np.linspace(0, count - 1, min(count, 64)).astype(int)
    images = _real(scene, numbers.tolist(), min(SIDE, scene.resolution), "val")
    return float(nearest_of(scene, images).distances[:, 0].median())


def _blocks(scene: Scene, numbers: list[int], split: str) -> Iterator[tuple[Tensor, Tensor]]:
    side = min(SIDE, scene.resolution)
    for first in range(0, len(numbers), BATCH):
        part = numbers[first : first + BATCH]
        yield torch.tensor(part), _real(scene, part, side, split)


def _real(scene: Scene, numbers: list[int], side: int, split: str | None = None) -> Tensor:
    """Real pictures (N, 3, side, side) in [-1, 1]; a damaged one is replaced by the next."""
    split = split or scene.family.config.data.split
    images: Tensor = scene.data.read(numbers, split=split, image_size=side, on_error="skip")[
        "image"
    ]
    return images


def _values(images: Tensor, resolution: int) -> Tensor:
    """Pictures as rows of values of 0 to 255, at 32x32 or below."""
    side = min(SIDE, resolution)
    if images.shape[2] != side:
        images = F.interpolate(images, size=(side, side), mode="area")
    return ((images.clamp(-1, 1) + 1) * 127.5).flatten(1)


def _rms(a: Tensor, b: Tensor) -> Tensor:
    """(N, M) root mean square differences of rows."""
    exact = "donot_use_mm_for_euclid_dist"  # products cancel where rows are near each other
    return torch.cdist(a, b, compute_mode=exact) / a.shape[1] ** 0.5
