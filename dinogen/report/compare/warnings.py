"""Warnings above a comparison: metric values that do not compare, random extractors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dinogen.report.compare.columns import Column
from dinogen.report.compare.model import ComparedRun
from dinogen.report.compare.table import values_of

# that many runs are named; of more only the number
MAX_NAMES = 4
DIGITS = 12


def warnings_of(runs: Sequence[ComparedRun], columns: Sequence[Column]) -> list[str]:
    """One sentence for each thing that would mislead a reader of the table."""
    return [
        *_differing(runs, columns),
        *_random(runs),
        *_different_data(runs),
        *_different_seeds(runs),
    ]


def _differing(runs: Sequence[ComparedRun], columns: Sequence[Column]) -> list[str]:
    """Columns that were measured differently; those that differ alike in one sentence."""
    found: dict[str, list[Column]] = {}
    for column in columns:
        if not column.comparable:
            found.setdefault(_why(runs, column), []).append(column)
    sentences = []
    for why, some in found.items():
        names = ", ".join(column.full_label for column in some)
        sentences.append(f"{names}: measured in different ways, so none is marked as best. {why}")
    return sentences


def _why(runs: Sequence[ComparedRun], column: Column) -> str:
    """In what the metric values of a column differ, and whose is which."""
    numbers = values_of(runs, column.name)
    by_name = {run.name: run for run in runs}
    facts: dict[str, dict[str, Any]] = {}
    for name, number in numbers.items():
        run = by_name[name]
        if column.group == "Cost":
            source = run.sources.get(number.source)
            facts[name] = {"device": source.device if source else None}
            continue
        known = run.fingerprints.get(number.fingerprint or "", {})
        facts[name] = {
            "num_samples": number.num_samples,
            "num_reference": number.num_reference,
            **known,
        }
        if not known:
            facts[name]["fingerprint"] = number.fingerprint
    keys = list(dict.fromkeys(key for one in facts.values() for key in one))
    parts = []
    for key in keys:
        groups: dict[str, list[str]] = {}
        for name, one in facts.items():
            groups.setdefault(_short(one.get(key, "unknown")), []).append(name)
        if len(groups) > 1:
            said = "; ".join(f"{value} ({_names(some)})" for value, some in groups.items())
            parts.append(f"{key}: {said}.")
    return " ".join(parts)


def _random(runs: Sequence[ComparedRun]) -> list[str]:
    """Extractors and guides with random weights: their values say nothing about quality."""
    sentences = []
    extractors = {
        str(facts.get("judge"))
        for run in runs
        for facts in run.fingerprints.values()
        if facts.get("random")
    }
    if extractors:
        sentences.append(
            f"RANDOM EXTRACTOR: {', '.join(sorted(extractors))} has random weights, so its values "
            "say nothing about quality."
        )
    guided = [run.name for run in runs if run.facts.get("random_guide")]
    if guided:
        sentences.append(f"RANDOM GUIDE: {_names(guided)} learnt from random weights.")
    return sentences


def _different_data(runs: Sequence[ComparedRun]) -> list[str]:
    groups: dict[str, list[str]] = {}
    for run in runs:
        if run.data_sha256:
            groups.setdefault(run.data_sha256, []).append(run.name)
    if len(groups) < 2:
        return []
    said = "; ".join(f"{_short(value)} ({_names(some)})" for value, some in groups.items())
    return [f"Trained on different data: {said}."]


def _different_seeds(runs: Sequence[ComparedRun]) -> list[str]:
    """Grids are shown as drawn under the same seed, so they have to be."""
    groups: dict[int, list[str]] = {}
    for run in runs:
        for look in run.looks:
            if look.section == "samples" and look.path and look.seed is not None:
                groups.setdefault(look.seed, []).append(run.name)
                break
    if len(groups) < 2:
        return []
    said = "; ".join(f"seed {seed} ({_names(some)})" for seed, some in groups.items())
    return [f"Grids were drawn under different seeds: {said}."]


def _names(names: Sequence[str]) -> str:
    return ", ".join(names) if len(names) <= MAX_NAMES else f"{len(names)} runs"


def _short(value: object) -> str:
    """A value for people: of a hash its first digits."""
    text = str(value)
    return text[:DIGITS] if len(text) == 64 and " " not in text else text
