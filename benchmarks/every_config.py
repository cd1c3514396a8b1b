"""Starts every run of configs/ by its own command for a few steps; images/s of each.

    python benchmarks/every_config.py --faces data/faces --cats data/cats --classes data/both

The faces have to be packed with all levels of some guide and of the pixels, and with embeddings of
some CLIP; guided configs are started with these in place of their own.

Batch, length and the number of images drawn are cut, so that they fit a CPU: a single image a
step from 128x128 on. Networks are as wide as the YAML says, which takes hours for all of them, or
with --narrow at most 32 channels wide where the family has such an option; a line says which. The
metric values compare what a step costs, not how fast a GPU is.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from dinogen.config import Config, load_config
from shards import open_dataset

CONFIGS = Path(__file__).parents[1] / "configs"
NARROW = {  # the option that makes a family's networks narrow
    "ddpm": "base_channels",
    "guided": "channel_max",
    "progressive_gan": "channel_max",
    "stylegan2_ada": "channel_max",
}


def main() -> None:
    """Train each and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--faces", type=Path, required=True, help="packed faces, as above")
    parser.add_argument("--cats", type=Path, required=True, help="packed cats")
    parser.add_argument("--classes", type=Path, required=True, help="packed images of 2 classes")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--narrow", action="store_true", help="at most 32 channels")
    parser.add_argument("--only", default="", help="configs whose path holds this")
    options = parser.parse_args()
    failed = []
    for path in sorted(CONFIGS.rglob("*.yaml")):
        name = str(path.relative_to(CONFIGS))
        if "\nstages:" not in path.read_text(encoding="utf-8") or options.only not in name:
            continue
        with tempfile.TemporaryDirectory() as folder:
            run = Path(folder) / "run"
            config = load_config(path)
            overrides = cut(config, options, run)
            width = "narrow" if options.narrow and config.family.name in NARROW else ""
            command = [sys.executable, "-m", "launch.cli", "train", str(path), *overrides]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                failed.append(name)
                print(f"{name:32} FAILED\n{done.stderr[-2000:]}", flush=True)
                continue
            results = [json.loads(p.read_text()) for p in run.glob("*x*/result.json")]
        for result in sorted(results, key=lambda item: item["resolution"]):
            size = f"{result['resolution']}x{result['resolution']}"
            speed, count = result["images_per_s"], result["num_parameters"]
            print(f"{name:32} {size:8} {speed:9.2f} images/s {count:12,} in G {width}", flush=True)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


def cut(config: Config, options: argparse.Namespace, run: Path) -> list[str]:
    """Overrides that make a few steps of a config's run."""
    labelled = config.family.options.get("num_classes")
    cats = "cats" in config.data.path
    data = options.classes if labelled else options.cats if cats else options.faces
    large = config.stages[-1].resolution >= 128
    batch = 1 if large else options.batch
    kimg = options.steps * batch / 1000
    found = [
        f"run={run}",
        "data.mix=[]",
        f"data.path={data}",
        "engine.precision=auto",
        "log.num_samples=4",
        "eval.every_epochs=null",
        "eval.patience=null",
    ]
    for number in range(len(config.stages)):
        found += [f"stages.{number}.kimg={kimg}", f"stages.{number}.batch={batch}"]
        found += [f"stages.{number}.fade_kimg={kimg / 2 if number else 0}"]
    if config.family.name == "guided":
        manifest = open_dataset(options.faces).manifest
        own = manifest.guide
        found += [f"guide.{key}={json.dumps(own[key])}" for key in ("name", "path", "layer")]
        found += ["family.probe_samples=4"]
        if config.clip:
            found += [f"clip.path={manifest.clip['path']}"]
            found += [f"family.text.embed_dim={manifest.clip['embed_dim']}"]
    if config.family.name == "ddpm":
        found += ["family.sample_steps=2"]
        found += ["family.head_channels=32"] if options.narrow else []
    if options.narrow and config.family.name in NARROW:
        found += [f"family.{NARROW[config.family.name]}=32"]
    if config.family.options.get("lambda_perceptual"):
        found += ["family.perceptual_weights=random"]
    return found


if __name__ == "__main__":
    main()
