"""Frequency bands, noise and cutout: transforms that the paper's chosen pipeline leaves out.

Karras et al. 2020, "Training Generative Adversarial Networks with Limited Data", appendix B.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from dinogen.networks.ada.geometry import mirrored
from dinogen.networks.ada.rng import TransformDraws

# The low-pass filter of the wavelet sym2 (Daubechies 1992, "Ten Lectures on Wavelets", table 6.1)
SYM2 = (-0.12940952255092145, 0.22414386804185735, 0.836516303737469, 0.48296291314469025)
NUM_BANDS = 4
# how much of a natural picture's power lies in each band, about 1 / f
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
    bank = np.zeros((NUM_BANDS, 1))
    bank[0] = 1
    for i in range(1, NUM_BANDS):
        # what was split so far moves down by an octave
        spread = np.zeros((NUM_BANDS, 2 * bank.shape[1] - 1))
        spread[:, ::2] = bank
        bank = np.stack([np.convolve(row, low) for row in spread])
        first = (bank.shape[1] - len(high)) // 2
        bank[i, first : first + len(high)] += high
    return bank


def band_gains(draws: TransformDraws, p: float) -> Tensor:
    """Gain of each band, (B, 4) float64, such that the power expected stays the same."""
    gains = torch.ones(len(draws.positions), NUM_BANDS, dtype=torch.float64)
    for i in range(NUM_BANDS):
        one = torch.ones_like(gains)
        one[:, i] = 2 ** (draws.normal(f"band_{i}") * draws.happens(f"band_{i}", p))
        gains *= one / (POWER * one.square()).sum(1, keepdim=True).sqrt()
    return gains


def amplify(images: Tensor, gains: Tensor) -> Tensor:
    """Multiply the bands of pictures (B, C, R, R), along each axis, by gains (B, 4)."""
    # the power's weights sum to 1 only up to rounding
    if bool((gains - 1).abs().max() < 1e-12):
        return images
    batch, channels, size, _ = images.shape
    taps = (gains @ torch.from_numpy(bands())).to(images)
    row = taps.repeat_interleave(channels, 0)[:, None, None]
    margin = taps.shape[1] // 2
    around = mirrored(torch.arange(-margin, size + margin), size).to(images.device)
    x = images.index_select(2, around).index_select(3, around)
    x = x.reshape(1, batch * channels, *x.shape[2:])
    x = F.conv2d(x, row, groups=batch * channels)
    x = F.conv2d(x, row.transpose(2, 3), groups=batch * channels)
    return x.view_as(images)


def add_noise(images: Tensor, draws: TransformDraws, p: float) -> Tensor:
    """Add noise per pixel and colour; its standard deviation is half-normal, of scale 0.1."""
    sigma = 0.1 * draws.normal("noise").abs() * draws.happens("noise", p)
    if not bool(sigma.any()):
        return images
    noise = draws.pixels(tuple(images.shape[1:]), images.device)
    return images + noise * sigma.to(images)[:, None, None, None]


def cut_out(images: Tensor, draws: TransformDraws, p: float) -> Tensor:
    """Make a square of half the side grey, about a centre anywhere in the picture."""
    happens = draws.happens("cutout", p)
    if not bool(happens.any()):
        return images
    places = (torch.arange(images.shape[-1]).double() + 0.5) / images.shape[-1]
    x, y = (
        (places - draws.uniform("cutout", i)[:, None]).abs() < CUTOUT_SIZE / 2 for i in range(2)
    )
    cut = happens[:, None, None] & y[:, :, None] & x[:, None, :]
    return images * ~cut[:, None].to(images.device)
