"""LPIPS diversity: the mean perceptual distance of all pairs of some generated images."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dinogen.distributed import process_group
from dinogen.metrics.extractors.lpips import Perceptual
from dinogen.metrics.value import MetricValue

NAME = "lpips_diversity"
NUM_SAMPLES = 100
# of one block's rows; two blocks and a difference are held at a time
MAX_BYTES = 2**29
PART = 16


def lpips_diversity(images: Tensor, perceptual: Perceptual) -> MetricValue:
    """Mean LPIPS over all pairs; 0 where all images are one. All ranks together.

    Its spread is the jackknife's standard error, from the means without one image each (Efron
    and Stein 1981, "The Jackknife Estimate of Variance"): pairs share images, so they are not
    independent, and the plain error of a mean would be far too small.

    Args:
        images: (N, 3, R, R) uint8, the same on every rank; :data:`NUM_SAMPLES` are usual, and
            the work grows with the square of N.
        perceptual: LPIPS.
    """
    num = len(images)
    if num < 2:
        reason = f"it compares images with each other, and there is {num}: generate two or more"
        return MetricValue.missing(NAME, "higher", reason)
    distances = pairwise_distances(images, perceptual)
    sums = distances.sum(1)
    total = float(sums.sum()) / 2
    value = total / math.comb(num, 2)
    spread = None
    if num > 2:
        without = (total - sums) / math.comb(num - 1, 2)
        spread = math.sqrt((num - 1) * float(without.var(correction=0)))
    return MetricValue(NAME, value, spread, "higher", num, None, None)


def pairwise_distances(images: Tensor, perceptual: Perceptual) -> Tensor:
    """LPIPS of all pairs, rows shared out over ranks; all ranks together.

    Rows are made once where they fit into :data:`MAX_BYTES`, and once per pair of blocks where
    they do not.

    Args:
        images: (N, 3, R, R) uint8, the same on every rank.
        perceptual: LPIPS.

    Returns:
        (N, N) float64 on the CPU, symmetric, the same on every rank.
    """
    num = len(images)
    rank, world_size = process_group.rank(), process_group.world_size()
    distances = torch.zeros(num, num, dtype=torch.float64)
    num_bytes = 4 * perceptual.embed(images[:1]).shape[1]
    blocks = torch.arange(num).split(max(1, MAX_BYTES // num_bytes))
    for number, block in enumerate(blocks):
        rows = _embed(images[block], perceptual)
        for other in blocks[number:]:
            columns = rows if other is block else _embed(images[other], perceptual)
            for i, row in zip(block.tolist(), rows, strict=True):
                if i % world_size == rank:
                    found = (columns - row).square().sum(1).cpu().double()
                    distances[i, other] = found
    distances = process_group.all_reduce_sum(distances).triu(1)
    return distances + distances.T


def _embed(images: Tensor, perceptual: Perceptual) -> Tensor:
    return torch.cat([perceptual.embed(part) for part in images.split(PART)])
