"""Samples and datasets for the tests of shards: small, seeded, with a class label each."""

from __future__ import annotations

import io
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from shards import Sample, pack

CHANNELS = 6
SIZE = 32
NUM_SAMPLES = 61


def jpeg(seed: int, size: int = SIZE, image_format: str = "JPEG") -> bytes:
    """An image with smooth areas and noise, so that resizing and decoding have work to do."""
    rng = np.random.default_rng(seed)
    ramp = np.linspace(0, 200, size)[:, None, None] + np.zeros((1, size, 3))
    pixels = (ramp + rng.integers(0, 56, (size, size, 3))).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, image_format, quality=92)
    return file.getvalue()


def make_samples(
    count: int = NUM_SAMPLES, *, png_every: int = 0, labels: bool = True
) -> Iterator[Sample]:
    """`count` samples with pooled levels; every `png_every`-th image is a PNG."""
    for i in range(count):
        rng = np.random.default_rng(1000 + i)
        fine = rng.normal(3.0, 1.0 + np.arange(CHANNELS), (16, 16, CHANNELS)).astype(np.float16)
        wide = fine.astype(np.float32)
        levels = {"p16": fine.reshape(256, CHANNELS)}
        for grid in (8, 4):
            f = 16 // grid
            pooled = wide.reshape(grid, f, grid, f, CHANNELS).mean((1, 3))
            levels[f"p{grid}"] = pooled.reshape(grid * grid, CHANNELS).astype(np.float16)
        png = bool(png_every) and i % png_every == 0
        yield Sample(
            key=f"face-{i:04d}",
            image=jpeg(i, image_format="PNG" if png else "JPEG"),
            image_format="png" if png else "jpg",
            meta={"source": f"böse {i}.jpg", "box": [i, 2.5, 3]},
            levels=levels,
            label=i % 5 if labels else None,
        )


@pytest.fixture(scope="session")
def samples() -> list[Sample]:
    return list(make_samples(png_every=7))


@pytest.fixture(scope="session")
def packed(samples: list[Sample], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset of several shards and three splits; not to be changed, see `copy`."""
    folder = tmp_path_factory.mktemp("packed") / "data"
    pack(
        samples,
        folder,
        shard_size=8,
        val_fraction=0.15,
        test_fraction=0.1,
        guide={"name": "noise", "random": True},
        prepare={"detect": "none"},
    )
    return folder


@pytest.fixture
def copy(packed: Path, tmp_path: Path) -> Path:
    """A copy of the dataset that a test may damage."""
    return Path(shutil.copytree(packed, tmp_path / "copy"))


@pytest.fixture
def flip() -> Callable[[Path, int], None]:
    """Flips the lowest bit of one byte of a file."""

    def flip_bit(path: Path, offset: int) -> None:
        data = bytearray(path.read_bytes())
        data[offset] ^= 1
        path.write_bytes(bytes(data))

    return flip_bit


def files_of(folder: Path) -> dict[str, bytes]:
    """Content of every file in a folder, by name."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
