"""The detail of images: how much power they have at which fineness, and how alike that is.

Durall et al. 2020, "Watch your Up-Convolution: CNN Based Generative Deep Neural Networks are
Failing to Reproduce Spectral Distributions" (equation 2): power averaged around the origin.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dinogen.metrics.extractors.base import ExtractorInfo, FeatureExtractor, exactly

NUM_BANDS = 8


class SpectrumExtractor:
    """Power in bands of equal width from the coarsest up to two pixels a wave.

    Args:
        device: where it runs.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        how = f"hann, {NUM_BANDS} bands"
        self.info = ExtractorInfo("spectrum", "", how, NUM_BANDS, num_logits=0, random=False)

    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        """(N, 3, R, R) uint8 -> ``features`` (N, 8) on the CPU: mean power of the frequencies in a
        band, of all three colours, so that white noise of variance s^2 has s^2 in each.

        The last band holds the corners too. A band without frequencies, of images below 16
        pixels, has 0. Images fade out towards their borders (Hann), or the steps from one border
        to the opposite one would count as detail.
        """
        side = images.shape[-1]
        window = torch.hann_window(side, dtype=torch.float64)
        taper = torch.outer(window, window)
        members = _members(side)
        weights = members / members.sum((0, 1)).clamp(min=1) / taper.square().sum()
        with exactly(self.device):
            x = images.to(self.device).float() / 255
            x = (x - x.mean((2, 3), keepdim=True)) * taper.float().to(self.device)
            power = torch.fft.fft2(x).abs().square().mean(1)
            features = power.flatten(1) @ weights.flatten(0, 1).float().to(self.device)
        return {"features": features.cpu()}


def _members(side: int) -> Tensor:
    """(side, side, 8): 1 where a frequency belongs to a band; the same for every device."""
    frequency = 2 * torch.fft.fftfreq(side, dtype=torch.float64)
    radius = torch.hypot(frequency[:, None], frequency[None])
    band = ((radius * NUM_BANDS).ceil().long() - 1).clamp(0, NUM_BANDS - 1)
    members = torch.nn.functional.one_hot(band, NUM_BANDS).double()
    members[0, 0] = 0  # the mean
    return members


def load(path: str | None, device: torch.device) -> FeatureExtractor:
    """The feature extractor; it needs no file, so ``path`` is None."""
    return SpectrumExtractor(device)


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
