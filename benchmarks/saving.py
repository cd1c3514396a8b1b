"""What checkpoints cost a run: time lost, and seconds from save to complete file.

    python benchmarks/saving.py
    python benchmarks/saving.py --resolution 64 --batch 64 --steps 400      on a GPU

Trains the guided family's generator at full width (16x16 unless told otherwise, one process) for
the same steps without and with a checkpoint every 50 steps, in turns. Then the state of the
256x256 generator, with Adam's moments and the moving average, is saved once.
"""

from __future__ import annotations

import argparse
import io
import json
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from PIL import Image

from dinogen.config import Config, GuideConfig, parse_config
from dinogen.distributed import process_group
from dinogen.families.registry import resolve
from dinogen.features.dinov2 import make_random_dinov2
from dinogen.features.load import load_guide
from dinogen.training.run import train
from dinogen.training.state import StageState
from shards.format.sample import Sample
from shards.write.shard_writer import pack

EVERY = 50


def main() -> None:
    """Measure both and print them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--resolution", type=int, default=16)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--rounds", type=int, default=2)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        guide = make_data(folder)
        runs: dict[bool, list[dict[str, float]]] = {False: [], True: []}
        for number in range(options.rounds):
            for saving in (False, True):
                config = make_config(folder, options, f"run{number}{saving}", saving)
                runs[saving].append(measure(config))
        rows = {
            saving: {k: median(r[k] for r in found) for k in found[0]}
            for saving, found in runs.items()
        }
        plain, saved = rows[False], rows[True]
        print(
            f"\n{options.resolution}x{options.resolution}, batch {options.batch}, "
            f"{options.steps} steps, medians of {options.rounds} rounds, {guide}"
        )
        print(f"  without saves  {plain['seconds']:8.2f} s")
        print(
            f"  every {EVERY} steps {saved['seconds']:8.2f} s   "
            f"lost {saved['seconds'] / plain['seconds'] - 1:+.2%}, "
            f"blocked (save_share in the log) {saved['save_share']:.2%}"
        )
        big = save_256(folder, options)
        print(
            "256x256 generator, Adam moments, moving average: "
            f"{big['megabytes']:.0f} MB, copied to host memory in {big['capture']:.2f} s, "
            f"complete on disk {big['write']:.1f} s after that"
        )


def make_data(folder: Path) -> str:
    """A few images and their features by a small guide; returns what it is."""
    make_random_dinov2(folder / "guide", seed=0, hidden_size=32, num_layers=2, num_heads=2)
    guide = load_guide(GuideConfig(path=str(folder / "guide")), torch.device("cpu"))
    rng = np.random.default_rng(0)
    samples = []
    for number in range(64):
        file = io.BytesIO()
        Image.fromarray(rng.integers(0, 255, (256, 256, 3), dtype=np.uint8)).save(file, "JPEG")
        channels = 32
        levels: dict[str, Any] = {}
        for grid in (4, 8, 16):
            features = rng.standard_normal((grid * grid, channels)).astype(np.float16)
            levels |= {f"n{grid}": features, f"p{grid}": features}
        samples.append(Sample(f"noise{number:02d}", file.getvalue(), "jpg", {}, levels))
    pack(samples, folder / "data", shard_size=32, guide=guide.info.to_dict())
    return f"guide of {channels} channels on {process_group.device()}"


def make_config(
    folder: Path, options: argparse.Namespace, name: str, saving: bool, resolution: int = 0
) -> Config:
    """One stage of full width."""
    kimg = options.batch / 1000
    stage = {
        "resolution": resolution or options.resolution,
        "kimg": options.steps * kimg,
        "batch": options.batch,
    }
    return resolve(
        parse_config(
            {
                "run": str(folder / name),
                "data": {"path": str(folder / "data")},
                "guide": {"path": str(folder / "guide")},
                "family": {"name": "guided"},
                "stages": [stage],
                "checkpoint": {"every_kimg": EVERY * kimg if saving else 1e9},
                "log": {
                    "every_kimg": options.steps * kimg / 4,
                    "probe_kimg": 1e9,
                    "samples_kimg": 1e9,
                    "num_samples": 1,
                },
            }
        )
    )


def measure(config: Config) -> dict[str, float]:
    """Seconds of training by the wall, the share that saves blocked."""
    began = time.monotonic()
    train(config)
    size = config.stages[0].resolution
    lines = (config.run / f"{size}x{size}" / "stats.jsonl").read_text().splitlines()
    shares = [json.loads(line)["save_share"] for line in lines]
    return {"seconds": time.monotonic() - began, "save_share": sum(shares) / len(shares)}


def save_256(folder: Path, options: argparse.Namespace) -> dict[str, float]:
    """Save the largest state once."""
    state = StageState(make_config(folder, options, "big", True, resolution=256), 0)
    state.engine.prepare()
    optimizer = state.engine.optimizers["G"]
    for parameter in state.family.networks["G"].parameters():
        optimizer.state[parameter] = {
            "step": torch.ones(()),
            "exp_avg": torch.rand_like(parameter),
            "exp_avg_sq": torch.rand_like(parameter),
        }
    began = time.monotonic()
    write = state.capture({})
    captured = time.monotonic()
    assert write is not None
    write()
    done = time.monotonic()
    saved = state.folder / "checkpoints"
    return {
        "capture": captured - began,
        "write": done - captured,
        "megabytes": sum(p.stat().st_size for p in saved.rglob("*") if p.is_file()) / 1e6,
    }


if __name__ == "__main__":
    main()
