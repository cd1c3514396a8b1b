"""Pairs of drawn images, and metric values of them; under torchrun each rank writes what it found.

torchrun --nproc-per-node 2 tests/metrics/reconstruct.py BACKBONE OUT
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from dinogen.distributed import process_group
from dinogen.metrics.extractors.lpips import load_perceptual
from dinogen.metrics.lpips_diversity import lpips_diversity
from dinogen.metrics.reconstruction import reconstruction
from dinogen.metrics.value import MetricValue
from tests.metrics.backbones import random_images


class NoisyPairs:
    """Images, and the same with some noise, more for each.

    Attributes:
        starts: the first number of each read.
    """

    def __init__(self, num: int, size: int) -> None:
        self.num = num
        self.real = random_images(num, size) if num else torch.empty(0)
        noise = torch.randn(self.real.shape, generator=torch.Generator().manual_seed(1))
        sigma = torch.arange(1, num + 1).view(-1, 1, 1, 1) * 6
        self.made = (self.real + sigma * noise).clamp(0, 255).to(torch.uint8) if num else noise
        self.starts: list[int] = []

    def read(self, numbers: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        self.starts.append(numbers[0])
        return self.real[numbers], self.made[numbers]


def measure(backbone: str) -> list[MetricValue]:
    """All values, of five pairs in three batches and of one pair; under torchrun their shares."""
    perceptual = load_perceptual("alex", backbone, torch.device("cpu"))
    five, one = NoisyPairs(5, 16), NoisyPairs(1, 16)
    metric_values = [
        *reconstruction(five, perceptual, 2).values(),
        *reconstruction(one, perceptual, 2).values(),
    ]
    measure.starts = five.starts
    return [*metric_values, lpips_diversity(random_images(5, 16), perceptual)]


if __name__ == "__main__":
    process_group.init()
    found = [metric_value.to_dict() for metric_value in measure(sys.argv[1])]
    out = Path(sys.argv[2])
    (out / f"{process_group.rank()}.json").write_text(json.dumps(found))
    shares = process_group.all_gather(torch.tensor([len(measure.starts)])).tolist()
    if process_group.is_main():
        (out / "share.json").write_text(json.dumps(shares))
    process_group.shutdown()
