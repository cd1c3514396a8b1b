"""What a dataset of a million samples costs a rank before its first batch, against a small one.

    python benchmarks/scale.py [--sizes 10000 100000 1000000] [--folder FOLDER] [--json out.json]

Packs tiny samples (an image of 8x8 pixels and one level) and opens each dataset as rank 700 of
1,024, as training does; each measurement is a process of its own. One shard is written by the
project's own writer; the others are copies of it under keys of their own.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image
from rich.console import Console
from rich.table import Table

from shards.format import index as index_files
from shards.format.manifest import MANIFEST, split_table
from shards.format.sample import Sample
from shards.write.shard_writer import pack

RANK, WORLD_SIZE, BATCH = 700, 1024, 4096
SIZE, GRID, CHANNELS = 8, 4, 8
DIGITS = 8
FURTHER = 32
_BLOCK, _CHECKSUM = 512, slice(148, 156)
ROWS = {
    "import_s": "import torch and shards, s",
    "open_s": "open, s",
    "first_s": "from open to the first batch, s",
    "next_s": "each further batch, s",
    "imported_mb": "memory after the imports, MiB",
    "peak_mb": "peak memory, MiB",
    "growth_mb": "of which the dataset, MiB",
}


def pack_many(num_samples: int, shard_size: int, folder: Path) -> None:
    """Write a dataset of `num_samples`, in shards of equal size."""
    if num_samples % shard_size:
        raise SystemExit(f"{num_samples} samples do not fill shards of {shard_size}")
    manifest = pack(samples(shard_size), folder, shard_size=shard_size)
    (first,) = manifest.shards
    path = folder / first.name
    index = index_files.load(path.with_name(index_files.index_name(first.name)))
    with tarfile.open(path) as tar:
        headers = np.array([member.offset for member in tar.getmembers()]) // _BLOCK
    blocks = np.frombuffer(path.read_bytes(), np.uint8).reshape(-1, _BLOCK).copy()
    shards = [first]
    for number in range(1, num_samples // shard_size):
        keys = number * shard_size + np.arange(shard_size)
        blocks[headers] = renamed(blocks[headers], keys.repeat(len(headers) // shard_size))
        name = f"train-{number:05d}.tar"
        data = blocks.tobytes()
        (folder / name).write_bytes(data)
        digest = hashlib.sha256(data).hexdigest()
        shards.append(first.model_copy(update={"name": name, "sha256": digest}))
        text = np.array([f"{key:0{DIGITS}d}".encode() for key in keys.tolist()])
        index_files.save(replace(index, keys=text), folder / index_files.index_name(name))
    update = {"shards": tuple(shards), "splits": split_table(tuple(shards), {"train": 1.0})}
    manifest.model_copy(update=update).save(folder)


def samples(count: int) -> Iterator[Sample]:
    """Small images of noise with features of noise, under numbers as keys."""
    rng = np.random.default_rng(0)
    for number in range(count):
        file = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (SIZE, SIZE, 3), np.uint8)).save(file, "JPEG")
        level = rng.standard_normal((GRID * GRID, CHANNELS)).astype(np.float16)
        yield Sample(f"{number:0{DIGITS}d}", file.getvalue(), "jpg", {}, {f"p{GRID}": level})


def renamed(headers: npt.NDArray[np.uint8], keys: npt.NDArray[np.int64]) -> npt.NDArray[np.uint8]:
    """Headers of a tar, (n, 512), whose names begin with other keys of the same length."""
    found = headers.copy()
    found[:, :DIGITS] = _digits(keys, 10, DIGITS)
    # The sum of all bytes, with spaces for the sum itself; six octal digits, a zero, a space.
    found[:, _CHECKSUM] = ord(" ")
    found[:, _CHECKSUM.start : _CHECKSUM.start + 6] = _digits(found.sum(1, np.int64), 8, 6)
    found[:, _CHECKSUM.start + 6] = 0
    return found


def _digits(numbers: npt.NDArray[np.int64], base: int, width: int) -> npt.NDArray[np.uint8]:
    powers = base ** np.arange(width - 1, -1, -1)
    return (numbers[:, None] // powers % base + ord("0")).astype(np.uint8)


def measure(folder: Path, share: float) -> dict[str, float]:
    """Open a dataset in this process from `share` of an epoch on; what it takes, and the memory."""
    began = time.perf_counter()
    import torch  # noqa: F401

    import shards

    found = {"import_s": time.perf_counter() - began}
    # From here on the peak is counted again: that of the imports would hide all that follows.
    Path("/proc/self/clear_refs").write_text("5")
    found["imported_mb"] = peak_mb()
    began = time.perf_counter()
    data = shards.open_dataset(folder)
    start = int(share * data.num_samples()) // BATCH * BATCH
    stream = data.stream(
        BATCH, rank=RANK, world_size=WORLD_SIZE, start=start, image_size=SIZE, levels=[GRID],
        num_threads=1,
    )  # fmt: skip
    found["open_s"] = time.perf_counter() - began
    with stream:
        next(stream)
        found["first_s"] = time.perf_counter() - began
        began = time.perf_counter()
        for _ in range(FURTHER):
            next(stream)
        found["next_s"] = (time.perf_counter() - began) / FURTHER
    found["peak_mb"] = peak_mb()
    found["growth_mb"] = found["peak_mb"] - found["imported_mb"]
    return found


def peak_mb() -> float:
    """Most memory that this process has held, MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


def in_own_process(folder: Path, share: float) -> dict[str, float]:
    """As `measure`, in a fresh process."""
    command = [sys.executable, __file__, "--measure", str(folder), str(share)]
    printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    found: dict[str, float] = json.loads(printed)
    return found


def show(result: dict[str, dict[str, float]]) -> None:
    """Print medians, one column per dataset and beginning."""
    table = Table(f"rank {RANK} of {WORLD_SIZE:,}, batch {BATCH:,}", *result)
    for name, label in ROWS.items():
        form = ",.1f" if name.endswith("_mb") else ".4f" if name == "next_s" else ".2f"
        table.add_row(label, *(format(column[name], form) for column in result.values()))
    Console(width=160).print(table)


def main() -> None:
    """Pack, measure each dataset from its first sample and from 90 % of an epoch, print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[10_000, 100_000])
    parser.add_argument("--shard-size", type=int, default=1000, help="samples per shard")
    parser.add_argument("--folder", type=Path, help="keep the datasets here and use them again")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write the numbers here as well")
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(Path(args.measure[0]), float(args.measure[1]))))
        return
    result: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        for size in args.sizes:
            folder = (args.folder or Path(temporary)) / f"{size}-{args.shard_size}"
            if not (folder / MANIFEST).exists():
                began = time.perf_counter()
                pack_many(size, args.shard_size, folder)
                print(f"{folder}: packed in {time.perf_counter() - began:.0f} s")
            for label, share in (("", 0.0), (", from 90 %", 0.9)):
                rounds = [in_own_process(folder, share) for _ in range(args.rounds)]
                result[f"{size:,}{label}"] = {
                    name: statistics.median(one[name] for one in rounds) for name in ROWS
                }
    show(result)
    if args.json:
        args.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
