"""Looks made from latents alone: grids, interpolations, psi, styles, directions."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from dinogen.report.images import Sheet, with_corner
from dinogen.visualize.scene import LeftOut, Look, Scene

LARGEST_OF_64 = 128
NUM_STRIPS = 4
STEPS = 9
PSIS = (0.0, 0.25, 0.5, 0.6, 0.7, 0.85, 1.0)
NUM_COARSE, NUM_FINE = 4, 6
NUM_DIRECTIONS = 4
REACH = 4.0  # in standard deviations of the latent


def grid16(scene: Scene) -> Look:
    """The first 16 pictures."""
    sheet = Sheet(scene.drawn[:16].numpy(), 4)
    return Look((sheet,), "The first 16 samples of the seed, as they come.")


def grid64(scene: Scene) -> Look:
    """The first 64 pictures; large ones shrunk, so that a page can hold them."""
    images, caption = scene.drawn[:64], "The first 64 samples of the seed, as they come"
    if scene.resolution > LARGEST_OF_64:
        images = F.interpolate(images, size=(LARGEST_OF_64, LARGEST_OF_64), mode="area")
        caption += f"; shrunk from {scene.resolution} to {LARGEST_OF_64} pixels"
    return Look((Sheet(images.numpy(), 8),), caption + ".")


def linear(a: Tensor, b: Tensor, t: float) -> Tensor:
    """The straight line from ``a`` (t = 0) to ``b`` (t = 1)."""
    return torch.lerp(a, b, t)


def spherical(a: Tensor, b: Tensor, t: float) -> Tensor:
    """The great circle from ``a`` to ``b``, (N, ...), each sample by itself.

    White 2016, "Sampling Generative Networks", section 2.1 (Shoemake 1985): normal latents of many
    dimensions lie near a sphere, which the straight line leaves.
    """
    flat_a, flat_b = a.flatten(1), b.flatten(1)
    angle = torch.arccos(F.cosine_similarity(flat_a, flat_b, dim=1).clamp(-1, 1))
    angle = angle.view(-1, *[1] * (a.ndim - 1))
    sine = torch.sin(angle)
    on_circle = (torch.sin((1 - t) * angle) * a + torch.sin(t * angle) * b) / sine
    return torch.where(sine.abs() < 1e-4, torch.lerp(a, b, t), on_circle)


def interpolation_linear(scene: Scene) -> Look:
    """Strips along straight lines."""
    caption = "From one sample to another along the straight line between their latents."
    return Look((_strips(scene, linear),), caption)


def interpolation_spherical(scene: Scene) -> Look:
    """Strips along great circles."""
    caption = "From one sample to another along the great circle through their latents."
    return Look((_strips(scene, spherical),), caption)


def psi(scene: Scene) -> Look:
    """The same latents at growing distance from the mean."""
    if not scene.family.truncates:
        raise LeftOut("this family has no truncation")
    indices = torch.arange(NUM_STRIPS)
    latents = scene.latents(indices)
    columns = [scene.decode(latents, indices, psi=value) for value in PSIS]
    images = torch.stack(columns, 1).flatten(0, 1)
    labels = [f"psi {value:g}" for value in PSIS]
    caption = (
        "The same samples ever further from the mean: psi 0 is the mean, psi 1 the samples "
        "as they come."
    )
    return Look((Sheet(images.numpy(), len(PSIS), labels),), caption)


@torch.no_grad()
def styles(scene: Scene) -> Look:
    """What is coarse of one sample with what is fine of another."""
    coarse, fine = torch.arange(NUM_COARSE), torch.arange(NUM_COARSE, NUM_COARSE + NUM_FINE)
    # a picture's number decides its class: that of the coarse one
    indices = coarse.repeat_interleave(NUM_FINE)
    left, above = scene.latents(coarse), scene.latents(fine)
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
    return Look((Sheet(images, NUM_FINE + 1),), caption)


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


def directions(scene: Scene) -> Look:
    """Two samples moved along each main direction."""
    matrix = scene.family.first_layer(scene.networks)
    if matrix is None:
        raise LeftOut("the latent of this family is no vector that a first layer multiplies")
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
        f"Two samples (a, b) moved by {-REACH:g} to {REACH:+g} along the directions to which the "
        "first layer answers most (SeFa)."
    )
    return Look((Sheet(torch.cat(rows).numpy(), STEPS, labels, left),), caption)


def _strips(scene: Scene, between: Callable[[Tensor, Tensor, float], Tensor]) -> Sheet:
    """Strips from sample 2i to sample 2i + 1, all of the class of the first."""
    starts = torch.arange(0, 2 * NUM_STRIPS, 2)
    a, b = scene.latents(starts), scene.latents(starts + 1)
    columns = [scene.decode(between(a, b, i / (STEPS - 1)), starts) for i in range(STEPS)]
    images = torch.stack(columns, 1).flatten(0, 1)
    return Sheet(images.numpy(), STEPS)
