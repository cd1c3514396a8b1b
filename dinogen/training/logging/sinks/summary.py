"""What every sink shows of a finished stage: hyperparameters, final values, words."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from dinogen.runs.run import Stage
from dinogen.runs.values import finite

FINAL_VALUES = (
    "loss",
    "loss_over_floor",
    "diversity",
    "best",
    "images_per_s",
    "seconds",
    "peak_memory_mb",
    "num_parameters",
)
_WORDS = ("health", "guide_label", "precision", "device")


def hyperparameters(stage: Stage, result: dict[str, Any]) -> dict[str, str | float]:
    """Hyperparameters by dotted name; those that do not apply are left out."""
    whole = stage.run.config.model_dump(mode="json")
    chosen = {name: whole[name] for name in ("seed", "family", "optim", "ema")}
    chosen |= {
        "augment": {name: value for name, value in whole["augment"].items() if value},
        "stage": stage.config.model_dump(mode="json"),
        "guide": result.get("guide_label"),
        "precision": result.get("precision"),
        "world_size": result.get("world_size"),
    }
    return dict(flat("", chosen))


def flat(name: str, value: Any) -> Iterator[tuple[str, str | float]]:
    """``(dotted name, value)`` of nested mappings; lists and switches as JSON."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from flat(f"{name}.{key}" if name else key, inner)
    elif isinstance(value, (bool, list)):
        yield name, json.dumps(value)
    elif value is not None:
        yield name, value


def final_values(stage: Stage, result: dict[str, Any]) -> dict[str, tuple[float, int]]:
    """Final metric values, each with the images seen when it was measured; the newest counts.

    Evaluations of earlier checkpoints are left out.
    """
    trained = result["nimg"]
    found: dict[str, tuple[Any, int]] = {name: (result.get(name), trained) for name in FINAL_VALUES}
    for line in stage.metrics:
        for name, metric in line["metrics"].items():
            found[name] = metric["value"], line["nimg"]
    evaluation = stage.evaluation or {}
    if evaluation.get("nimg") == trained:
        values = dict(evaluation.get("metrics") or {})
        measured = evaluation.get("measured") or {}
        values |= {name: one["value"] for name, one in measured.items()}
        found |= {name: (value, trained) for name, value in values.items()}
    return {
        name: (value, nimg)
        for name, (given, nimg) in found.items()
        if (value := finite(given)) is not None
    }


def final_words(stage: Stage, result: dict[str, Any]) -> dict[str, str]:
    """Health, stage, guide, precision and device of a finished stage, where they are known."""
    words = {name: result.get(name) for name in _WORDS}
    return {"stage": stage.name} | {name: word for name, word in words.items() if word}
