"""How many files a reader of the code passes: for a photo, a batch, a metric, a resumed step.

    python benchmarks/walks.py [ROOT ...]

For each ROOT (a checkout; this one by default) it runs four small jobs in processes of their own
and counts the product files in which any function ran, class and module bodies apart. It also
counts what should happen once: opening the data and reading a checkpoint. Compare two commits by
giving both checkouts; nothing is timed.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
from PIL import Image

HERE = Path(__file__).resolve().parents[1]
PACKAGES = ("launch", "dinogen", "shards")
ONCE = ("open_dataset", "load_checkpoint", "newest_checkpoint")
CONFIG = """
run: {run}
data: {{path: {data}, num_threads: 0}}
family: {{name: dcgan, ngf: 4, ndf: 4, z_dim: 8}}
prepare:
  faces: {{detect: none, size: 32, num_threads: 1}}
  pyramids: {{make: never}}
  pack: {{val_fraction: 0.25}}
stages: [{{resolution: 16, kimg: 0.008, batch: 4, lr: 1.0e-3}}]
log: {{every_kimg: 0.004, samples_kimg: 1, num_samples: 4}}
checkpoint: {{every_kimg: 1}}
metrics: {{num_samples: 8, cache: {cache}}}
"""


def main() -> None:
    """Print one table for all checkouts."""
    roots = [Path(word).resolve() for word in sys.argv[1:]] or [HERE]
    print("| checkout | job | files | calls of what should be once |\n|---|---|---|---|")
    for root in roots:
        for job, found in walks(root).items():
            calls = ", ".join(f"{name} {count}" for name, count in found["once"].items())
            print(f"| {root} | {job} | {len(found['files'])} | {calls} |")
            if os.environ.get("WALKS_NAMES"):
                print("\n".join(f"    {name}" for name in found["files"]), file=sys.stderr)


def walks(root: Path) -> dict[str, dict[str, Any]]:
    """By job, the files passed and the calls counted."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        photos = folder / "photos"
        photos.mkdir()
        rng = np.random.default_rng(0)
        for number in range(16):
            pixels = rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(photos / f"{number:02d}.png")
        data, run = folder / "data", folder / "run"
        config = folder / "my.yaml"
        config.write_text(CONFIG.format(run=run, data=data, cache=folder / "cache"))
        found = {}
        found["a photo"] = _child(root, "cli", "prepare", photos, data, "-c", config)
        found["a batch"] = _child(root, "batch", data)
        _child(root, "cli", "train", config)
        found["a resumed step"] = _child(root, "cli", "train", config, "stages.0.kimg=0.012")
        metric = ("cli", "evaluate", run, "--metrics", "spectrum")
        found["a metric, real images read"] = _child(root, *metric)
        found["a metric, real images known"] = _child(root, *metric)
        return found


def _child(root: Path, *words: object) -> dict[str, Any]:
    environment = os.environ | {
        "PYTHONPATH": str(root), "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1",
    }  # fmt: skip
    command = [sys.executable, __file__, "--child", str(root), *map(str, words)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)}: {done.stdout}{done.stderr}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def _in_child(root: str, kind: str, *words: str) -> None:
    parts = tuple(f"{root}/{package}/" for package in PACKAGES)
    files: set[str] = set()
    once: Counter[str] = Counter()

    def note(frame: FrameType, event: str, _: object) -> None:
        code = frame.f_code
        # A module's or a class's body runs when it is imported, with the comprehensions in it, and
        # those in a function are passed with it. All groups of commands enter themselves into the
        # command line, whichever is given.
        if code.co_name in ("<genexpr>", "<listcomp>", "<setcomp>", "<dictcomp>"):
            return
        if event != "call" or not code.co_flags & 0x2 or not code.co_filename.startswith(parts):
            return
        if code.co_name == "register" and "/launch/cli/" in code.co_filename:
            return
        files.add(code.co_filename.removeprefix(f"{root}/"))
        if code.co_name in ONCE:
            once[code.co_name] += 1

    threading.setprofile(note)
    sys.setprofile(note)
    try:
        if kind == "batch":
            from shards import open_dataset

            stream = open_dataset(words[0]).stream(batch_size=4, image_size=16, num_threads=0)
            next(stream)
        else:
            sys.argv = ["dinogen", *words]
            if Path(root, "launch/cli.py").exists():
                from launch.cli import main as run_command
            else:
                from launch.cli.main import main as run_command
            run_command()
    except SystemExit as left:
        if left.code:
            raise
    finally:
        sys.setprofile(None)
        threading.setprofile(None)  # type: ignore[arg-type]
    print(json.dumps({"files": sorted(files), "once": once}))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        _in_child(*sys.argv[2:])
    else:
        main()
