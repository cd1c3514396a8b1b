"""Numbers of a run: what training cost and what was measured, each with where it comes from."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from dinogen.report.cautions import caution_of
from dinogen.report.compare_columns import MEASURED
from dinogen.report.compare_model import Number, Run, Source, take
from dinogen.report.kinds import finite
from dinogen.report.runfiles import EVALUATION, METRICS, read_evaluation, read_metrics

# figures of kept checkpoints, measured after training
OVER_TRAINING = "checkpoints.jsonl"
PROMPTED = {name for group, names in MEASURED if group == "Prompts" for name, _ in names}


def read_costs(run: Run, results: dict[int, dict[str, Any]]) -> None:
    """Numbers of training: summed over stages where they add up."""
    last = results[max(results)]
    run.facts = last
    run.sources["training"] = Source(
        f"{max(results)}x{max(results)}/result.json",
        f"dinogen train {run.folder / 'config.yaml'}",
        last.get("nimg"),
        last.get("versions") or {},
        last.get("device"),
    )
    parts = list(results.values())
    seconds = [finite(one.get("seconds")) for one in parts]
    hours = [
        (one or 0.0) * (part.get("world_size") or 1) / 3600
        for one, part in zip(seconds, parts, strict=True)
    ]
    memory = [m for part in parts if (m := finite(part.get("peak_memory_mb"))) is not None]
    kind = "cpu_hours" if last.get("device") == "cpu" else "gpu_hours"
    costs: dict[str, float | None] = {
        "num_parameters": finite(last.get("num_parameters")),
        "nimg": finite(last.get("nimg")),
        "seconds": None if None in seconds else sum(one or 0.0 for one in seconds),
        kind: None if None in seconds else sum(hours),
        "peak_memory_mb": max(memory, default=None),
        "training_images_per_s": finite(last.get("images_per_s")),
    }
    for name, value in costs.items():
        run.numbers[name] = Number(name, value, "training")
    verdict = last.get("verdict") or "unknown"
    if verdict != "ok":
        said = " ".join(last.get("warnings") or ())
        run.troubles.append(said if said.startswith(verdict) else f"{verdict}: {said}")
    if last.get("num_skipped"):
        run.troubles.append(f"{last['num_skipped']} damaged samples were replaced")


def read_measured(run: Run, stage: Path) -> None:
    """Figures of `dinogen evaluate`; what it has not, as measured last in training."""
    trained = run.facts.get("nimg")
    in_training = take(run, read_metrics(stage / METRICS))
    run.measured = take(run, read_metrics(stage / OVER_TRAINING)) or in_training
    for line in run.measured:
        run.fingerprints |= line.get("fingerprints") or {}
    if in_training:
        newest = in_training[-1]
        run.sources["in_training"] = Source(
            f"{stage.name}/{METRICS}",
            f"dinogen train {run.folder / 'config.yaml'}",
            newest["nimg"],
            run.facts.get("versions") or {},
            run.facts.get("device"),
        )
        _add_figures(run, newest["metrics"], "in_training")
    evaluation = read_evaluation(stage / EVALUATION)
    found = take(run, evaluation)
    if found is None:
        if run.facts and not evaluation.there:
            run.troubles.append(f"never measured: dinogen evaluate {run.folder}")
        return
    run.sources["evaluation"] = Source(
        f"{stage.name}/evaluation.json",
        found.get("command") or f"dinogen evaluate {run.folder}",
        found.get("nimg"),
        found.get("versions") or {},
        found.get("device"),
    )
    run.fingerprints |= found.get("fingerprints") or {}
    _add_figures(run, found.get("measured") or {}, "evaluation")
    speed = found.get("sampling") or {}
    run.numbers["sampling_images_per_s"] = Number(
        "sampling_images_per_s",
        finite(speed.get("images_per_s")),
        "evaluation",
        better="higher",
        num_samples=speed.get("num"),
    )
    for name, value in (found.get("metrics") or {}).items():
        run.others[name] = Number(
            name, finite(value), "evaluation", num_samples=found.get("num_samples")
        )
    if trained is not None and found.get("nimg") not in (None, trained):
        run.troubles.append(
            f"measured at {found['nimg']:,} images, but trained to {trained:,}: evaluate it again"
        )


def _add_figures(run: Run, figures: dict[str, Any], source: str) -> None:
    """Figures of a mapping by name; one that has a value is not replaced by one without."""
    for name, one in figures.items():
        if one is None:
            continue
        number = Number(
            name=name,
            value=one.get("value"),
            source=_source_of(run, source, one.get("command")),
            better=one.get("better") or "none",
            spread=one.get("spread"),
            num_samples=one.get("num_samples"),
            num_reference=one.get("num_reference"),
            fingerprint=one.get("fingerprint"),
            reason=one.get("reason"),
            caution=_caution(name, one),
        )
        if number.value is not None or name not in run.numbers:
            run.numbers[name] = number


def _caution(name: str, one: dict[str, Any]) -> str | None:
    """What the file says, or for one of an earlier version, what follows from its counts."""
    if one.get("value") is None or "caution" in one:
        return one.get("caution")
    # prompts are counted where others count real images
    num_real = None if name in PROMPTED else one.get("num_reference")
    return caution_of(one.get("num_samples"), num_real)


def _source_of(run: Run, key: str, command: str | None) -> str:
    """The source of a figure: an evaluation keeps what earlier commands have measured."""
    if command is None or command == run.sources[key].command:
        return key
    number = 2
    while (name := f"{key}_{number}") in run.sources and run.sources[name].command != command:
        number += 1
    run.sources[name] = replace(run.sources[key], command=command)
    return name
