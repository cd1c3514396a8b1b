"""Folders of runs as trainer, evaluate and look leave them, with numbers that are known."""

import json

import numpy as np
import yaml

from dinogen.report.images import save_grid

ALIKE = {
    "data": "d" * 64,
    "split": "val",
    "num_reference": 158,
    "num_samples": 500,
    "resolution": 32,
    "resize": "area 32, then bilinear antialias 299",
    "judge": "inception768",
    "weights_sha256": "e" * 64,
    "random": False,
}
VERSIONS = {"dinogen": "0.1.0", "torch": "2.13.0", "python": "3.11.7"}


def metric_value(value, spread=None, better="lower", **changes):
    """A metric value as `dinogen evaluate` writes it."""
    return {
        "value": value,
        "spread": spread,
        "better": better,
        "num_samples": 500,
        "num_reference": 158,
        "fingerprint": "aaaaaaaaaaaa",
        "reason": None,
    } | changes


def make_run(folder, fid=1.25, *, family="dcgan", seed=0, resolution=32, notes=None, **changes):
    """A finished run as trainer, evaluate and look leave it; ``changes`` are of evaluation.json."""
    name = f"{resolution}x{resolution}"
    stage = folder / name
    rng = np.random.default_rng(seed)
    for file in (f"final_{name}.png", f"real_{name}.png", "looks/grid16.png", "looks/i.png"):
        save_grid(rng.integers(0, 256, (4, 8, 8, 3), dtype=np.uint8), stage / file)
    config = {
        "run": str(folder),
        "seed": seed,
        "data": {"path": "data/faces"},
        "family": {"name": family},
        "stages": [{"resolution": resolution, "kimg": 20}],
        "notes": notes or {},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    write(
        stage / "result.json",
        {
            "resolution": resolution,
            "family": family,
            "status": "finished",
            "nimg": 20016,
            "health": "ok",
            "warnings": [],
            "images_per_s": 31.5,
            "seconds": 3725.0,
            "world_size": 2,
            "peak_memory_mb": 812.5,
            "num_parameters": 370_624,
            "device": "Card 9000",
            "precision": "fp16",
            "versions": VERSIONS,
            "files": {"final": f"final_{name}.png", "real": f"real_{name}.png"},
        },
    )
    write(
        stage / "evaluation.json",
        {
            "nimg": 20016,
            "metrics": {"held_out/mse": 0.0625},
            "num_samples": 77,
            "measured": {"fid768": metric_value(fid, 0.015625)},
            "fingerprints": {"aaaaaaaaaaaa": ALIKE},
            "sampling": {"images_per_s": 1234.5, "num": 500},
            "command": f"dinogen evaluate {folder} --metrics fid768",
            "device": "Card 9000",
            "versions": VERSIONS,
        }
        | changes,
    )
    facts = {"nimg": 20016, "seed": 0, "command": f"dinogen look {folder}"}
    write(
        stage / "looks" / "looks.json",
        {
            "grid16": {"file": "grid16.png", "caption": "The first 16 samples."} | facts,
            "interpolation_linear": {"file": "i.png", "caption": "A straight line."} | facts,
            "psi": {"file": None, "caption": None, "reason": "it does not truncate"} | facts,
        },
    )
    (stage / "stats.jsonl").write_text(
        "".join(json.dumps({"nimg": 1000 * n, "loss": 4.0 / n}) + "\n" for n in range(1, 21))
    )
    write(stage / "checkpoints" / "000020016" / "state.json", {"data": "f" * 64})
    return folder


def write(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))
