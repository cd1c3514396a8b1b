"""How near an autoencoder's reconstructions are to their images: LPIPS, PSNR and SSIM."""

from __future__ import annotations

import math
from typing import Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from dinogen.distributed import process_group
from dinogen.errors import UserError
from dinogen.metrics.collect import agree_readable
from dinogen.metrics.extractors.base import NotAvailable
from dinogen.metrics.extractors.lpips import Perceptual
from dinogen.metrics.value import MetricValue
from shards.errors import ShardsError

BETTER: dict[str, Literal["lower", "higher"]] = {
    "reconstruction_lpips": "lower",
    "reconstruction_psnr": "higher",
    "reconstruction_ssim": "higher",
}
# Wang et al. 2004, "Image Quality Assessment: From Error Visibility to Structural Similarity",
# section III-C: a Gaussian window of 11x11 with sigma 1.5
SSIM_WINDOW = 11
SSIM_SIGMA = 1.5


class Pairs(Protocol):
    """Images and their reconstructions by number, the same on any rank."""

    @property
    def num(self) -> int:
        """How many there are."""
        ...

    def read(self, numbers: list[int]) -> tuple[Tensor, Tensor]:
        """Images and reconstructions, each (len(numbers), 3, R, R) uint8 RGB, on any device."""
        ...


def reconstruction(
    pairs: Pairs, perceptual: Perceptual | NotAvailable, batch: int = 32
) -> dict[str, MetricValue]:
    """Means over all pairs, each counted once; all ranks together.

    Ranks take whole batches, so a batch is the same on any number of ranks; they meet at the end,
    and one may have nothing to do. The spread is the standard error of the mean over images.

    Args:
        pairs: held-out images and what is made of them.
        perceptual: LPIPS, or why there is none.
        batch: pairs read at a time.

    Returns:
        By name, those of :data:`BETTER`.

    Raises:
        ValueError: no pairs.
        Unreadable: an image cannot be read; on every rank.
    """
    if pairs.num < 1:
        raise ValueError("there are no reconstructions to measure")
    starts = np.arange(0, pairs.num, batch)
    rows = torch.zeros(pairs.num, len(BETTER), dtype=torch.float64)
    failure: Exception | None = None
    try:
        for start in np.array_split(starts, process_group.world_size())[
            process_group.rank()
        ].tolist():
            numbers = list(range(start, min(start + batch, pairs.num)))
            real, made = pairs.read(numbers)
            if isinstance(perceptual, Perceptual):
                rows[numbers, 0] = perceptual.distance(real, made).double()
            for number, a, b in zip(numbers, real.cpu(), made.cpu(), strict=True):
                rows[number, 1] = psnr(a, b)
                rows[number, 2] = ssim(a, b)
    except (UserError, ShardsError) as error:
        failure = error
    agree_readable(failure)
    rows = process_group.all_reduce_sum(rows)
    missing = dict.fromkeys(BETTER, "")
    if isinstance(perceptual, NotAvailable):
        missing["reconstruction_lpips"] = str(perceptual)
    if rows[:, 2].isnan().any():
        missing["reconstruction_ssim"] = (
            f"the images are smaller than its window of {SSIM_WINDOW}x{SSIM_WINDOW}: measure a "
            "stage of a higher resolution"
        )
    return {
        name: MetricValue.missing(name, BETTER[name], reason)
        if reason
        else _metric_value(name, rows[:, column])
        for column, (name, reason) in enumerate(missing.items())
    }


def psnr(a: Tensor, b: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of two uint8 images (3, R, R).

    Of two that are the same it would be infinite, and so would be the mean over all; they count as
    if one value were off by one, which is as near as two different images can be.
    """
    squares = (a.double() - b.double()).square().sum().clamp(min=1.0)
    return 10 * math.log10(255**2 * a.numel() / float(squares))


def ssim(a: Tensor, b: Tensor) -> float:
    """Structural similarity of two uint8 images (3, R, R), 1 if they are the same.

    Wang et al. 2004, equation 13, as scikit-image has it: mean over places and colours. NaN if
    they are smaller than its window.
    """
    from skimage.metrics import structural_similarity

    if min(a.shape[1:]) < SSIM_WINDOW:
        return math.nan
    value = structural_similarity(
        a.numpy(),
        b.numpy(),
        channel_axis=0,
        data_range=255,
        gaussian_weights=True,
        sigma=SSIM_SIGMA,
        use_sample_covariance=False,
    )
    return float(value)


def _metric_value(name: str, values: Tensor) -> MetricValue:
    num = len(values)
    spread = float(values.std()) / math.sqrt(num) if num > 1 else None
    return MetricValue(name, float(values.mean()), spread, BETTER[name], num, num, None)
