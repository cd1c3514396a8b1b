"""Small packed images, and a feature extractor that one can compute by hand."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dinogen.metrics.extractors.base import ExtractorInfo, NotAvailable
from shards.format.sample import Sample
from shards.read.dataset import PackedDataset, open_dataset
from shards.write.shard_writer import pack
from tests.families.tiny import discs

NUM = 48


def pack_images(folder: Path, images: list[np.ndarray], **more) -> PackedDataset:
    """Shards of (S, S, 3) uint8 images, stored without loss, many of them held out."""
    samples = []
    for number, pixels in enumerate(images):
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "PNG")
        samples.append(Sample(f"image{number:03d}", file.getvalue(), "png", {}, {}))
    pack(samples, folder, shard_size=8, val_fraction=0.3, test_fraction=0.2, **more)
    return open_dataset(folder)


def small_data(folder: Path, size: int = 16) -> PackedDataset:
    """Discs in train, val and test."""
    return pack_images(folder, discs(NUM, size))


def save_images(images: list[np.ndarray], folder: Path) -> Path:
    """A folder of PNG files in order of their names."""
    folder.mkdir()
    for number, pixels in enumerate(images):
        Image.fromarray(pixels).save(folder / f"{number:04d}.png")
    return folder


class Means:
    """An extractor of six features: mean and deviation of each colour; counts what it sees."""

    def __init__(
        self, name: str = "inception768", resize: str = "box 4", weights: str = "a" * 64
    ) -> None:
        self.info = ExtractorInfo(name, weights, resize, 6, 0, random=False)
        self.num_seen = 0

    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        self.num_seen += len(images)
        values = images.float().flatten(2)
        return {"features": torch.cat([values.mean(2), values.std(2)], 1).cpu()}


def only(monkeypatch, extractor: Means) -> Means:
    """Make it the one feature extractor whose weights are available."""

    def load(name, config, device):
        if name != extractor.info.name:
            raise NotAvailable(f"metrics.{name}: no path is given")
        return extractor

    monkeypatch.setattr("dinogen.metrics.suite.load_extractor", load)
    return extractor
