"""Collects on several gloo ranks; each leaves what it got, and what it read, in a file."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from dinogen.distributed import process_group, rng
from dinogen.metrics.collect import Collected, Moments, collect
from dinogen.metrics.extractors.base import ExtractorInfo, NotAvailable
from dinogen.metrics.frechet import frechet_of
from dinogen.metrics.suite import load_extractor
from tests import forked

NUM, BATCH = 10, 3


class Noise:
    """Images of 6x6 pixels by number; remembers what was read."""

    def __init__(self, num: int) -> None:
        self.num = num
        self.read_numbers: list[int] = []

    def read(self, numbers: list[int]) -> Tensor:
        self.read_numbers += numbers
        positions = torch.tensor(numbers)
        return rng.integers(0, "noise", positions, (3, 6, 6), high=256).to(torch.uint8)


class Linear:
    """A feature extractor one can compute by hand: a fixed linear map of the pixels."""

    def __init__(self, name: str, num_channels: int, num_logits: int) -> None:
        self.info = ExtractorInfo(name, "0" * 64, "none", num_channels, num_logits, random=True)
        generator = torch.Generator().manual_seed(num_channels)
        self.weight = torch.randn(3 * 6 * 6, num_channels + num_logits, generator=generator)
        self.num_seen = 0

    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        self.num_seen += len(images)
        found = images.flatten(1).float() @ self.weight
        features, logits = found.split([self.info.num_channels, self.info.num_logits], 1)
        return (
            {"features": features, "logits": logits}
            if self.info.num_logits
            else {"features": features}
        )


def look(num: int) -> tuple[Collected, Noise]:
    """Three feature extractors: rows kept with and without logits, and only moments."""
    extractors = [Linear("both", 5, 4), Linear("plain", 3, 0), Linear("moments", 4, 2)]
    source = Noise(num)
    found = collect(source, extractors, {"both", "plain"}, BATCH, num_images=4)
    assert {extractor.num_seen for extractor in extractors} == {len(source.read_numbers)}
    return found, source


def as_tensors(found: Collected, source: Noise) -> dict[str, Tensor]:
    """All that was collected, and the numbers read on this rank."""
    tensors = {"read": torch.tensor(source.read_numbers, dtype=torch.int64)}
    assert found.num == source.num and found.images is not None
    tensors["images"] = found.images
    for name, seen in found.seen.items():
        tensors |= {f"{name}/{key}": value for key, value in seen.moments.tensors().items()}
        kept = {"features": seen.features, "logits": seen.logits}
        tensors |= {f"{name}/{key}": value for key, value in kept.items() if value is not None}
    return tensors


def on_rank(rank: int, world: int, port: int, out: Path) -> None:
    """What one process does."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    process_group.use_device("cpu")
    process_group.init()
    tensors = {}
    for num in (NUM, BATCH):  # the second is one batch: only one rank has anything to do
        found, source = look(num)
        tensors |= {f"{num}/{key}": value for key, value in as_tensors(found, source).items()}
    rows = found.seen["both"].features
    assert rows is not None
    mine = Moments.of(rows[rank::world]).merged()
    tensors["itself"] = torch.tensor(frechet_of(mine, found.seen["both"].moments))
    tensors["refused"] = torch.tensor(refused(rank))
    save_file(tensors, out / f"{rank}.safetensors")
    process_group.shutdown()


def refused(rank: int) -> bool:
    """Whether a feature extractor that only the last rank cannot have is refused on all of them."""
    from dinogen.metrics.extractors import inception768

    def load(path: str | None, device: torch.device) -> Linear:
        if rank == process_group.world_size() - 1:
            raise NotAvailable("metrics.inception768: no such file")
        return Linear("inception768", 4, 0)

    inception768.load = load  # type: ignore[assignment]
    from dinogen.config.training import MetricsConfig

    try:
        load_extractor("inception768", MetricsConfig(), torch.device("cpu"))
    except NotAvailable:
        return True
    return False


def run(world: int, out: Path) -> None:
    """Start the ranks and wait for them."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = forked.context()
    processes = [
        context.Process(target=on_rank, args=(rank, world, port, out)) for rank in range(world)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(280)
    assert [process.exitcode for process in processes] == [0] * world
