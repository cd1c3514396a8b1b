"""The same guided run on every engine: how far the weights end apart, and what each engine costs.

    python benchmarks/engines.py                      40 steps on two CPU ranks, tiny networks
    python benchmarks/engines.py --gpu                one GPU, bf16: cost of each engine over single

Two stages, fade-in included. Every engine is started the way a user starts it, by torchrun and by
the deepspeed launcher; `single` in one process is what the others are compared with.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image

from dinogen.config import GuideConfig
from dinogen.features.dinov2 import make_random_dinov2
from dinogen.features.load import load_guide
from dinogen.features.pyramid import native_pyramid
from dinogen.training.checkpointing.checkpoint import newest_checkpoint
from shards.format.sample import Sample
from shards.write.shard_writer import pack

REPO = Path(__file__).parents[1]
GRIDS = (4, 8)


def main() -> None:
    """Run every engine and print one table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--gpu", action="store_true", help="one GPU in bf16 instead of two CPU ranks"
    )
    parser.add_argument("--kimg", type=float, default=0.16, help="per stage, in steps of 8 images")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        base = prepare(Path(folder), options)
        rows = [measure(Path(folder), base, *case) for case in cases(options.gpu)]
    reference = rows[0]
    print(
        f"\n{'engine':<12}{'started by':<22}{'ranks':>6}{'steps':>7}{'weights apart':>15}"
        f"{'images/s':>10}{'over single':>13}"
    )
    failed = False
    for row in rows:
        apart = distance(reference["weights"], row["weights"])
        failed |= apart > (1e-3 if not options.gpu else 1)
        print(
            f"{row['engine']:<12}{row['launcher']:<22}{row['ranks']:>6}{row['steps']:>7}{apart:>15.2e}"
            f"{row['images_per_s']:>10.1f}{row['images_per_s'] / reference['images_per_s']:>13.2f}"
        )
    print("\nweights apart: largest difference over largest weight, G and its average, both stages")
    sys.exit(failed)


def cases(gpu: bool) -> list[tuple[str, int | None, str, int]]:
    """(engine, zero, launcher, ranks)."""
    if gpu:
        return [
            ("single", None, "python", 1),
            ("ddp", None, "torchrun", 1),
            ("deepspeed", 0, "torchrun", 1),
            ("deepspeed", 1, "torchrun", 1),
            ("deepspeed", 2, "torchrun", 1),
        ]
    several: list[tuple[str, int | None, str, int]] = [("ddp", None, "torchrun", 2)]
    for launcher in ("torchrun", "deepspeed"):
        several += [("deepspeed", zero, launcher, 2) for zero in (0, 1, 2)]
    return [("single", None, "python", 1), *several]


def prepare(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Images of discs, their pyramids by a small random guide, and the config of the run."""
    big = options.gpu
    size = (
        {"hidden_size": 384, "num_layers": 12, "num_heads": 6}
        if big
        else {"hidden_size": 32, "num_layers": 2, "num_heads": 2}
    )
    make_random_dinov2(folder / "guide", seed=0, **size)
    device = torch.device("cuda" if big else "cpu")
    guide = load_guide(GuideConfig(path=str(folder / "guide")), device)
    rng = np.random.default_rng(0)
    yy, xx = np.mgrid[:32, :32]
    samples = []
    for number in range(40):
        cx, cy, radius = [*rng.uniform(10, 22, 2).tolist(), rng.uniform(4, 10)]
        inside = (xx - cx) ** 2 + (yy - cy) ** 2 < radius**2
        pixels = np.where(inside[..., None], rng.integers(128, 255, 3), rng.integers(0, 100, 3))
        file = io.BytesIO()
        Image.fromarray(pixels.astype(np.uint8)).save(file, "PNG")
        images = torch.from_numpy(pixels).permute(2, 0, 1)[None].float().to(device) / 127.5 - 1
        with torch.no_grad():
            levels = native_pyramid(guide, images, GRIDS)
        arrays = {f"n{grid}": value[0].cpu().half().numpy() for grid, value in levels.items()}
        samples.append(Sample(f"disc{number:03d}", file.getvalue(), "png", {}, arrays))
    pack(samples, folder / "data", shard_size=16, guide=guide.info.to_dict())
    batch = 64 if big else 8
    network = {} if big else {"z_dim": 8, "channel_base": 64, "channel_max": 16, "probe_samples": 8}
    kimg = options.kimg
    return {
        "data": {"path": str(folder / "data"), "num_threads": 1 if big else 0},
        "guide": {"path": str(folder / "guide")},
        "family": {"name": "guided", **network},
        "stages": [
            {"resolution": 4, "kimg": kimg, "batch": batch, "lr": 2e-3},
            {"resolution": 8, "kimg": kimg, "fade_kimg": kimg / 2, "batch": batch, "lr": 2e-3},
        ],
        "checkpoint": {"every_kimg": kimg},
        "log": {"every_kimg": kimg / 4, "probe_kimg": kimg, "samples_kimg": kimg},
    }


def measure(
    folder: Path, base: dict[str, Any], engine: str, zero: int | None, launcher: str, ranks: int
) -> dict[str, Any]:
    """Train once and read what it left."""
    name = engine if zero is None else f"zero {zero}"
    run = folder / f"{name}-{launcher}".replace(" ", "")
    settings = base | {"run": str(run), "engine": {"name": engine, "zero": zero or 0}}
    path = run.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(settings))
    command = [*started_by(launcher, ranks), "launch.cli", "train", str(path)]
    # one thread each: these networks are too small for more
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPO)}
    began = time.monotonic()
    done = subprocess.run(command, cwd=REPO, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stderr[-4000:]}")
    print(f"{name} by {launcher}: {time.monotonic() - began:.0f} s with all imports", flush=True)
    results = [json.loads((run / f"{r}x{r}" / "result.json").read_text()) for r in (4, 8)]
    weights = {}
    for size in (4, 8):
        checkpoint = newest_checkpoint(run / f"{size}x{size}" / "checkpoints")
        assert checkpoint is not None
        for file in ("G", "G.ema"):
            for key, value in checkpoint.tensors(file).items():
                weights[f"{size}/{file}/{key}"] = value
    nimg = results[-1]["nimg"]
    return {
        "engine": name,
        "launcher": launcher,
        "ranks": results[-1]["world_size"],
        "steps": nimg // settings["stages"][0]["batch"],
        "images_per_s": nimg / sum(result["seconds"] for result in results),
        "weights": weights,
    }


def started_by(launcher: str, ranks: int) -> list[str]:
    """The command that a user starts ranks by; MODULE ARGS follow."""
    if launcher == "python":
        return [sys.executable, "-m"]
    if launcher == "torchrun":
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        return [*torchrun, "--nproc-per-node", str(ranks), "-m"]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # what the `deepspeed` command starts on each node
    world = base64.urlsafe_b64encode(json.dumps({"localhost": list(range(ranks))}).encode())
    command = [sys.executable, "-m", "deepspeed.launcher.launch", "--no_local_rank"]
    command += [f"--world_info={world.decode()}", "--master_addr=127.0.0.1"]
    return [*command, f"--master_port={port}", "--module"]


def distance(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """Largest difference of any two weights, over the largest weight."""
    apart = max(float((a[name] - b[name]).abs().max()) for name in a)
    return apart / max(float(value.abs().max()) for value in a.values())


if __name__ == "__main__":
    main()
