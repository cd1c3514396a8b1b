"""Measures a checkpoint's moving average on held-out samples, alike on any number of ranks."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch

from dinogen import dist
from dinogen.files import write_json
from dinogen.takedown import takedown
from dinogen.training.checkpoint import stage_folder
from dinogen.training.data import data_fingerprint, open_data
from dinogen.training.heldout import chosen_samples, held_out_means
from dinogen.training.preflight import check_same_data
from dinogen.training.snapshot import Snapshot, load_snapshot, run_config
from dinogen.training.state import versions

RESULT = "evaluation.json"


def evaluate(
    run: Path, resolution: int | None = None, split: str = "val", num_samples: int | None = None
) -> dict[str, Any]:
    """Measure a stage's newest checkpoint and write ``RUN/RxR/evaluation.json``.

    Each sample counts exactly once: every rank takes a range of them, and sums and counts are added
    at the end. A damaged one is left out, if ``data.on_error`` is ``skip``, and counted as such.

    Args:
        run: folder of the run.
        resolution: which stage; the largest that has a checkpoint unless given.
        split: of the data that the run was trained on.
        num_samples: as many, spread over the split; all unless given.

    Returns:
        The result as written. ``metrics`` holds the figures by ``SOURCE/NAME``, null where one is
        not finite: ``held_out/*`` are means over the samples, ``probe/*`` what the family's probe
        found.

    Raises:
        ConfigError: no such run, checkpoint or samples, or other data than it was trained on.
        CorruptSample: a sample is damaged, and ``data.on_error`` is ``stop``.
    """
    run_config(run)
    dist.init()
    dist.set_cpu_threads()
    with takedown():
        snapshot = load_snapshot(run, resolution)
        config = snapshot.family.config
        data = open_data(config)
        check_same_data(snapshot.checkpoint, config, data_fingerprint(data))
        numbers = chosen_samples(data, split, num_samples, "--split")
        snapshot.family.begin(data)
        means, num_sound = held_out_means(
            snapshot.family, snapshot.ema.networks, data, split, numbers
        )
        result = None
        with dist.main_section() as mine:
            if mine:
                result = _result(snapshot, split, means) | {
                    "num_samples": num_sound,
                    "num_skipped": len(numbers) - num_sound,
                }
                write_json(stage_folder(config, snapshot.family.stage) / RESULT, result)
        written: dict[str, Any] = dist.broadcast_object(result)
        return written


@torch.no_grad()
def _result(snapshot: Snapshot, split: str, means: dict[str, float]) -> dict[str, Any]:
    """What evaluation.json says; the probe is the one of training, so that figures compare."""
    family = snapshot.family
    progress = snapshot.checkpoint.state["progress"]
    verdict = family.probe(snapshot.ema.networks, progress["loss"])
    figures = {f"held_out/{name}": mean for name, mean in means.items()}
    figures |= {f"probe/{name}": value for name, value in verdict.scalars.items()}
    facts = family.describe()
    return {
        "stage": snapshot.resolution,
        "resolution": snapshot.resolution,
        "family": family.config.family.name,
        "nimg": snapshot.nimg,
        "split": split,
        "metrics": {k: v if math.isfinite(v) else None for k, v in figures.items()},
        # the manifest knows the variance of train alone
        "floor": family.constants().get("floor") if split == "train" else None,
        "verdict": verdict.verdict,
        "warnings": list(verdict.warnings),
        **facts,
        "world_size": dist.world_size(),
        "device": str(family.device),
        "versions": versions(),
    }
