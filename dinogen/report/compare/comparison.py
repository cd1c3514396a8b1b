"""Many runs side by side: what page, JSON and Markdown of a comparison have in common."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from typing import Any

from dinogen.report.compare.columns import Column, label_of
from dinogen.report.compare.model import ComparedRun
from dinogen.report.compare.table import (
    Chapter,
    Seeds,
    main_metric,
    make_columns,
    number_rows,
    over_seeds,
    sort_runs,
    tell,
    unavailable,
)
from dinogen.report.compare.warnings import warnings_of


class Comparison:
    """Some runs side by side: what page, JSON and Markdown have in common.

    Args:
        runs: as they were read.
        title: heading.
    """

    def __init__(self, runs: Sequence[ComparedRun], title: str) -> None:
        self.title = title
        self.version = version("dinogen")
        begun = [run for run in runs if run.numbers]
        self.columns: list[Column] = make_columns(begun)
        self.main_metric = main_metric(self.columns, begun)
        self.runs = sort_runs(begun, self.main_metric)
        self.failed = [run for run in runs if not run.finished]
        self.with_problem = [run for run in runs if run.finished and run.problems]
        self.damaged = [run for run in runs if run.damage]
        self.warnings = [*_damaged(self.damaged, runs), *warnings_of(begun, self.columns)]
        self.unavailable = unavailable(begun, label_of)
        self.seeds: list[Seeds] = over_seeds(begun, self.columns)
        self.story: list[Chapter] = tell(runs, self.main_metric)
        self.all_runs = [*self.runs, *(run for run in runs if not run.numbers)]

    @property
    def fingerprints(self) -> dict[str, dict[str, Any]]:
        """All ids of the table with what they stand for, as far as the runs say it."""
        found: dict[str, dict[str, Any]] = {}
        for run in self.runs:
            for number in run.numbers.values():
                if number.fingerprint:
                    found.setdefault(number.fingerprint, {})
                    found[number.fingerprint] |= run.fingerprints.get(number.fingerprint, {})
        return found

    @property
    def order(self) -> str:
        """By what the rows are sorted, in words."""
        if self.main_metric is None or not self.main_metric.comparable:
            return "in the order given"
        return f"sorted by {self.main_metric.full_label}, best first"

    def to_dict(self) -> dict[str, Any]:
        """All of it, JSON-ready."""
        return {
            "title": self.title,
            "dinogen": self.version,
            "order": self.order,
            "headline": self.main_metric.name if self.main_metric else None,
            "warnings": self.warnings,
            "columns": [asdict(column) for column in self.columns],
            "runs": [_run_dict(run) for run in self.all_runs],
            "not_available": [
                {"metrics": metrics, "reason": reason, "runs": runs}
                for metrics, reason, runs in self.unavailable
            ],
            "seeds": [asdict(one) for one in self.seeds],
            "story": [asdict(chapter) for chapter in self.story],
            "failures": {
                run.name: {"status": run.status, "what": run.problems}
                for run in (*self.failed, *self.with_problem)
            },
            "damaged": {run.name: run.damage for run in self.damaged},
            "fingerprints": self.fingerprints,
        }


def _damaged(damaged: Sequence[ComparedRun], runs: Sequence[ComparedRun]) -> list[str]:
    """One sentence above everything, if files are damaged."""
    if not damaged:
        return []
    names = ", ".join(run.name for run in damaged)
    return [
        f"DAMAGED FILES in {len(damaged)} of {len(runs)} runs: {names}. What is wrong with each "
        "stands under Failures; what is sound is compared."
    ]


def _run_dict(run: ComparedRun) -> dict[str, Any]:
    return {
        "name": run.name,
        "folder": str(run.folder),
        "family": run.family,
        "status": run.status,
        "seed": run.seed,
        "resolution": run.resolution,
        "data": run.data,
        "data_sha256": run.data_sha256,
        "config_sha256": run.config_sha256,
        "notes": run.notes,
        "troubles": run.problems,
        "numbers": {row.pop("name"): row for row in number_rows(run)},
        "curves": {
            "measured": run.measured,
            "loss": {"kimg": run.loss[0], "values": run.loss[1]},
        },
        "looks": [
            {
                "name": look.name,
                "file": str(look.path) if look.path else None,
                "caption": look.caption,
                "nimg": look.nimg,
                "seed": look.seed,
                "command": look.command,
                "reason": look.reason,
            }
            for look in run.looks
        ],
    }
