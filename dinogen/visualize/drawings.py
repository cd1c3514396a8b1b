"""Draws grids, interpolations, styles, progress, and comparisons with real images."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cached_property
from typing import cast

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from dinogen.batch import Batch
from dinogen.config import ConfigError
from dinogen.families.abilities import (
    HasFirstLayer,
    MixesStyles,
    Reconstructs,
    Varies,
    truncates,
)
from dinogen.report.images import Sheet, with_corner
from dinogen.training.checkpointing.snapshot import load_snapshot
from dinogen.visualize.nearest import real_images
from dinogen.visualize.scene import LeftOut, Scene, Visualization

LARGEST_OF_64 = 128
NUM_STRIPS = 4
STEPS = 9
PSIS = (0.0, 0.25, 0.5, 0.6, 0.7, 0.85, 1.0)
NUM_COARSE, NUM_FINE = 4, 6
NUM_DIRECTIONS = 4
REACH = 4.0  # in standard deviations of the latent


def grid16(scene: Scene) -> Visualization:
    """The first 16 images."""
    sheet = Sheet(scene.drawn[:16].numpy(), 4)
    return Visualization((sheet,), "The first 16 samples of the seed, not selected.")


def grid64(scene: Scene) -> Visualization:
    """The first 64 images; large ones shrunk to keep pages small."""
    images, caption = scene.drawn[:64], "The first 64 samples of the seed, not selected"
    if scene.resolution > LARGEST_OF_64:
        images = F.interpolate(images, size=(LARGEST_OF_64, LARGEST_OF_64), mode="area")
        caption += f"; shrunk from {scene.resolution} to {LARGEST_OF_64} pixels"
    return Visualization((Sheet(images.numpy(), 8),), caption + ".")


def linear(a: Tensor, b: Tensor, t: float) -> Tensor:
    """The straight line from ``a`` (t = 0) to ``b`` (t = 1)."""
    return torch.lerp(a, b, t)


def spherical(a: Tensor, b: Tensor, t: float) -> Tensor:
    """The great circle from ``a`` to ``b``, (N, ...), for each sample separately.

    White 2016, "Sampling Generative Networks", section 2.1 (Shoemake 1985): normal latents of many
    dimensions lie near a sphere, which the straight line leaves.
    """
    flat_a, flat_b = a.flatten(1), b.flatten(1)
    angle = torch.arccos(F.cosine_similarity(flat_a, flat_b, dim=1).clamp(-1, 1))
    angle = angle.view(-1, *[1] * (a.ndim - 1))
    sine = torch.sin(angle)
    on_circle = (torch.sin((1 - t) * angle) * a + torch.sin(t * angle) * b) / sine
    return torch.where(sine.abs() < 1e-4, torch.lerp(a, b, t), on_circle)


def interpolation_linear(scene: Scene) -> Visualization:
    """Strips along straight lines."""
    caption = "From one sample to another along the straight line between their latents."
    return Visualization((_strips(scene, linear),), caption)


def interpolation_spherical(scene: Scene) -> Visualization:
    """Strips along great circles."""
    caption = "From one sample to another along the great circle through their latents."
    return Visualization((_strips(scene, spherical),), caption)


def psi(scene: Scene) -> Visualization:
    """The same latents at growing distances from the mean."""
    if not truncates(scene.family):
        raise LeftOut("this family has no truncation")
    indices = torch.arange(NUM_STRIPS)
    latents = scene.latents(indices)
    columns = [scene.decode(latents, indices, psi=value) for value in PSIS]
    images = torch.stack(columns, 1).flatten(0, 1)
    labels = [f"psi {value:g}" for value in PSIS]
    caption = (
        "The same samples at growing distances from the mean: psi 0 is the mean, psi 1 the "
        "unchanged samples."
    )
    return Visualization((Sheet(images.numpy(), len(PSIS), labels),), caption)


@torch.no_grad()
def styles(scene: Scene) -> Visualization:
    """The coarse layers of one sample with the fine layers of another."""
    coarse, fine = torch.arange(NUM_COARSE), torch.arange(NUM_COARSE, NUM_COARSE + NUM_FINE)
    # the sample number determines the class: take that of the coarse sample
    indices = coarse.repeat_interleave(NUM_FINE)
    left, above = scene.latents(coarse), scene.latents(fine)
    mixed = None
    if isinstance(scene.family, MixesStyles):
        mixed = scene.family.mix(
            scene.networks,
            left.repeat_interleave(NUM_FINE, 0),
            above.repeat(NUM_COARSE, *[1] * (above.ndim - 1)),
            indices,
            scene.seed,
        )
    if mixed is None:
        raise LeftOut("this family has no styles to mix")
    heads, sides = scene.decode(above, fine), scene.decode(left, coarse)
    images = with_corner(heads.numpy(), sides.numpy(), mixed.cpu().numpy())
    caption = (
        "Style mixing: the coarse layers of the sample on the left, the fine ones of the sample "
        "above."
    )
    return Visualization((Sheet(images, NUM_FINE + 1),), caption)


def main_directions(matrix: Tensor, num: int) -> Tensor:
    """Unit vectors (num, z_dim) along which ``matrix`` (out, z_dim) stretches most.

    Shen and Zhou 2021, "Closed-Form Factorization of Latent Semantics in GANs", equation 5. The
    sign, which is free, makes the entry of largest magnitude positive.
    """
    _, _, vectors = torch.linalg.svd(matrix.double().cpu(), full_matrices=False)
    vectors = vectors[:num]
    largest = vectors.gather(1, vectors.abs().argmax(1, keepdim=True))
    signed: Tensor = vectors * largest.sign()
    return signed.float()


def directions(scene: Scene) -> Visualization:
    """Two samples moved along each main direction."""
    family = scene.family
    matrix = family.first_layer(scene.networks) if isinstance(family, HasFirstLayer) else None
    if matrix is None:
        raise LeftOut("the latent of this family is not a vector that a first layer multiplies")
    found = main_directions(matrix, NUM_DIRECTIONS)
    indices = torch.arange(2)
    start = scene.latents(indices)
    moves = torch.linspace(-REACH, REACH, STEPS).tolist()
    rows = []
    for direction in found.to(start.device):
        columns = [scene.decode(start + move * direction, indices) for move in moves]
        rows.append(torch.stack(columns, 1).flatten(0, 1))
    left = [f"{number} {which}" for number in range(1, len(found) + 1) for which in "ab"]
    labels = [f"{move:+g}" if move else "0" for move in moves]
    caption = (
        f"Two samples (a, b) moved by {-REACH:g} to {REACH:+g} along the directions that the first "
        "layer amplifies most (SeFa)."
    )
    return Visualization((Sheet(torch.cat(rows).numpy(), STEPS, labels, left),), caption)


def _strips(scene: Scene, between: Callable[[Tensor, Tensor, float], Tensor]) -> Sheet:
    """Strips from sample 2i to sample 2i + 1, all of the class of the first."""
    starts = torch.arange(0, 2 * NUM_STRIPS, 2)
    a, b = scene.latents(starts), scene.latents(starts + 1)
    columns = [scene.decode(between(a, b, i / (STEPS - 1)), starts) for i in range(STEPS)]
    images = torch.stack(columns, 1).flatten(0, 1)
    return Sheet(images.numpy(), STEPS)


log = logging.getLogger(__name__)

NUM_LATENTS = 16
NUM_ROWS = 6
MAX_COLUMNS = 8
MAX_FRAMES = 24
FRAME_SECONDS = 0.6


class History:
    """Images of the same latents at checkpoints of a stage, up to the scene's own.

    Args:
        scene: its seed and stage.
    """

    def __init__(self, scene: Scene) -> None:
        self.scene = scene

    @cached_property
    def images(self) -> dict[int, Tensor]:
        """(16, 3, R, R) by number of images seen.

        Raises:
            LeftOut: there is only one checkpoint.
        """
        scene, snapshot = self.scene, self.scene.snapshot
        kept = [nimg for nimg in snapshot.place.checkpoints.nimg if nimg <= snapshot.nimg]
        if len(kept) < 2:
            raise LeftOut(
                "only one checkpoint was kept: set checkpoint.keep_every_kimg to see the progress"
            )
        indices = torch.arange(NUM_LATENTS)
        found = {}
        for nimg in _spread(kept, MAX_FRAMES):
            if nimg == snapshot.nimg:
                found[nimg] = scene.drawn[:NUM_LATENTS]
                continue
            try:
                then = load_snapshot(scene.family.config.run, scene.resolution, nimg)
            except ConfigError as error:
                log.warning("left out of the progression: %s", error)
                continue
            past = Scene(then, scene.seed)
            found[nimg] = past.decode(past.latents(indices), indices)
        if len(found) < 2:
            raise LeftOut("all checkpoints before this one are broken")
        return found

    def progression(self, scene: Scene) -> Visualization:
        """Columns of checkpoints, rows of latents."""
        chosen = _spread(list(self.images), MAX_COLUMNS)
        images = torch.stack([self.images[nimg][:NUM_ROWS] for nimg in chosen], 1)
        labels = [self._when(nimg) for nimg in chosen]
        caption = f"The same latents during training, at {_list(chosen)} images."
        return Visualization((Sheet(images.flatten(0, 1).numpy(), len(chosen), labels),), caption)

    def animation(self, scene: Scene) -> Visualization:
        """The same as an animation, with more latents and checkpoints."""
        sheets = tuple(
            Sheet(images.numpy(), 4, [self._when(nimg)]) for nimg, images in self.images.items()
        )
        caption = f"The same latents during training, {len(sheets)} checkpoints."
        return Visualization(sheets, caption)

    @cached_property
    def _num_train(self) -> int | None:
        try:
            return self.scene.data.num_samples(self.scene.family.config.data.split)
        except LeftOut:
            return None

    def _when(self, nimg: int) -> str:
        """In epochs if the data are available, else in images."""
        if self._num_train:
            epochs = nimg / self._num_train
            return f"{epochs:.0f} epochs" if epochs >= 10 else f"{epochs:.1f} epochs"
        return f"{nimg / 1000:.3g}k images"


def _spread(items: list[int], num: int) -> list[int]:
    """At most ``num`` evenly spaced items, including the first and the last."""
    chosen = np.linspace(0, len(items) - 1, min(num, len(items))).round().astype(int)
    return [items[i] for i in chosen]


def _list(numbers: list[int]) -> str:
    return ", ".join(f"{number:,}" for number in numbers)


NUM_WORST = 16
NUM_PAIRS = 8
NUM_ENCODED = 8
NUM_VARIATIONS = 3


def worst(scene: Scene) -> Visualization:
    """The drawn images that are rated least real, with their ratings."""
    opinions = scene.opinions
    if opinions is not None:
        order = torch.nan_to_num(opinions, nan=-torch.inf).argsort()[:NUM_WORST]
        labels = [f"D {opinions[i]:+.2f}" for i in order]
        why = "that the discriminator rates least real"
    else:
        distances = scene.nearest[0].distances[:, 0]
        order = torch.nan_to_num(distances, nan=torch.inf).argsort(descending=True)[:NUM_WORST]
        labels = [f"{distances[i]:.2f}" for i in order]
        why = f"farthest from every training image by the {scene.ruler.what}"
    caption = f"Of the first {len(scene.drawn)} samples, the {len(order)} {why}, worst first."
    return Visualization((Sheet(scene.drawn[order].numpy(), 4, labels),), caption)


def neighbours(scene: Scene) -> Visualization:
    """The samples nearest to training images, above their neighbours."""
    found, usual = scene.nearest
    split = scene.family.config.data.split
    order = found.distances[:, 0].argsort()[:NUM_PAIRS]
    rows = [scene.drawn[order]]
    labels = [""] * len(order)
    for k in range(found.numbers.shape[1]):
        numbers = found.numbers[order, k].tolist()
        images = real_images(scene.data, numbers, split, scene.resolution)
        turned = found.mirrored[order, k][:, None, None, None]
        rows.append(torch.where(turned, images.flip(3), images))
        labels += [f"{d:.2f}" for d in found.distances[order, k]]
    caption = (
        f"Of the first {len(scene.drawn)} samples, the {len(order)} nearest to a training image, "
        f"each above its neighbours among {found.num:,}, by the {scene.ruler.what}; median of all "
        f"samples {found.distances[:, 0].median():.2f}"
    )
    if usual is not None:
        caption += f", of held-out images {usual:.2f}"
    caption += scene.ruler.caution
    left = ["sample", "nearest", *[f"{k + 1}." for k in range(1, found.numbers.shape[1])]]
    return Visualization((Sheet(torch.cat(rows).numpy(), len(order), labels, left),), caption + ".")


@torch.no_grad()
def variations(scene: Scene) -> Visualization:
    """Real images above generated ones with their features."""
    family, reason = scene.family, "this family generates no images from features"
    if not isinstance(family, Varies):
        raise LeftOut(reason)
    split, numbers = _some_held_out(scene)
    images = real_images(scene.data, numbers.tolist(), split, scene.resolution)
    read = scene.data.read(numbers.tolist(), split=split, levels=family.inputs.levels)
    rows = [images]
    for row in range(NUM_VARIATIONS):
        indices = torch.arange(NUM_ENCODED) + row * NUM_ENCODED
        found = family.variations(scene.networks, cast(Batch, read), indices, scene.seed)
        if found is None:
            raise LeftOut(reason)
        rows.append(found.cpu())
    caption = f"Images of split {split}, and below each of them generated ones with its features."
    sheet = Sheet(torch.cat(rows).numpy(), NUM_ENCODED, left=["real"])
    return Visualization((sheet,), caption)


def _some_held_out(scene: Scene) -> tuple[str, np.ndarray]:
    """Some samples over all held-out ones, or of what is trained on: their split and numbers."""
    split = "val" if scene.data.num_samples("val") else scene.family.config.data.split
    return split, np.linspace(0, scene.data.num_samples(split) - 1, NUM_ENCODED).astype(int)


_ENCODES_NOTHING = "this family encodes no images"


@torch.no_grad()
def reconstructions(scene: Scene) -> Visualization:
    """Real images above their reconstructions."""
    family = scene.family
    if not isinstance(family, Reconstructs):
        raise LeftOut(_ENCODES_NOTHING)
    split, numbers = _some_held_out(scene)
    images = real_images(scene.data, numbers.tolist(), split, scene.resolution)
    batch: Batch = {
        "image": images.to(family.device),
        "position": torch.from_numpy(numbers),
        "key": [str(number) for number in numbers],
    }
    found = family.reconstruct(scene.networks, batch)
    if found is None:
        raise LeftOut(_ENCODES_NOTHING)
    both = torch.cat([images, found.cpu()])
    caption = f"Images of split {split} above their reconstructions."
    sheet = Sheet(both.numpy(), NUM_ENCODED, left=["real", "decoded"])
    return Visualization((sheet,), caption)
