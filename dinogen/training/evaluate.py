"""Measures a checkpoint's moving average on held-out samples, alike on any number of ranks."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from dinogen import dist
from dinogen.config import ConfigError
from dinogen.families.base import Batch
from dinogen.files import write_json
from dinogen.takedown import takedown
from dinogen.training.batches import split as to_device
from dinogen.training.checkpoint import stage_folder
from dinogen.training.data import data_fingerprint, open_data
from dinogen.training.preflight import check_same_data
from dinogen.training.snapshot import Snapshot, load_snapshot
from dinogen.training.state import versions
from shards.dataset import Dataset
from shards.errors import CorruptSample
from shards.manifest import SPLITS

log = logging.getLogger(__name__)

BATCH = 32
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
    dist.init()
    dist.set_cpu_threads()
    with takedown():
        snapshot = load_snapshot(run, resolution)
        config = snapshot.family.config
        data = open_data(config)
        check_same_data(snapshot.checkpoint, config, data_fingerprint(data))
        numbers = _chosen(data, split, num_samples)
        snapshot.family.begin(data)
        means, num_sound = _held_out(snapshot, data, split, numbers)
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


def _chosen(data: Dataset, split: str, num: int | None) -> list[int]:
    """Numbers of the samples to measure.

    Raises:
        ConfigError: there is no such split, or it has none.
    """
    if split not in SPLITS:
        raise ConfigError(f"--split {split}: splits are {', '.join(SPLITS)}")
    available = data.num_samples(split)
    if not available:
        have = ", ".join(f"{info.num_samples} in {s}" for s, info in data.manifest.splits.items())
        raise ConfigError(
            f"{data.location} has no samples in split {split} (but {have}): prepare anew with "
            f"prepare.pack.{split}_fraction=0.05 and train on that, for what was learnt is not "
            "held out; or measure on what was learnt: --split train"
        )
    chosen = np.linspace(0, available - 1, min(num or available, available)).astype(int)
    return [int(number) for number in chosen]


@torch.no_grad()
def _held_out(
    snapshot: Snapshot, data: Dataset, split: str, numbers: list[int]
) -> tuple[dict[str, float], int]:
    """Means over all ranks' samples, and how many were sound. No collective but at the end."""
    family, networks = snapshot.family, snapshot.ema.networks
    mine = np.array_split(numbers, dist.world_size())[dist.rank()].tolist()
    sums: dict[str, float] = {}
    count = 0
    for batch in _batches(snapshot, data, split, mine):
        size = len(batch["key"])
        for name, value in family.held_out(networks, batch).items():
            sums[name] = sums.get(name, 0.0) + float(value) * size
        count += size
    if not count:
        # nothing fell to this rank, but it has to know which sums the others will add
        batch = _read(snapshot, data, split, numbers[:1], "skip")
        sums = dict.fromkeys(family.held_out(networks, batch), 0.0)
    names = sorted(sums)
    local = torch.tensor([*(sums[name] for name in names), count], dtype=torch.float64)
    *totals, num = dist.all_reduce_sum(local).tolist()
    if not num:
        raise ConfigError(
            f"{data.location}: all {len(numbers)} samples asked for of split {split} are damaged: "
            "run `dinogen shards verify` for the whole list"
        )
    return {name: total / num for name, total in zip(names, totals, strict=True)}, int(num)


def _batches(
    snapshot: Snapshot, data: Dataset, split: str, numbers: list[int]
) -> Iterator[dict[str, Any]]:
    """The samples in parts; damaged ones are left out, if the run passes over them too."""
    for first in range(0, len(numbers), BATCH):
        part = numbers[first : first + BATCH]
        try:
            yield _read(snapshot, data, split, part)
        except CorruptSample:
            if snapshot.family.config.data.on_error == "stop":
                raise
            sound = [n for n in part if _is_sound(snapshot, data, split, n)]
            if sound:
                yield _read(snapshot, data, split, sound)


def _is_sound(snapshot: Snapshot, data: Dataset, split: str, number: int) -> bool:
    try:
        _read(snapshot, data, split, [number])
    except CorruptSample as error:
        log.warning("left out: %s", error)
        return False
    return True


def _read(
    snapshot: Snapshot,
    data: Dataset,
    split: str,
    numbers: list[int],
    on_error: Literal["stop", "skip"] = "stop",
) -> Batch:
    """What the family reads of some samples, on the device."""
    inputs = snapshot.family.inputs
    batch = data.read(
        numbers,
        split=split,
        image_size=inputs.image_size,
        levels=inputs.levels,
        on_error=on_error,
    )
    ((micro, _),) = to_device(batch, 1, snapshot.family.device)
    return micro


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
