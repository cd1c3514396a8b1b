"""How the detail of generated images compares with that of real ones, from their mean spectra."""

from __future__ import annotations

import torch
from torch import Tensor

# Files have 256 values: rounding to them alone is noise of this power, and less says nothing.
_LEAST = 1 / 12 / 255**2


def spectrum_distance(generated: Tensor, real: Tensor) -> float:
    """Mean over bands of the difference in decibels; 0 if the spectra are the same.

    Args:
        generated: (B,) mean power by band, as :class:`SpectrumExtractor` finds it.
        real: the same.
    """
    there = real > 0
    decibels = 10 * torch.log10(generated[there].clamp(min=_LEAST) / real[there].clamp(min=_LEAST))
    return float(decibels.abs().mean())


def sharpness(generated: Tensor, real: Tensor) -> float:
    """Power per frequency in the finer half of the bands over that of real images; 1 is as real.

    Each of these bands counts the same. Below 1 images are blurred; above it they have noise or
    patterns that real ones do not have.

    Args:
        generated: (B,) mean power by band.
        real: the same.
    """
    half = len(real) // 2
    return float(generated[half:].sum() / real[half:].sum().clamp(min=_LEAST))
