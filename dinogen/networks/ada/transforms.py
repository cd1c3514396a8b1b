"""Transforms of the augmentation pipeline, and the random numbers that decide on them.

What is drawn, and all that follows from it for a sample, is computed on the CPU and reaches the
images' device in one copy for all transforms: each is made a :class:`Step` first, and
:func:`apply` runs them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from dinogen.distributed import rng
from dinogen.transfer import to_device_together

TRANSFORMS = (
    "flip",
    "rotate_90",
    "translate_whole",
    "scale",
    "rotate_before",
    "stretch",
    "rotate_after",
    "translate",
    "brightness",
    "contrast",
    "luma_flip",
    "hue",
    "saturation",
    "band_0",
    "band_1",
    "band_2",
    "band_3",
    "noise",
    "cutout",
)


class TransformDraws:
    """Per sample and transform, one number that decides whether it happens and two parameters.

    On the CPU, as positions are: the matrices made of them are tiny, and their extent decides how
    much has to be padded.

    Args:
        seed: the run's seed.
        purpose: what the images are for.
        positions: (B,) int64 on the CPU.
    """

    def __init__(self, seed: int, purpose: str, positions: Tensor) -> None:
        self.seed = seed
        self.purpose = purpose
        self.positions = positions
        self.table = rng.uniform(seed, purpose, positions, (len(TRANSFORMS), 3)).double()

    def happens(self, name: str, p: float | Tensor) -> Tensor:
        """(B,) bool, each true with probability p; (K, B) for K of them (K, 1) float64."""
        return self.table[:, TRANSFORMS.index(name), 0] < p

    def uniform(self, name: str, which: int = 0) -> Tensor:
        """(B,) float64 in (0, 1); ``which`` 0 or 1."""
        return self.table[:, TRANSFORMS.index(name), 1 + which]

    def normal(self, name: str, which: int = 0) -> Tensor:
        """(B,) float64, standard normal, from the same numbers as :meth:`uniform`."""
        numbers: Tensor = torch.special.ndtri(self.uniform(name, which))
        return numbers

    def pixels(self, shape: tuple[int, ...], device: torch.device) -> Tensor:
        """(B, *shape) float32 standard normal on the device."""
        purpose = f"{self.purpose}/pixels"
        return rng.normal(self.seed, purpose, self.positions, shape, device)


@dataclass(frozen=True)
class Step:
    """A transform of a batch of images, all numbers of which are known.

    Attributes:
        numbers: on the CPU, each (K, ...) for K probabilities of which one holds.
        apply: (images, numbers of that one on their device) -> images.
    """

    numbers: tuple[Tensor, ...]
    apply: Callable[..., Tensor]


def apply(images: Tensor, steps: Sequence[Step | None], choice: Tensor | None = None) -> Tensor:
    """The steps one after the other; None stands for one that changes nothing.

    Args:
        images: (B, C, R, R).
        steps: made for images of this shape, type and device.
        choice: () int64 on the images' device, which of K probabilities holds; None for the only.
    """
    taken = [step for step in steps if step is not None]
    numbers = [number for step in taken for number in step.numbers]
    if choice is None or all(
        torch.equal(number, number[:1].expand_as(number)) for number in numbers
    ):
        numbers, choice = [number[0] for number in numbers], None
    moved = iter(to_device_together(numbers, images.device, choice))
    for step in taken:
        images = step.apply(images, *itertools.islice(moved, len(step.numbers)))
    return images


# The low-pass filter of the wavelet sym6 (Daubechies 1992, "Ten Lectures on Wavelets", table 6.3)
SYM6 = (
    0.015404109327027373,
    0.0034907120842174702,
    -0.11799011114819057,
    -0.048311742585633,
    0.4910559419267466,
    0.787641141030194,
    0.3379294217276218,
    -0.07263752278646252,
    -0.021060292512300564,
    0.04472490177066578,
    0.0017677118642428036,
    -0.007800708325034148,
)
NUM_TAPS = len(SYM6)
# centre of mass of the filter: by how many pixels it delays
DELAY = sum(i * tap for i, tap in enumerate(SYM6)) / sum(SYM6)
# pixels that the two filters reach beyond an image
REACH = 3


def blit_matrices(draws: TransformDraws, p: float | Tensor, size: int) -> Tensor:
    """Mirror, quarter turns, translation by whole pixels up to an eighth of ``size``.

    All matrices are (B, 3, 3) or (B, 4, 4), with K before that for p (K, 1).
    """
    flipped = draws.happens("flip", p) & (draws.uniform("flip") < 0.5)
    matrix = scaling(1 - 2 * flipped.double(), torch.ones(flipped.shape))
    turns = torch.floor(4 * draws.uniform("rotate_90")) * draws.happens("rotate_90", p)
    # whole numbers, so that pixels meet pixels
    matrix = rotation(-math.pi / 2 * turns).round() @ matrix
    shift = [
        torch.round((2 * draws.uniform("translate_whole", i) - 1) * 0.125 * size)
        * draws.happens("translate_whole", p)
        for i in range(2)
    ]
    return translation(*shift) @ matrix


def geometry_matrices(draws: TransformDraws, p: float | Tensor, size: int) -> Tensor:
    """Scale, rotation, stretch, rotation, translation by any fraction of a pixel."""
    scale = 2 ** (0.2 * draws.normal("scale") * draws.happens("scale", p))
    matrix = scaling(scale, scale)
    # so that one of the two rotations happens with probability p
    p_rotate = 1 - (1 - torch.as_tensor(p, dtype=torch.float64).clamp(max=1)).sqrt()
    matrix = _turn(draws, "rotate_before", p_rotate) @ matrix
    stretch = 2 ** (0.2 * draws.normal("stretch") * draws.happens("stretch", p))
    matrix = scaling(stretch, 1 / stretch) @ matrix
    matrix = _turn(draws, "rotate_after", p_rotate) @ matrix
    happens = draws.happens("translate", p)
    shift = [0.125 * size * draws.normal("translate", i) * happens for i in range(2)]
    return translation(*shift) @ matrix


def blit(images: Tensor, matrices: Tensor) -> Step | None:
    """Move pixels to where whole-numbered matrices put them, none of them changed.

    Args:
        images: (B, C, R, R).
        matrices: (K, B, 3, 3) of quarter turns, mirrors and whole shifts.
    """
    if bool(_is_identity(matrices).all()):
        return None
    size = images.shape[-1]
    # the centre lies between two pixels if their number is even
    centre = (size - 1) / 2
    places = torch.arange(size, dtype=torch.float64) - centre
    inverse = torch.linalg.inv(matrices)
    # After quarter turns a column comes from x alone or from y alone, and the row from the other.
    (of_x, of_y), shift = inverse[..., :2, :2, None].unbind(-2), inverse[..., :2, 2:]
    turned = (inverse[..., :1, :1].abs() < 0.5).squeeze(-1)
    by_x = torch.where(turned, _second(of_x * places + shift), _first(of_x * places + shift))
    by_y = torch.where(turned, _first(of_y * places + shift), _second(of_y * places + shift))
    by_x, by_y = (mirrored((by + centre).round().long(), size) for by in (by_x, by_y))
    by_x = torch.where(turned, by_x * size, by_x)
    by_y = torch.where(turned, by_y, by_y * size)
    return Step((by_x, by_y), _gathered)


def _gathered(images: Tensor, by_x: Tensor, by_y: Tensor) -> Tensor:
    index = (by_y[:, :, None] + by_x[:, None, :]).flatten(1)[:, None]
    return images.flatten(2).gather(2, index.expand(-1, images.shape[1], -1)).view_as(images)


def warp(images: Tensor, matrices: Tensor) -> Step | None:
    """Transform at twice the resolution, between two wavelet filters that undo each other.

    The filters keep what is scaled down free of aliasing, and the identity is exact: those of an
    orthogonal wavelet, the first one reversed.

    Args:
        images: (B, C, R, R).
        matrices: (K, B, 3, 3), invertible.
    """
    size = images.shape[-1]
    moved = (~_is_identity(matrices)).any(0)
    if not bool(moved.any()):
        return None
    margins = _margins(matrices, size).amax(0)
    if images.device.type != "cpu":
        # one margin for all: a GPU has pixels to spare, and waits for launches
        moved, margins = torch.ones_like(moved), margins.amax().expand_as(margins)
    # By the margin that each needs: less to compute, and none is rounded as others make it.
    numbers = []
    for margin in margins[moved].unique().tolist():
        index = (moved & (margins == margin)).nonzero().flatten()
        numbers += _warp_numbers(images, matrices[:, index], index, margin)
    return Step(tuple(numbers), _warped)


NUM_WARP_NUMBERS = 5


def _warp_numbers(images: Tensor, matrices: Tensor, index: Tensor, margin: int) -> list[Tensor]:
    """What the samples of an index need, each (K, ...): the index, both filters, and the share of
    x and of y in the grid."""
    size = images.shape[-1]
    first, second = _filters(size, margin)
    # the first filter puts pixel i of the padded image at 2 i - DELAY; again from -1 to 1
    end = len(first) - 1
    offset = (4 * ((size - 1) / 2 + margin) - 2 * DELAY) / end - 1
    theta = (_linear(4 / end, offset) @ _to_sources(matrices, size))[..., :2, :]
    of_x, of_y, shift = theta.mT[..., None, :].unbind(-3)
    places = torch.linspace(-1, 1, _num_places(size), dtype=torch.float64)[:, None]
    shared = (index, first.to(images.dtype), second.to(images.dtype))
    numbers = [number.expand(len(matrices), *number.shape) for number in shared]
    return [*numbers, (places * of_x).to(images.dtype), (places * of_y + shift).to(images.dtype)]


@cache
def _filters(size: int, margin: int) -> tuple[Tensor, Tensor]:
    """The two filters along an axis as matrices, float64: (P, size) and (size, places).

    The first one mirrors ``margin`` pixels at each border, puts a zero after each pixel and
    convolves with the reversed wavelet; the second one convolves with the wavelet and drops every
    other place. As products they cost a CPU a tenth of a convolution by twelve taps, and a GPU no
    copies of the padded images.
    """
    around = mirrored(torch.arange(-margin, size + margin), size)
    spread = torch.zeros(2 * len(around), size, dtype=torch.float64)
    spread[::2] = torch.eye(size, dtype=torch.float64)[around]
    first = sum(tap * spread[i : len(spread) - NUM_TAPS + 1 + i] for i, tap in enumerate(SYM6))
    second = torch.zeros(size, _num_places(size), dtype=torch.float64)
    for i, tap in enumerate(reversed(SYM6)):
        second[:, i : i + 2 * size : 2].fill_diagonal_(tap)
    assert isinstance(first, Tensor)
    return first, second


def _warped(images: Tensor, *numbers: Tensor) -> Tensor:
    for i in range(0, len(numbers), NUM_WARP_NUMBERS):
        index, first, second, by_x, by_y = numbers[i : i + NUM_WARP_NUMBERS]
        every = len(index) == len(images)
        x = images if every else images.index_select(0, index)
        x = first @ (x @ first.T)
        x = sample_at(x, by_y[:, :, None] + by_x[:, None])
        x = second @ (x @ second.T)
        images = x if every else images.index_copy(0, index, x)
    return images


def mirrored(index: Tensor, size: int) -> Tensor:
    """Any whole-numbered places to 0 ... size - 1, by mirroring at the first and last pixel."""
    last = size - 1
    return last - (index.remainder(2 * last) - last).abs()


def scaling(x: Tensor, y: Tensor) -> Tensor:
    """(B,) factors -> (B, 3, 3)."""
    zero, one = torch.zeros_like(x), torch.ones_like(x)
    return _matrix([[x, zero, zero], [zero, y, zero], [zero, zero, one]])


def rotation(angle: Tensor) -> Tensor:
    """(B,) radians, from the x axis towards the y axis -> (B, 3, 3)."""
    zero, one = torch.zeros_like(angle), torch.ones_like(angle)
    cos, sin = angle.cos(), angle.sin()
    return _matrix([[cos, -sin, zero], [sin, cos, zero], [zero, zero, one]])


def translation(x: Tensor, y: Tensor) -> Tensor:
    """(B,) pixels -> (B, 3, 3)."""
    zero, one = torch.zeros_like(x), torch.ones_like(x)
    return _matrix([[one, zero, x], [zero, one, y], [zero, zero, one]])


def _turn(draws: TransformDraws, name: str, p: Tensor) -> Tensor:
    angle = (2 * draws.uniform(name) - 1) * math.pi
    return rotation(-angle * draws.happens(name, p))


def _matrix(rows: list[list[Tensor]]) -> Tensor:
    return torch.stack([torch.stack(row, -1).double() for row in rows], -2)


def _first(pair: Tensor) -> Tensor:
    return pair[..., 0, :]


def _second(pair: Tensor) -> Tensor:
    return pair[..., 1, :]


def _is_identity(matrices: Tensor) -> Tensor:
    return (matrices == torch.eye(3)).flatten(-2).all(-1)


def _to_sources(matrices: Tensor, size: int) -> Tensor:
    """From places at twice the resolution, -1 to 1 over all that the second filter needs, to the
    pixels that come there."""
    first = (DELAY - (NUM_TAPS - 1)) / 2 - (size - 1) / 2
    half = (_num_places(size) - 1) / 4
    inverse: Tensor = torch.linalg.inv(matrices)
    return inverse @ _linear(half, first + half)


def _num_places(size: int) -> int:
    return 2 * size - 2 + NUM_TAPS


def _margins(matrices: Tensor, size: int) -> Tensor:
    """Pixels needed around each image, (K, B) int64, in steps of a quarter of its side."""
    corners = torch.tensor([[-1, -1, 1], [-1, 1, 1], [1, -1, 1], [1, 1, 1]]).double().T
    reach = (_to_sources(matrices, size) @ corners)[..., :2, :].abs().amax((-2, -1))
    step = max(1, size // 4)
    return ((reach - (size - 1) / 2 + REACH) / step).ceil().long() * step


def _linear(factor: float, offset: float) -> Tensor:
    """(3, 3): both coordinates times a factor, plus an offset."""
    rows = [[factor, 0, offset], [0, factor, offset], [0, 0, 1]]
    return torch.tensor(rows, dtype=torch.float64)


# the axis of grey
LUMA = torch.tensor([1.0, 1.0, 1.0, 0.0], dtype=torch.float64) / math.sqrt(3)


def color_matrices(draws: TransformDraws, p: float | Tensor) -> Tensor:
    """Brightness, contrast, luma flip, hue rotation, saturation."""
    matrix = brightness(0.2 * draws.normal("brightness") * draws.happens("brightness", p))
    matrix = contrast(2 ** (0.5 * draws.normal("contrast") * draws.happens("contrast", p))) @ matrix
    flipped = draws.happens("luma_flip", p) & (draws.uniform("luma_flip") < 0.5)
    matrix = luma_flip(flipped.double()) @ matrix
    angle = (2 * draws.uniform("hue") - 1) * math.pi
    matrix = hue(angle * draws.happens("hue", p)) @ matrix
    strength = 2 ** (draws.normal("saturation") * draws.happens("saturation", p))
    return saturation(strength) @ matrix


def color(images: Tensor, matrices: Tensor) -> Step | None:
    """Apply matrices (K, B, 4, 4) to the colours of images (B, 3, R, R)."""
    if bool((matrices == torch.eye(4)).all()):
        return None
    m = matrices.to(images.dtype)
    return Step((m[..., :3, :3], m[..., :3, 3:]), _recolored)


def _recolored(images: Tensor, matrices: Tensor, shift: Tensor) -> Tensor:
    return torch.baddbmm(shift, matrices, images.flatten(2)).view_as(images)


def brightness(amount: Tensor) -> Tensor:
    """Add (B,) amounts to all colours."""
    matrix = _identity().repeat(*amount.shape, 1, 1)
    matrix[..., :3, 3] = amount[..., None]
    return matrix


def contrast(factor: Tensor) -> Tensor:
    """Multiply all colours by (B,) factors."""
    return torch.diag_embed(torch.stack([factor, factor, factor, torch.ones_like(factor)], -1))


def luma_flip(flipped: Tensor) -> Tensor:
    """Turn light into dark where (B,) is 1, leaving hue and saturation: a Householder matrix."""
    return _identity() - 2 * torch.outer(LUMA, LUMA) * flipped[..., None, None]


def hue(angle: Tensor) -> Tensor:
    """Rotate colours about the axis of grey by (B,) radians (Rodrigues' formula)."""
    x, y, z, _ = LUMA.tolist()
    cross = torch.zeros(4, 4, dtype=torch.float64)
    cross[:3, :3] = torch.tensor([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    sin, cos = angle.sin()[..., None, None], angle.cos()[..., None, None]
    return _identity() + sin * cross + (1 - cos) * (cross @ cross)


def saturation(factor: Tensor) -> Tensor:
    """Multiply what is not grey in a colour by (B,) factors."""
    grey = torch.outer(LUMA, LUMA)
    grey[3, 3] = 1
    return grey + (_identity() - grey) * factor[..., None, None]


def _identity() -> Tensor:
    return torch.eye(4, dtype=torch.float64)


# The low-pass filter of the wavelet sym2 (Daubechies 1992, "Ten Lectures on Wavelets", table 6.1)
SYM2 = (-0.12940952255092145, 0.22414386804185735, 0.836516303737469, 0.48296291314469025)
NUM_BANDS = 4
# how much of a natural image's power lies in each band, about 1 / f
POWER = torch.tensor([10.0, 1.0, 1.0, 1.0], dtype=torch.float64) / 13
CUTOUT_SIZE = 0.5


@cache
def bands() -> np.ndarray:
    """Four symmetric filters, (4, 43): up to pi / 8, pi / 4, pi / 2 and pi; their sum is 1.

    Each halving splits off the upper half of what is left, by the wavelet's low and high pass,
    each taken forwards and backwards so that no phase is changed; so taken they sum to 1.
    """
    low = np.convolve(SYM2, SYM2[::-1]) / 2
    high = -low
    high[len(high) // 2] += 1
    filters = np.zeros((NUM_BANDS, 1))
    filters[0] = 1
    for i in range(1, NUM_BANDS):
        # what was split so far moves down by an octave
        spread = np.zeros((NUM_BANDS, 2 * filters.shape[1] - 1))
        spread[:, ::2] = filters
        filters = np.stack([np.convolve(row, low) for row in spread])
        first = (filters.shape[1] - len(high)) // 2
        filters[i, first : first + len(high)] += high
    return filters


def band_gains(draws: TransformDraws, p: float | Tensor) -> Tensor:
    """Gain of each band, (B, 4) float64, such that the power expected stays the same."""
    gains = torch.ones(NUM_BANDS, dtype=torch.float64)
    for i in range(NUM_BANDS):
        own = 2 ** (draws.normal(f"band_{i}") * draws.happens(f"band_{i}", p))
        one = torch.ones(*own.shape, NUM_BANDS, dtype=torch.float64)
        one[..., i] = own
        gains = gains * (one / (POWER * one.square()).sum(-1, keepdim=True).sqrt())
    return gains


def amplify(images: Tensor, gains: Tensor) -> Step | None:
    """Multiply the bands of images (B, C, R, R), along each axis, by gains (K, B, 4)."""
    # the power's weights sum to 1 only up to rounding
    if bool((gains - 1).abs().max() < 1e-12):
        return None
    taps = (gains @ torch.from_numpy(bands())).to(images.dtype)
    margin, size = taps.shape[-1] // 2, images.shape[-1]
    around = mirrored(torch.arange(-margin, size + margin), size)
    return Step((taps, around.expand(len(taps), -1)), _amplified)


def _amplified(images: Tensor, taps: Tensor, around: Tensor) -> Tensor:
    batch, channels = images.shape[:2]
    row = taps.repeat_interleave(channels, 0)[:, None, None]
    x = images.index_select(2, around).index_select(3, around)
    x = x.reshape(1, batch * channels, *x.shape[2:])
    x = F.conv2d(x, row, groups=batch * channels)
    x = F.conv2d(x, row.transpose(2, 3), groups=batch * channels)
    return x.view_as(images)


def add_noise(images: Tensor, draws: TransformDraws, p: float | Tensor) -> Step | None:
    """Add noise per pixel and colour; its standard deviation is half-normal, of scale 0.1."""
    sigma = 0.1 * draws.normal("noise").abs() * draws.happens("noise", p)
    if not bool(sigma.any()):
        return None

    def noisy(images: Tensor, sigma: Tensor) -> Tensor:
        noise = draws.pixels(tuple(images.shape[1:]), images.device)
        return images + noise * sigma[:, None, None, None]

    return Step((sigma.to(images.dtype),), noisy)


def cut_out(images: Tensor, draws: TransformDraws, p: float | Tensor) -> Step | None:
    """Make a square of half the side grey, about a centre anywhere in the image."""
    happens = draws.happens("cutout", p)
    if not bool(happens.any()):
        return None
    places = (torch.arange(images.shape[-1]).double() + 0.5) / images.shape[-1]
    x, y = (
        (places - draws.uniform("cutout", i)[:, None]).abs() < CUTOUT_SIZE / 2 for i in range(2)
    )
    return Step((happens[..., None] & x, happens[..., None] & y), _cut)


def _cut(images: Tensor, x: Tensor, y: Tensor) -> Tensor:
    return images.masked_fill((y[:, :, None] & x[:, None, :])[:, None], 0)


def sample_at(images: Tensor, grid: Tensor) -> Tensor:
    """Bilinear samples of images; twice differentiable to the images on any torch, not to the grid.

    torch's own ``grid_sample`` has no second derivative before 2.13, and R1 needs one. Sampling is
    linear, so the derivative of its transpose is sampling again.

    Args:
        images: (B, C, H, W).
        grid: (B, h, w, 2) of x and y, -1 and 1 at the centres of the outermost pixels.

    Returns:
        (B, C, h, w); 0 beyond the images.
    """
    found: Tensor = _SampleAt.apply(images, grid)
    return found


class _SampleAt(torch.autograd.Function):
    """Samples of images at the places of a grid."""

    @staticmethod
    def forward(ctx: Any, images: Tensor, grid: Tensor) -> Tensor:
        ctx.save_for_backward(grid)
        ctx.shape = images.shape
        return F.grid_sample(images, grid.to(images), align_corners=True)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (grid,) = ctx.saved_tensors
        return _Spread.apply(gradient, grid, ctx.shape), None


class _Spread(torch.autograd.Function):
    """The transpose of :class:`_SampleAt`."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, grid: Tensor, shape: torch.Size) -> Tensor:
        ctx.save_for_backward(grid)
        bilinear, zeros, align_corners = 0, 0, True
        images: Tensor = torch.ops.aten.grid_sampler_2d_backward(
            gradient.contiguous(),
            gradient.new_zeros(shape),
            grid.to(gradient),
            bilinear,
            zeros,
            align_corners,
            (True, False),
        )[0]
        return images

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (grid,) = ctx.saved_tensors
        return _SampleAt.apply(gradient, grid), None, None
