"""What metrics say of real images, and what they cost for 10,000 samples against 700.

    python benchmarks/measuring.py order --inception WEIGHTS --faces PHOTOS --cats PHOTOS
    python benchmarks/measuring.py cost [--inception WEIGHTS] [--num 10000] [--real 700]

``order``: FID-768 and the others of half of the faces against the other half, the same with noise,
and of cats. Every second photo is one half; the middle square, 128 pixels by area; sigma is of
pixels in [-1, 1].

``cost``: all metrics of a feature extractor with FID's 2048 features and 1008 logits, with spreads
over 10 halves. The extractor is a random projection, so that the clock shows what metrics cost; the
network of FID-768 is timed beside it if its weights are given.
"""

from __future__ import annotations

import argparse
import resource
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from dinogen.config.training import MetricsConfig
from dinogen.distributed import process_group, rng
from dinogen.metrics.collect import Seen, collect
from dinogen.metrics.extractors.base import ExtractorInfo, FeatureExtractor
from dinogen.metrics.registry import OF_FEATURES, Sets
from dinogen.metrics.suite import load_extractor

SIDE = 128
BATCH = 50
NUM_HALVES = 10


def main() -> None:
    """Print one of the two tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    of_photos = commands.add_parser("order")
    of_photos.add_argument("--inception", type=Path, required=True)
    of_photos.add_argument("--faces", type=Path, required=True)
    of_photos.add_argument("--cats", type=Path, required=True)
    of_noise = commands.add_parser("cost")
    of_noise.add_argument("--inception", type=Path)
    of_noise.add_argument("--num", type=int, default=10_000)
    of_noise.add_argument("--real", type=int, default=700)
    options = parser.parse_args()
    process_group.set_cpu_threads()
    order(options) if options.command == "order" else cost(options)


class Given:
    """Images (N, 3, R, R) uint8 that are all there."""

    def __init__(self, images: Tensor) -> None:
        self.num, self.images = len(images), images

    def read(self, numbers: list[int]) -> Tensor:
        """Some of them."""
        return self.images[numbers]


class Noise:
    """Images of smooth noise by number, made when they are read.

    Args:
        num: how many.
        purpose: of the draws; another one gives other images.
        contrast: of the noise.
    """

    def __init__(self, num: int, purpose: str, contrast: float) -> None:
        self.num, self.purpose, self.contrast = num, purpose, contrast

    def read(self, numbers: list[int]) -> Tensor:
        """(N, 3, 64, 64) uint8."""
        coarse = rng.normal(0, self.purpose, torch.tensor(numbers), (3, 8, 8))
        pixels = 127.5 + self.contrast * F.interpolate(coarse, 64, mode="bicubic")
        return pixels.round().clamp(0, 255).to(torch.uint8)


class Projection:
    """A feature extractor as wide as FID's that costs next to nothing."""

    def __init__(self) -> None:
        self.info = ExtractorInfo("inception", "", "area 8", 2048, 1008, random=True)
        generator = torch.Generator().manual_seed(0)
        self.weight = torch.randn(192, 2048 + 1008, generator=generator) / 192**0.5

    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        """Rows of images."""
        pixels = F.adaptive_avg_pool2d(images.float() / 127.5 - 1, 8).flatten(1)
        features, logits = (pixels @ self.weight).split([2048, 1008], 1)
        return {"features": F.relu(features), "logits": logits}


def order(options: argparse.Namespace) -> None:
    """Print what the metrics of FID-768's extractor say of sets that get worse."""
    extractor = inception768(options.inception)
    faces, cats = squares(options.faces), squares(options.cats)
    ours, others = faces[0::2], faces[1::2]
    real = seen(Given(others), extractor)
    names = [
        name
        for name, one in OF_FEATURES.items()
        if one.extractor == "inception768" and not one.train
    ]
    print(f"{len(ours)} faces against {len(others)} others, {len(cats)} cats")
    print(f"{'':20}" + "".join(f"{name:>20}" for name in names))
    rows = {
        "faces": ours,
        "faces, sigma 0.05": noisy(ours, 0.05),
        "faces, sigma 0.2": noisy(ours, 0.2),
        "cats": cats,
    }
    for title, images in rows.items():
        sets = Sets(seen(Given(images), extractor), real, None, NUM_HALVES, 0)
        found = [OF_FEATURES[name].estimate(sets) for name in names]
        cells = [f"{one.value:.4f} ± {one.spread or 0:.4f}" for one in found]
        print(f"{title:20}" + "".join(f"{cell:>20}" for cell in cells), flush=True)


def cost(options: argparse.Namespace) -> None:
    """Print seconds and memory of everything."""
    print(f"{torch.get_num_threads()} threads; {memory():.0f} MB before anything", flush=True)
    extractors: list[FeatureExtractor] = [Projection()]
    if options.inception:
        extractors.append(inception768(options.inception))
    told("extractors loaded", lambda: None)
    keep = [extractor.info.name for extractor in extractors]

    def look(num: int, purpose: str, contrast: float) -> dict[str, Seen]:
        return collect(Noise(num, purpose, contrast), extractors, keep, BATCH).seen

    made = told(f"{options.num} samples seen", lambda: look(options.num, "made", 50))
    real = told(f"{options.real} real seen", lambda: look(options.real, "real", 60))
    train = told(f"{options.real} learnt from, seen", lambda: look(options.real, "train", 60))
    kept = [
        rows for one in made.values() for rows in (one.features, one.logits) if rows is not None
    ]
    print(f"rows kept of the samples: {sum(rows.nbytes for rows in kept) / 1e6:.0f} MB")
    # precision, recall, density and coverage share one pass, which the first of them is charged
    sets = {name: Sets(made[name], real[name], train[name], NUM_HALVES, 0) for name in keep}
    for name, metric in OF_FEATURES.items():
        if metric.extractor in keep:
            told(name, partial(metric.estimate, sets[metric.extractor]))


def told(title: str, work: Callable[..., Any]) -> Any:
    """Do it, and print its seconds, by clock and of CPUs, the peak memory and what came out."""
    start, used = time.monotonic(), time.process_time()
    result = work()
    seconds, cpu = time.monotonic() - start, time.process_time() - used
    metric_value = f"{result.value:.5g} ± {result.spread:.2g}" if hasattr(result, "spread") else ""
    print(
        f"{title:28} {seconds:8.1f} s {cpu:8.1f} CPU s   peak {memory():6.0f} MB   {metric_value}",
        flush=True,
    )
    return result


def memory() -> float:
    """Largest resident size of this process so far, MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


def inception768(path: Path) -> FeatureExtractor:
    """The feature extractor of FID-768."""
    return load_extractor(
        "inception768", MetricsConfig(inception768=str(path)), process_group.device()
    )


def seen(source: Given, extractor: FeatureExtractor) -> Seen:
    """All that a feature extractor says."""
    return collect(source, [extractor], [extractor.info.name], BATCH).seen[extractor.info.name]


def squares(folder: Path) -> Tensor:
    """The middle squares of photos, in order of their names, (N, 3, SIDE, SIDE) uint8."""
    found = []
    for file in sorted(folder.glob("*.jpg")):
        with Image.open(file) as photo:
            side = min(photo.size)
            left, top = (photo.width - side) // 2, (photo.height - side) // 2
            square = photo.convert("RGB").crop((left, top, left + side, top + side))
            found.append(np.array(square.resize((SIDE, SIDE), Image.Resampling.BOX)))
    return torch.from_numpy(np.stack(found)).permute(0, 3, 1, 2)


def noisy(images: Tensor, sigma: float) -> Tensor:
    """With normal noise of ``sigma``, of pixels in [-1, 1]."""
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    return (images + sigma * 127.5 * noise).round().clamp(0, 255).to(torch.uint8)


if __name__ == "__main__":
    main()
