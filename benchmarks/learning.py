"""Whether runs have learnt: FID-768 of their kept checkpoints against held-out pictures.

    python benchmarks/learning.py --inception WEIGHTS RUN...

Give each run checkpoint.keep_every_kimg. FID-768 is the Frechet distance (Heusel et al. 2017,
equation 6) of the spatial means of InceptionV3's Mixed_6e, from pictures at the run's resolution,
enlarged to 299 pixels: to be compared with each other, not with FID. Above all stands what as many
real pictures of the training set reach, and what pictures of plain noise do.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from scipy import linalg
from torch import Tensor
from torch.nn import functional as F

from dinogen.config import GuideConfig, load_config
from dinogen.features.inception import load
from dinogen.training.data import open_data
from dinogen.training.snapshot import load_snapshot

SIDE = 299


def main() -> None:
    """Print one table per run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--inception", type=Path, required=True)
    parser.add_argument("--num", type=int, default=256, help="samples of each checkpoint")
    parser.add_argument("--points", type=int, default=3, help="checkpoints of each run")
    parser.add_argument("--out", type=Path, help="JSON with the figures")
    options = parser.parse_args()
    trunk = load(
        GuideConfig(name="inception", path=str(options.inception)), torch.device("cpu")
    ).trunk
    found: dict[str, dict[str, float]] = {}
    references: dict[tuple[str, int], tuple[Tensor, dict[str, float]]] = {}
    for run in options.runs:
        config = load_config(run / "config.yaml")
        size = config.stages[-1].resolution
        place = (config.data.path, size)
        if place not in references:
            references[place] = reference(trunk, run, size, options.num)
        real, bounds = references[place]
        figures = dict(bounds)
        for nimg in spread(kept(run, size), options.points):
            images = load_snapshot(run, size, nimg).sample(options.num, seed=1)
            figures[f"{nimg / 1000:g} kimg"] = frechet(features(trunk, images), real)
        found[run.name] = figures
        print(run.name, ", ".join(f"{k}: {v:.3f}" for k, v in figures.items()), flush=True)
    if options.out:
        options.out.write_text(json.dumps(found, indent=1), encoding="utf-8")


def reference(
    trunk: torch.nn.Module, run: Path, size: int, num: int
) -> tuple[Tensor, dict[str, float]]:
    """Features of the held-out pictures, and what real ones and noise reach against them."""
    data = open_data(load_config(run / "config.yaml"))

    def pictures(split: str, most: int) -> Tensor:
        available = data.num_samples(split)
        chosen = torch.linspace(0, available - 1, min(available, most)).long().tolist()
        images: Tensor = data.read(chosen, split=split, image_size=size)["image"]
        return images

    held_out = features(trunk, pictures("val", 10**6))
    train = frechet(features(trunk, pictures("train", num)), held_out)
    noise = torch.randn(num, 3, size, size, generator=torch.Generator().manual_seed(0))
    return held_out, {
        "real": train,
        "noise": frechet(features(trunk, noise.clamp(-1, 1)), held_out),
    }


def kept(run: Path, size: int) -> list[int]:
    """nimg of every checkpoint of a run's last stage."""
    folders = (run / f"{size}x{size}" / "checkpoints").iterdir()
    return sorted(int(folder.name) for folder in folders if folder.name.isdigit())


def spread(items: list[int], num: int) -> list[int]:
    """The first, the last, and some in between."""
    places = torch.linspace(0, len(items) - 1, min(num, len(items))).round().int()
    return [items[place] for place in places.tolist()]


@torch.no_grad()
def features(trunk: torch.nn.Module, images: Tensor) -> Tensor:
    """(N, 768) float64 of pictures (N, 3, R, R) in [-1, 1]."""
    parts = [
        trunk(F.interpolate(part, SIDE, mode="bilinear", align_corners=False)).mean((2, 3))
        for part in images.split(32)
    ]
    return torch.cat(parts).double()


def frechet(a: Tensor, b: Tensor) -> float:
    """Frechet distance of two normal distributions with the moments of some features."""
    first, second = a.T.cov(), b.T.cov()
    product = linalg.eigvals((first @ second).numpy()).real.clip(0)
    means = (a.mean(0) - b.mean(0)).square().sum()
    return float(means + first.trace() + second.trace() - 2 * (product**0.5).sum())


if __name__ == "__main__":
    main()
