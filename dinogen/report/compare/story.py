"""The story of each family, row by row, in the words of the configs' notes."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from dinogen.report.compare.columns import Column
from dinogen.report.compare.model import Run


@dataclass(frozen=True)
class Row:
    """One step of a family.

    Attributes:
        run: name of the run.
        step: its place, in the words of the notes; empty where they say nothing.
        change: what it does otherwise.
        metric: value and spread of the headline figure as text, a dash where there is none.
        best: whether no other step of the family is better.
        failed: what did not work.
        said: whether ``failed`` is from the notes, and not from the files of the run.
        next: what to try.
    """

    run: str
    step: str
    change: str
    metric: str
    best: bool
    failed: str
    said: bool
    next: str


@dataclass(frozen=True)
class Chapter:
    """One family: its steps in order."""

    family: str
    rows: tuple[Row, ...]


def tell(runs: Sequence[Run], by: Column | None) -> list[Chapter]:
    """A chapter for each family, in the order in which they come; steps sorted as people count."""
    families: dict[str, list[Run]] = {}
    for run in runs:
        families.setdefault(run.family, []).append(run)
    return [
        Chapter(family, tuple(_row(run, some, by) for run in sorted(some, key=_place)))
        for family, some in families.items()
    ]


def _row(run: Run, family: Sequence[Run], by: Column | None) -> Row:
    number = run.numbers.get(by.name) if by else None
    metric, best = "–", False
    if by is not None and number is not None and number.value is not None:
        metric = by.text(number.value)
        if number.spread is not None:
            metric += f" ± {by.text(number.spread)}"
        values = [
            one.value
            for other in family
            if (one := other.numbers.get(by.name)) is not None and one.value is not None
        ]
        top = min(values) if by.better == "lower" else max(values)
        best = by.comparable and len(values) > 1 and number.value == top
    said = "failed" in run.notes
    troubles = "" if run.finished and not run.troubles else "; ".join(run.troubles)
    return Row(
        run=run.name,
        step=run.notes.get("step", ""),
        change=run.notes.get("change", ""),
        metric=metric,
        best=best,
        failed=run.notes.get("failed", troubles),
        said=said,
        next=run.notes.get("next", ""),
    )


def _place(run: Run) -> tuple[bool, list[tuple[int, int, str]]]:
    """Steps as people count them: 2 before 10, those without one last."""
    step = run.notes.get("step", "")
    parts = re.findall(r"\d+|\D+", step.lower())
    return not step, [
        (0, int(part), "") if part.isdecimal() else (1, 0, part.strip()) for part in parts
    ]
