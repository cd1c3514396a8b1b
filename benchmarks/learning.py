"""Whether runs have learnt: FID-768 of their kept checkpoints against held-out images.

    python benchmarks/learning.py --inception WEIGHTS RUN...

Give each run checkpoint.keep_every_kimg. FID-768 is the Frechet distance (Heusel et al. 2017,
equation 6) of the spatial means of InceptionV3's Mixed_6e, from images at the run's resolution,
enlarged to 299 pixels: to be compared with each other, not with FID. Above all stands what as many
real images of the training set reach, and what images of plain noise do.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from torch import Tensor

from dinogen.config import load_config
from dinogen.config.training import MetricsConfig
from dinogen.metrics.collect import Moments
from dinogen.metrics.extractors.base import FeatureExtractor
from dinogen.metrics.frechet import frechet_of
from dinogen.metrics.sources import as_pixels
from dinogen.metrics.suite import load_extractor
from dinogen.training.checkpointing.snapshot import load_snapshot
from dinogen.training.data import open_data


def main() -> None:
    """Print one table per run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--inception", type=Path, required=True)
    parser.add_argument("--num", type=int, default=256, help="samples of each checkpoint")
    parser.add_argument("--points", type=int, default=3, help="checkpoints of each run")
    parser.add_argument("--out", type=Path, help="JSON with the values")
    options = parser.parse_args()
    metrics = MetricsConfig(inception768=str(options.inception))
    extractor = load_extractor("inception768", metrics, torch.device("cpu"))
    found: dict[str, dict[str, float]] = {}
    references: dict[tuple[str, int], tuple[Moments, dict[str, float]]] = {}
    for run in options.runs:
        config = load_config(run / "config.yaml")
        size = config.stages[-1].resolution
        place = (config.data.path, size)
        if place not in references:
            references[place] = reference(extractor, run, size, options.num)
        real, bounds = references[place]
        metric_values = dict(bounds)
        for nimg in spread(kept(run, size), options.points):
            images = load_snapshot(run, size, nimg).sample(options.num, seed=1)
            metric_values[f"{nimg / 1000:g} kimg"] = frechet_of(seen(extractor, images), real)
        found[run.name] = metric_values
        print(run.name, ", ".join(f"{k}: {v:.3f}" for k, v in metric_values.items()), flush=True)
    if options.out:
        options.out.write_text(json.dumps(found, indent=1), encoding="utf-8")


def reference(
    extractor: FeatureExtractor, run: Path, size: int, num: int
) -> tuple[Moments, dict[str, float]]:
    """Moments of the held-out images, and what real ones and noise reach against them."""
    data = open_data(load_config(run / "config.yaml"))

    def images_of(split: str, most: int) -> Tensor:
        available = data.num_samples(split)
        chosen = torch.linspace(0, available - 1, min(available, most)).long().tolist()
        images: Tensor = data.read(chosen, split=split, image_size=size)["image"]
        return images

    held_out = seen(extractor, images_of("val", 10**6))
    train = frechet_of(seen(extractor, images_of("train", num)), held_out)
    noise = torch.randn(num, 3, size, size, generator=torch.Generator().manual_seed(0))
    return held_out, {
        "real": train,
        "noise": frechet_of(seen(extractor, noise.clamp(-1, 1)), held_out),
    }


def kept(run: Path, size: int) -> list[int]:
    """nimg of every checkpoint of a run's last stage."""
    folders = (run / f"{size}x{size}" / "checkpoints").iterdir()
    return sorted(int(folder.name) for folder in folders if folder.name.isdigit())


def spread(items: list[int], num: int) -> list[int]:
    """The first, the last, and some in between."""
    places = torch.linspace(0, len(items) - 1, min(num, len(items))).round().int()
    return [items[place] for place in places.tolist()]


def seen(extractor: FeatureExtractor, images: Tensor) -> Moments:
    """Moments of the features of images (N, 3, R, R) in [-1, 1]."""
    moments = Moments.empty(extractor.info.num_channels)
    for part in as_pixels(images).split(32):
        moments.add(extractor(part)["features"])
    return moments


if __name__ == "__main__":
    main()
