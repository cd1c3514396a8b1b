"""Measures a checkpoint's moving averages, alike on any number of ranks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from dinogen import dist
from dinogen.config import MetricsConfig
from dinogen.families.base import Family
from dinogen.metrics.judged import Judges
from dinogen.metrics.names import GUIDE_DIVERSITY
from dinogen.metrics.sources import Generated
from dinogen.metrics.suite import Measurement, measure
from dinogen.takedown import takedown
from dinogen.training.checkpoint import stage_folder
from dinogen.training.data import data_fingerprint, open_data
from dinogen.training.evaluation import RESULT as RESULT
from dinogen.training.evaluation import write_result
from dinogen.training.heldout import chosen_samples, held_out_means
from dinogen.training.measure import guide_diversity, real_pictures, reference_at, subject_of
from dinogen.training.preflight import check_same_data
from dinogen.training.snapshot import Snapshot, load_snapshot, run_config
from dinogen.training.state import versions
from dinogen.training.tensorboard import write_summary
from dinogen.training.wish import Wish
from shards.dataset import Dataset


def evaluate(
    run: Path,
    resolution: int | None = None,
    split: str | None = None,
    num_samples: int | None = None,
    *,
    nimg: int | None = None,
    names: Sequence[str] = (),
    reference: str | None = None,
    changes: Sequence[str] = (),
) -> dict[str, Any]:
    """Measure a checkpoint and write ``RUN/RxR/evaluation.json``.

    Each sample counts exactly once on any number of ranks. A damaged held-out one is left out, if
    ``data.on_error`` is ``skip``, and counted as such. What was measured before of the same
    checkpoint and is not measured now is kept.

    Args:
        run: folder of the run.
        resolution: which stage; the largest that has a checkpoint unless given.
        split: see :class:`Wish`, as for the others.
        num_samples: likewise.
        nimg: which checkpoint, by its images; the newest unless given.
        names: likewise.
        reference: likewise.
        changes: likewise.

    Returns:
        The result as written. ``metrics`` holds the figures by ``SOURCE/NAME``, null where one is
        not finite: ``held_out/*`` are means over the samples, ``probe/*`` what the family's probe
        found. ``measured`` holds those of generated pictures by name, as ``Figure.to_dict`` has
        them and with the command, and ``fingerprints`` what each was measured against.

    Raises:
        ConfigError: no such run, checkpoint, metric or samples, or other data than it was trained
            on.
        CorruptSample: a sample is damaged, and ``data.on_error`` is ``stop``.
    """
    wish = Wish(tuple(names), num_samples, split, reference, tuple(changes))
    run_config(run)
    dist.init()
    dist.set_cpu_threads()
    with takedown():
        snapshot = load_snapshot(run, resolution, nimg)
        config = snapshot.family.config
        settings = wish.settings(config.metrics)
        data = open_data(config)
        check_same_data(snapshot.checkpoint, config, data_fingerprint(data))
        numbers = _held_out_numbers(snapshot.family, data, wish)
        snapshot.family.begin(data)
        result = _of_run(snapshot, data, wish.split or "val", numbers)
        found, sampling = _measure(snapshot, data, settings, wish, result["metrics"])
        size = str(snapshot.resolution)
        words = [str(run), "--stage", size, "--nimg", str(snapshot.nimg), *wish.words()]
        folder = stage_folder(config, snapshot.family.stage)
        written = write_result(folder, result, found, sampling, words)
        with dist.main_section() as mine:
            if mine:
                write_summary(folder, config, snapshot.family.stage)
        return written


def _held_out_numbers(family: Family, data: Dataset, wish: Wish) -> list[int]:
    """Samples for the family's own figures; it may do without where it has none, or where
    pictures are compared with other data.

    Raises:
        ConfigError: there are none.
    """
    split = wish.split or "val"
    own = type(family).held_out is not Family.held_out
    if not own or (wish.reference is not None and not data.num_samples(split)):
        return []
    return chosen_samples(data, split, wish.num_samples, "--split")


def _of_run(snapshot: Snapshot, data: Dataset, split: str, numbers: list[int]) -> dict[str, Any]:
    """What held-out samples and the family's probe say; the same on every rank."""
    family = snapshot.family
    means: dict[str, float] = {}
    num_sound = 0
    if numbers:
        means, num_sound = held_out_means(family, snapshot.ema.networks, data, split, numbers)
    result = None
    with dist.main_section() as mine:
        if mine:
            result = _result(snapshot, split, means) | {
                "num_samples": num_sound,
                "num_skipped": len(numbers) - num_sound,
            }
    found: dict[str, Any] = dist.broadcast_object(result)
    return found


def _measure(
    snapshot: Snapshot,
    data: Dataset,
    settings: MetricsConfig,
    wish: Wish,
    probed: Mapping[str, float | None],
) -> tuple[Measurement, dict[str, Any] | None]:
    """Measure samples of the averages; and how fast they were made, if they were."""
    family, resolution = snapshot.family, snapshot.resolution
    train = real_pictures(data, family.config.data.split, None, resolution, "data.split")
    if wish.reference is None:
        split, num = settings.reference_split, settings.num_reference
        real = real_pictures(data, split, num, resolution, "metrics.reference_split")
    else:
        real, _ = reference_at(wish.reference, settings, resolution)
    facts = snapshot.checkpoint.state["facts"]
    networks, num = snapshot.ema.networks, settings.num_samples
    subject = subject_of(family, networks, num, real, train, settings, facts)
    asked = [name for name in settings.names if name != GUIDE_DIVERSITY]
    judges = Judges(settings, family.device)
    found = measure(asked, judges, subject, settings.num_bootstrap, settings.cache)
    if GUIDE_DIVERSITY in settings.names:
        scalars = {name.removeprefix("probe/"): value for name, value in probed.items()}
        found.add(guide_diversity(family, scalars), None)
    if not found.made:
        return found, None
    assert isinstance(subject.generated, Generated)
    speed = float(dist.all_reduce_sum(torch.tensor(subject.generated.images_per_s)))
    return found, {"images_per_s": speed, "num": settings.num_samples}


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
