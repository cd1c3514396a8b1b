"""A comparison as one HTML page that needs no other file: table, curves, images."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from dinogen.report.compare.comparison import Comparison
from dinogen.report.compare.model import ComparedRun, Visualization
from dinogen.report.compare.plots import NUM_COLOURS, colours, loss_plots, metric_plots
from dinogen.report.compare.table import (
    Column,
    all_digits,
    caution_words,
    label_of,
    number_rows,
    show_counts,
)

TEMPLATE = Path(__file__).with_name("page.html")
ID_DIGITS = 6
# Losses and sections of images of more runs than this are folded, all but the samples.
MOST_SHOWN = 12
SECTIONS = (
    ("samples", "Samples", "The same sample numbers and the same seed for every run."),
    (
        "interpolations",
        "Interpolations",
        "From one sample to another, the same pairs for every run.",
    ),
    ("progress", "Over training", "The same latents at several checkpoints of the run."),
    ("latents", "Latents", "Truncation, styles and main directions, for families that have them."),
    ("reconstructions", "Reconstructions", "Real images, encoded and decoded."),
    (
        "worst",
        "Weakest samples",
        "Rated lowest by the discriminator, or by the distance to real images.",
    ),
    ("neighbours", "Nearest training images", "Next to samples: memorised images show up here."),
)


@dataclass(frozen=True)
class Cell:
    """One cell of the table, as text.

    Attributes:
        text: the value.
        spread: ``± ...``, or empty.
        note: counts and fingerprint if they differ within the column, or empty.
        mark: ``best``, ``near`` or empty.
        target: id of the row with the origin of the number; empty without a value.
    """

    text: str
    spread: str = ""
    note: str = ""
    mark: str = ""
    target: str = ""


def render_page(comparison: Comparison) -> str:
    """The page as text."""
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["breakable"] = _breakable
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    runs, numbers = comparison.all_runs, {r.name: n for n, r in enumerate(comparison.all_runs)}
    colour_of = colours(comparison.experiments)
    plots = metric_plots(comparison.experiments, comparison.tracks, colour_of)
    return template.render(
        c=comparison,
        families=list(dict.fromkeys(run.family for run in runs)),
        groups=_groups(comparison.columns),
        rows=[
            (run, [_cell(run, column, numbers[run.name]) for column in comparison.columns])
            for run in comparison.runs
        ],
        number_of=numbers,
        colour_of=colour_of,
        num_colours=NUM_COLOURS,
        most_shown=MOST_SHOWN,
        seed_columns=[
            column
            for column in comparison.columns
            if any(column.name in one.values for one in comparison.seeds)
        ],
        plots=plots,
        any_band=any(curve.num_seeds > 1 for plot in plots for curve in plot.curves),
        timed=any(plot.by_time for plot in plots),
        losses=loss_plots(runs, colour_of),
        sections=_sections(comparison),
        more={run.name: _more(run) for run in runs},
        origins=[(run, [_origin(row) for row in number_rows(run)]) for run in runs],
        label_of=label_of,
    )


def _breakable(text: str) -> Markup:
    """Text that may break after an underscore, a dash or a slash."""
    return Markup("<wbr>").join(re.split(r"(?<=[_/-])", text))


def _groups(columns: Sequence[Column]) -> list[tuple[str, int]]:
    """Headings above the columns, and the number of columns of each."""
    groups: list[tuple[str, int]] = []
    for column in columns:
        if groups and groups[-1][0] == column.group:
            groups[-1] = (column.group, groups[-1][1] + 1)
        else:
            groups.append((column.group, 1))
    return groups


def _cell(run: ComparedRun, column: Column, place: int) -> Cell:
    number = run.numbers.get(column.name)
    if number is None or number.value is None:
        return Cell("–")
    notes = [] if column.counts else [show_counts(number)]
    notes.append(caution_words(number.caution))
    if not column.comparable and number.fingerprint:
        notes.append(number.fingerprint[:ID_DIGITS])
    return Cell(
        text=column.text(number.value),
        spread="" if number.spread is None else f"± {column.text(number.spread)}",
        note=" · ".join(note for note in notes if note),
        mark="best" if run.name in column.best else "near" if run.name in column.near else "",
        target=f"n-{place}-{column.name}",
    )


def _sections(
    comparison: Comparison,
) -> list[tuple[str, str, str, list[tuple[ComparedRun, list[Visualization]]]]]:
    """Images of all runs by section; empty sections are left out."""
    sections = []
    for key, title, text in SECTIONS:
        shown = []
        for run in comparison.all_runs:
            visuals = [
                visual for visual in run.visualizations if visual.section == key and visual.path
            ]
            if visuals:
                shown.append((run, visuals[:1] if key == "samples" else visuals))
        if shown:
            sections.append((key, title, text, shown))
    return sections


def _more(run: ComparedRun) -> list[Visualization]:
    """Images of no common section, and those that are missing with the reason."""
    first = next(
        (visual for visual in run.visualizations if visual.section == "samples" and visual.path),
        None,
    )
    return [
        visual
        for visual in run.visualizations
        if visual.section == "more"
        or visual.path is None
        or (visual.section == "samples" and visual is not first)
    ]


def _origin(row: dict[str, Any]) -> dict[str, Any]:
    """A number with all its digits, as text."""
    value = row["value"]
    return {
        **row,
        "shown": (row["reason"] or "not available")
        if value is None
        else all_digits(value) + (f" (caution: {row['caution']})" if row["caution"] else ""),
        "spread": "" if row["spread"] is None else f"{row['spread']:.4g}",
    }
