"""Loader benchmark: our stream against webdataset over the same tars, and against flat files.

    python benchmarks/loader.py --photos PHOTOS [--rounds 3] [--json out.json]

Real photos, cropped, resized to 256x256 JPEG, mirrored too; features are noise of the size of
DINOv2-base's (16x16x768 float16 and its 8x8 and 4x4 pools), because their values do not matter to
a reader. The flat files hold the same bytes, one file per image and per level, in one folder. All
readers take turns in one run; medians of the rounds.
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import os
import statistics
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
import torch
import webdataset
from PIL import Image
from rich.console import Console
from rich.table import Table

from shards import Dataset, Sample, open_dataset, pack
from shards.image.decode import decode_rgbx, shrink, write_into
from shards.read.batch import Buffers
from shards.read.dataset import PackedDataset

BATCH = 64
CHANNELS = 768
SIZE = 256
TASKS: dict[str, tuple[tuple[int, ...], bool]] = {
    "4x4": ((4,), False),
    "16x16": ((16,), False),
    "image + 16x16": ((16,), True),
}
TARGETS = {"4x4": 40.0, "16x16": 10.0, "image + 16x16": 3.0}
FLAT_TARGETS = {"16x16": 0.9}
COLD_TARGET = 1.2
WARM_UP_BATCHES = 4


def samples(photos: Path, limit: int | None) -> Iterator[Sample]:
    """Every photo and its mirror image, with features of noise."""
    paths = sorted(p for p in photos.rglob("*") if p.suffix.lower() in (".jpg", ".jpeg"))
    rng = np.random.default_rng(0)
    variants = itertools.product(enumerate(paths), (False, True))
    for (number, path), mirrored in itertools.islice(variants, limit):
        image = Image.open(path).convert("RGB")
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        box = (left, top, left + side, top + side)
        image = image.resize((SIZE, SIZE), Image.Resampling.BICUBIC, box)
        if mirrored:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        file = io.BytesIO()
        image.save(file, "JPEG", quality=95)
        fine = rng.standard_normal((16, 16, CHANNELS), np.float32)
        levels = {}
        for grid in (16, 8, 4):
            f = 16 // grid
            pooled = fine.reshape(grid, f, grid, f, CHANNELS).mean((1, 3))
            levels[f"p{grid}"] = pooled.reshape(grid * grid, CHANNELS).astype(np.float16)
        key = f"{number:05d}{'m' if mirrored else ''}"
        yield Sample(key, file.getvalue(), "jpg", {}, levels)


def ours(data: Dataset, levels: tuple[int, ...], image: bool, threads: int) -> Iterator[Any]:
    """Our stream, shuffled as in training."""
    size = SIZE if image else None
    with data.stream(BATCH, image_size=size, levels=levels, num_threads=threads) as stream:
        yield from stream


def webdataset_pipeline(
    tars: list[str], levels: tuple[int, ...], image: bool, workers: int
) -> Iterator[Any]:
    """webdataset at its best: only the members needed, raw buffers, simplejpeg, batches built in
    place; without a shuffle buffer, which would only cost it more."""
    suffixes = tuple(f".p{grid}.npy" for grid in levels) + ((".jpg",) if image else ())

    def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
        batch: dict[str, Any] = {"key": [row["__key__"] for row in rows], "pyramid": {}}
        for grid in levels:
            out = np.empty((len(rows), grid * grid, CHANNELS), np.float16)
            for i, row in enumerate(rows):
                values = np.frombuffer(row[f"p{grid}.npy"], np.float16, offset=128)
                out[i] = values.reshape(grid * grid, CHANNELS)
            batch["pyramid"][grid] = torch.from_numpy(out)
        if image:
            pixels = np.empty((len(rows), 3, SIZE, SIZE), np.float32)
            for i, row in enumerate(rows):
                write_into(simplejpeg.decode_jpeg(row["jpg"], "RGBX"), pixels[i])
            batch["image"] = torch.from_numpy(pixels)
        return batch

    dataset = webdataset.WebDataset(
        tars,
        shardshuffle=len(tars),
        select_files=lambda name: name.endswith(suffixes),
        nodesplitter=None,
        empty_check=False,
    )
    pipeline = dataset.repeat().batched(BATCH, collation_fn=collate)
    loader = torch.utils.data.DataLoader(pipeline, batch_size=None, num_workers=workers)
    return iter(loader)


def write_flat(data: PackedDataset, folder: Path) -> None:
    """Write every image and every level of a dataset as a file of its own."""
    folder.mkdir(parents=True)
    for number in range(data.num_samples()):
        sample = data.sample(number)
        (folder / f"{number}.jpg").write_bytes(sample.image)
        for name, values in sample.levels.items():
            (folder / f"{number}.{name}").write_bytes(values.tobytes())


def flat_files(
    folder: Path, count: int, levels: tuple[int, ...], image: bool, threads: int
) -> Iterator[Any]:
    """The plain way over flat files: shuffled, opened one by one, read into place, decoded as ours.

    Memory is reused as in our stream: new memory would cost it more than opening the files.
    """
    buffers = Buffers(pinned=False)

    def make(numbers: list[int]) -> dict[str, Any]:
        batch: dict[str, Any] = {"key": numbers, "pyramid": {}}
        for grid in levels:
            out = buffers.take((len(numbers), grid * grid, CHANNELS), np.dtype(np.float16))
            rows = out.numpy().reshape(len(numbers), -1).view(np.uint8)
            for number, row in zip(numbers, rows, strict=True):
                with (folder / f"{number}.p{grid}").open("rb", buffering=0) as file:
                    file.readinto(row.data)
            batch["pyramid"][grid] = out
        if image:
            pixels = buffers.take((len(numbers), 3, SIZE, SIZE), np.dtype(np.float32))
            for number, one in zip(numbers, pixels.numpy(), strict=True):
                data = (folder / f"{number}.jpg").read_bytes()
                write_into(shrink(decode_rgbx(data, "jpg"), SIZE), one)
            batch["image"] = pixels
        return batch

    rng = np.random.default_rng(0)
    epochs = (rng.permutation(count).tolist() for _ in itertools.count())
    parts = (epoch[i : i + BATCH] for epoch in epochs for i in range(0, count - BATCH + 1, BATCH))
    with ThreadPoolExecutor(threads) as pool:
        pending = deque(pool.submit(make, next(parts)) for _ in range(threads + 1))
        while True:
            batch = pending.popleft().result()
            pending.append(pool.submit(make, next(parts)))
            yield batch


def speed(batches: Iterator[Any], seconds: float) -> float:
    """Samples per second, after a warm-up and for at least `seconds`."""
    for _ in range(WARM_UP_BATCHES):
        next(batches)
    count, start = 0, time.perf_counter()
    while (took := time.perf_counter() - start) < seconds:
        count += len(next(batches)["key"])
    close = getattr(batches, "close", None)
    if close is not None:
        close()
    return count / took


def forget(paths: list[Path]) -> None:
    """Drop files from the page cache."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def bytes_from_disk() -> int:
    """Bytes that this process has made the disk read."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("read_bytes"))


def cold(
    data: PackedDataset, tars: list[Path], levels: tuple[int, ...], image: bool
) -> dict[str, float]:
    """One epoch out of a cold cache: samples/s, and bytes read from disk over bytes needed."""
    table = data.table("train")
    suffixes = [f"p{grid}.npy" for grid in levels] + (["jpg"] if image else [])
    everything = set(range(len(table.shards)))
    needed = sum(int(table.column(suffix, everything).sizes.sum()) for suffix in suffixes)
    forget(tars)
    # A whole epoch: what the stream has prefetched is in the page cache by then.
    batches = -(-data.num_samples() // BATCH)
    before, start = bytes_from_disk(), time.perf_counter()
    for _ in itertools.islice(ours(data, levels, image, 2), batches):
        pass
    took = time.perf_counter() - start
    return {
        "samples_per_s": batches * BATCH / took,
        "read_over_needed": (bytes_from_disk() - before) / needed,
    }


def measure(data: PackedDataset, folder: Path, rounds: int, seconds: float) -> dict[str, Any]:
    """Medians of all readers, all tasks, in turn; the cold cache comes after the warm one."""
    tars = sorted(folder.glob("train-*.tar"))
    names = [str(tar) for tar in tars]
    flat = folder.with_name(f"{folder.name}-flat")
    if not flat.exists():
        write_flat(data, flat)
    count = data.num_samples()
    found: dict[str, dict[str, list[float]]] = {task: {} for task in TASKS}
    for levels, image in TASKS.values():
        # Into the page cache, and past the check that each process makes once.
        one_epoch(data, levels, image)
    for _ in range(rounds):
        for task, (levels, image) in TASKS.items():
            readers: dict[str, Callable[[], Iterator[Any]]] = {}
            for n in (0, 1, 2):
                readers[f"dinogen, {n} threads"] = partial(ours, data, levels, image, n)
            for n in (0, 1, 2):
                readers[f"webdataset, {n} workers"] = partial(
                    webdataset_pipeline, names, levels, image, n
                )
            for n in (1, 2):
                readers[f"flat files, {n} threads"] = partial(
                    flat_files, flat, count, levels, image, n
                )
            for reader, start in readers.items():
                found[task].setdefault(reader, []).append(speed(start(), seconds))
            checking = one_epoch(open_dataset(folder), levels, image)
            found[task].setdefault("dinogen, 2 threads, first epoch", []).append(checking)
    result: dict[str, Any] = {"warm": {}, "ratio": {}, "flat_ratio": {}, "cold": {}}
    for task, (levels, image) in TASKS.items():
        medians = {name: statistics.median(values) for name, values in found[task].items()}
        result["warm"][task] = medians
        best = {
            who: max(medians[f"{who}, {n} {kind}"] for n in (0, 1, 2))
            for who, kind in (("dinogen", "threads"), ("webdataset", "workers"))
        }
        result["ratio"][task] = best["dinogen"] / best["webdataset"]
        # In each round the two ran one after the other: what else the machine did cancels out.
        result["flat_ratio"][task] = min(
            statistics.median(
                ours / flat
                for ours, flat in zip(
                    found[task][f"dinogen, {n} threads"],
                    found[task][f"flat files, {n} threads"],
                    strict=True,
                )
            )
            for n in (1, 2)
        )
        runs = [cold(data, tars, levels, image) for _ in range(rounds)]
        result["cold"][task] = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
    return result


def one_epoch(data: Dataset, levels: tuple[int, ...], image: bool) -> float:
    """Samples per second of one epoch; of a dataset just opened, every checksum is computed."""
    batches = data.num_samples() // BATCH
    start = time.perf_counter()
    for _ in itertools.islice(ours(data, levels, image, 2), batches):
        pass
    return batches * BATCH / (time.perf_counter() - start)


def show(result: dict[str, Any]) -> None:
    """Print the metric values beside their targets."""
    console = Console()
    warm = Table("reader", *TASKS, title="warm cache, samples/s, medians")
    for reader in next(iter(result["warm"].values())):
        warm.add_row(reader, *(f"{result['warm'][task][reader]:,.0f}" for task in TASKS))
    for label, values in (
        ("best of ours / best of webdataset", result["ratio"]),
        ("wanted at least", TARGETS),
        ("ours / flat files, the lower of 1 and 2 threads", result["flat_ratio"]),
        ("wanted at least", FLAT_TARGETS),
    ):
        warm.add_row(label, *(f"{values[task]:.2f}x" if task in values else "" for task in TASKS))
    console.print(warm)
    table = Table("cold cache, 2 threads", *TASKS)
    for label, key, form in (
        ("samples/s", "samples_per_s", ",.0f"),
        ("bytes from disk / bytes needed", "read_over_needed", ".2f"),
    ):
        table.add_row(label, *(format(result["cold"][task][key], form) for task in TASKS))
    table.add_row("wanted at most", *(f"{COLD_TARGET}" for _ in TASKS))
    console.print(table)


def main() -> None:
    """Pack the photos, measure, print a table and JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--photos", type=Path, required=True, help="folder of JPEG photos")
    parser.add_argument("--data", type=Path, help="keep the packed dataset here and use it again")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=3.0, help="per measurement")
    parser.add_argument("--num-samples", type=int, help="at most that many")
    parser.add_argument("--json", type=Path, help="write the metric values here as well")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as temporary:
        folder = args.data or Path(temporary) / "data"
        if not (folder / "manifest.json").exists():
            guide = {"name": "noise", "random": True}
            pack(samples(args.photos, args.num_samples), folder, shard_size=150, guide=guide)
        data = open_dataset(folder)
        result = {
            "num_samples": data.num_samples(),
            "num_shards": len(data.manifest.shards),
            "batch": BATCH,
            "channels": CHANNELS,
            "cores": os.cpu_count(),
            "rounds": args.rounds,
            **measure(data, folder, args.rounds, args.seconds),
        }
    show(result)
    text = json.dumps(result, indent=1)
    print(text)
    if args.json:
        args.json.write_text(text)


if __name__ == "__main__":
    main()
