"""Remote shards: what each of several nodes fetches in an epoch, and how fast a stream reads.

    python benchmarks/remote.py [--samples 48] [--json out.json]

64 shards of noise behind an HTTP server on this machine, 64 lanes, batches of 64. Each node is a
stream with a cache of its own, one after the other; all that is counted was really fetched. The
order tells which shards an epoch needs; a node has a few more by its end, prefetched for
the next one. Speeds are medians of the rounds, cold and warm cache and local disk in turn.
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from rich.console import Console
from rich.table import Table

from shards import Dataset, Sample, open_dataset, pack
from shards.read.order import Order

NUM_SHARDS = 64
BATCH = 64
NODES = (1, 2, 4, 8)
CHANNELS = 96
SIZE = 64
LEVELS = (16,)
STEP_S = 0.05


def samples(count: int) -> Iterator[Sample]:
    """Noise: 16x16x96 features (48 kB) and an image of 64x64."""
    rng = np.random.default_rng(0)
    for number in range(count):
        file = io.BytesIO()
        pixels = rng.integers(0, 256, (SIZE, SIZE, 3), np.uint8)
        Image.fromarray(pixels).save(file, "JPEG", quality=90)
        fine = rng.standard_normal((256, CHANNELS), np.float32).astype(np.float16)
        yield Sample(f"{number:06d}", file.getvalue(), "jpg", {}, {"p16": fine})


@contextmanager
def http_server(folder: Path) -> Iterator[str]:
    """URL of a folder, served by another process."""
    command = [sys.executable, "-u", "-m", "http.server", "--bind", "127.0.0.1", "0"]
    with (folder.parent / "requests").open("wb") as log:
        process = subprocess.Popen(
            [*command, "--directory", str(folder)], stdout=subprocess.PIPE, stderr=log, text=True
        )
        try:
            assert process.stdout is not None
            found = re.search(r"port (\d+)", process.stdout.readline())
            assert found is not None
            yield f"http://127.0.0.1:{found[1]}"
        finally:
            process.terminate()
            process.wait()


def epoch(data: Dataset, rank: int = 0, world_size: int = 1, step_s: float = 0.0) -> dict[str, Any]:
    """One epoch of a node: images/s of its own, share of time spent waiting for batches."""
    num_batches = data.num_samples() // BATCH
    count, waited, first = 0, 0.0, 0.0
    start = time.perf_counter()
    with data.stream(
        BATCH, rank=rank, world_size=world_size, image_size=SIZE, levels=LEVELS
    ) as stream:
        for number in range(num_batches):
            before = time.perf_counter()
            count += len(next(stream)["key"])
            took = time.perf_counter() - before
            waited, first = (waited + took, first) if number else (waited, took)
            time.sleep(step_s)
        took = time.perf_counter() - start
    return {"images_per_s": count / took, "waited": waited / (took - first), "first_s": first}


def nodes(folder: Path, url: str, caches: Path) -> list[dict[str, Any]]:
    """What the nodes of each number of nodes need and fetch: all of them, one after the other."""
    local = open_dataset(folder)
    sizes = [shard.num_samples for shard in local.manifest.of_split("train")]
    num_batches = local.num_samples() // BATCH
    tars = {shard.name: shard.num_bytes for shard in local.manifest.shards}
    rows = []
    for world_size in NODES:
        needed, fetched, num_bytes = [], [], []
        for rank in range(world_size):
            order = Order(sizes, seed=0)
            places = order.shares(0, BATCH, rank, world_size, num_batches)
            needed.append(len({int(shard) for place in places for shard in place.shard}))
            cache = caches / f"{world_size}-{rank}"
            epoch(open_dataset(url, cache_dir=cache), rank, world_size)
            names = [path.name for path in cache.rglob("*.tar")]
            fetched.append(len(names))
            num_bytes.append(sum(tars[name] for name in names))
        rows.append(
            {
                "nodes": world_size,
                "needed": [min(needed), max(needed)],
                "fetched": [min(fetched), max(fetched)],
                "mb_per_node": statistics.mean(num_bytes) / 1e6,
                "share_of_all": statistics.mean(num_bytes) / sum(tars.values()),
            }
        )
    return rows


def many_shards(num_shards: int) -> list[dict[str, Any]]:
    """The same by the order alone, for a set of more shards than lanes."""
    size = 64
    rows = []
    for world_size in NODES:
        order = Order([size] * num_shards, seed=0)
        needed = []
        for rank in range(world_size):
            places = order.shares(0, BATCH, rank, world_size, num_shards * size // BATCH)
            needed.append(len({int(shard) for place in places for shard in place.shard}))
        share = statistics.mean(needed) / num_shards
        rows.append({"nodes": world_size, "needed": [min(needed), max(needed)], "share": share})
    return rows


def speeds(folder: Path, url: str, caches: Path, rounds: int) -> dict[str, dict[str, float]]:
    """Medians over the rounds of an epoch's metric values, by where it reads from."""
    found: dict[str, list[dict[str, Any]]] = {}
    for number in range(rounds):
        for step_s, words in ((0.0, ""), (STEP_S, f", steps of {STEP_S * 1000:.0f} ms")):
            cache = caches / f"speed-{number}-{step_s}"
            for name, where in (("cold cache", url), ("warm cache", url), ("local disk", folder)):
                data = open_dataset(where, cache_dir=cache)
                found.setdefault(f"{name}{words}", []).append(epoch(data, step_s=step_s))
    return {
        name: {key: statistics.median(run[key] for run in runs) for key in runs[0]}
        for name, runs in found.items()
    }


def show(result: dict[str, Any]) -> None:
    """Print the metric values."""
    console = Console()
    table = Table(
        "nodes", "shards needed", "fetched", "MB per node", "of all", "needed, of 1024 shards",
        title=f"an epoch of {NUM_SHARDS} shards, {result['mb']:.0f} MB, per node",
    )  # fmt: skip
    for row, many in zip(result["nodes"], result["many_shards"], strict=True):
        table.add_row(
            str(row["nodes"]),
            *("{} to {}".format(*row[key]) for key in ("needed", "fetched")),
            f"{row['mb_per_node']:.0f}",
            f"{row['share_of_all']:.0%}",
            f"{many['share']:.1%}",
        )
    console.print(table)
    table = Table("an epoch from", "images/s", "waits", "first batch", title="one node, 2 threads")
    for name, row in result["speeds"].items():
        table.add_row(
            name, f"{row['images_per_s']:,.0f}", f"{row['waited']:.1%}", f"{row['first_s']:.2f} s"
        )
    console.print(table)


def main() -> None:
    """Pack, serve, measure, print tables and JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=48, help="per shard")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write the metric values here as well")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as temporary:
        folder, caches = Path(temporary) / "data", Path(temporary) / "caches"
        guide = {"name": "noise", "random": True}
        count = NUM_SHARDS * args.samples
        pack(itertools.islice(samples(count), count), folder, shard_size=args.samples, guide=guide)
        with http_server(folder) as url:
            result = {
                "cores": os.cpu_count(),
                "mb": sum(path.stat().st_size for path in folder.glob("*.tar")) / 1e6,
                "nodes": nodes(folder, url, caches),
                "many_shards": many_shards(1024),
                "speeds": speeds(folder, url, caches, args.rounds),
            }
    show(result)
    text = json.dumps(result, indent=1)
    print(text)
    if args.json:
        args.json.write_text(text)


if __name__ == "__main__":
    main()
