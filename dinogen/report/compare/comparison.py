"""A comparison of runs: what its page and its text show, and the text."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from typing import Any

from dinogen.report.compare.experiments import (
    Equal,
    Experiment,
    Seeds,
    at_equal,
    find_experiments,
    over_seeds,
)
from dinogen.report.compare.model import ComparedRun
from dinogen.report.compare.table import (
    Column,
    all_digits,
    caution_words,
    label_of,
    main_column,
    make_columns,
    number_rows,
    sort_runs,
    unavailable,
    values_of,
)
from dinogen.runs.fingerprint import alike_facts
from dinogen.runs.values import favours

# of more runs only the number is shown
MAX_NAMES = 4
DIGITS = 12


def warnings_of(runs: Sequence[ComparedRun], columns: Sequence[Column]) -> list[str]:
    """One sentence for each thing that could mislead a reader of the table."""
    return [
        *_differing(runs, columns),
        *_trained_with(runs, columns),
        *_random(runs),
        *_different_data(runs),
        *_different_seeds(runs),
    ]


def _differing(runs: Sequence[ComparedRun], columns: Sequence[Column]) -> list[str]:
    """Columns measured in different ways; one sentence for all with the same difference."""
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
    """What differs within a column, and for which runs."""
    numbers = values_of(runs, column.name)
    by_name = {run.name: run for run in runs}
    facts: dict[str, dict[str, Any]] = {}
    for name, number in numbers.items():
        run = by_name[name]
        if column.group == "Cost":
            source = run.sources.get(number.source)
            facts[name] = {"device": source.device if source else None}
            continue
        known = alike_facts(run.fingerprints.get(number.fingerprint or "", {}))
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
            drawn = key == "sampling" and "judge" in one
            missing = "as usual" if drawn else "unknown"
            groups.setdefault(_short(one.get(key, missing)), []).append(name)
        if len(groups) > 1:
            said = "; ".join(f"{value} ({_names(some)})" for value, some in groups.items())
            parts.append(f"{key}: {said}.")
    return " ".join(parts)


def _trained_with(runs: Sequence[ComparedRun], columns: Sequence[Column]) -> list[str]:
    """Metrics by a network that some of the runs were trained with; one sentence for each group."""
    found: dict[tuple[str, ...], list[Column]] = {}
    for column in columns:
        numbers = values_of(runs, column.name)
        if names := tuple(name for name, one in numbers.items() if favours(one.caution)):
            found.setdefault(names, []).append(column)
    sentences = []
    for names, some in found.items():
        labels = ", ".join(column.full_label for column in some)
        sentences.append(
            f"{labels}: {_names(names)} learnt from the network that measures, which favours them: "
            "compare by metrics whose network no run was trained with."
        )
    return sentences


def _random(runs: Sequence[ComparedRun]) -> list[str]:
    """Feature extractors and guides with random weights: such values say nothing about quality."""
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
        sentences.append(f"RANDOM GUIDE: {_names(guided)} were trained with random weights.")
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
    """The page says that grids are drawn with the same seed, so check it."""
    groups: dict[int, list[str]] = {}
    for run in runs:
        for visual in run.visualizations:
            if visual.section == "samples" and visual.path and visual.seed is not None:
                groups.setdefault(visual.seed, []).append(run.name)
                break
    if len(groups) < 2:
        return []
    said = "; ".join(f"seed {seed} ({_names(some)})" for seed, some in groups.items())
    return [f"Grids were drawn with different seeds: {said}."]


def _names(names: Sequence[str]) -> str:
    return ", ".join(names) if len(names) <= MAX_NAMES else f"{len(names)} runs"


def _short(value: object) -> str:
    """A value for people; only the first digits of a hash."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {one}" for key, one in value.items())
    text = str(value)
    return text[:DIGITS] if len(text) == 64 and " " not in text else text


class Comparison:
    """A comparison of runs: what its page, JSON and Markdown have in common.

    Args:
        runs: as read from their folders.
        title: heading.
        notes: sentences below it, such as how long a study lets its runs train.
    """

    def __init__(self, runs: Sequence[ComparedRun], title: str, notes: Sequence[str] = ()) -> None:
        self.title, self.notes = title, list(notes)
        self.version = version("dinogen")
        begun = [run for run in runs if run.numbers]
        self.columns: list[Column] = make_columns(begun)
        self.main_column = main_column(self.columns, begun)
        self.runs = sort_runs(begun, self.main_column)
        self.failed = [run for run in runs if not run.finished]
        self.with_problems = [run for run in runs if run.finished and run.problems]
        self.damaged = [run for run in runs if run.damage]
        self.warnings = [*_damaged(self.damaged, runs), *warnings_of(begun, self.columns)]
        self.unavailable = unavailable(begun, label_of)
        self.all_runs = [*self.runs, *(run for run in runs if not run.numbers)]
        self.experiments: list[Experiment] = find_experiments(self.all_runs)
        self.seeds: list[Seeds] = over_seeds(self.experiments, self.columns)
        self.tracks = list(dict.fromkeys(run.track for run in runs))
        self.equal: list[Equal] = at_equal(begun, self.experiments)

    @property
    def fingerprints(self) -> dict[str, dict[str, Any]]:
        """The facts behind each fingerprint of the table, as far as the runs record them."""
        found: dict[str, dict[str, Any]] = {}
        for run in self.runs:
            for number in run.numbers.values():
                if number.fingerprint:
                    found.setdefault(number.fingerprint, {})
                    found[number.fingerprint] |= run.fingerprints.get(number.fingerprint, {})
        return found

    @property
    def order(self) -> str:
        """The order of the rows, in words."""
        if self.main_column is None or not self.main_column.comparable:
            return "in the order given"
        return f"sorted by {self.main_column.full_label}, best first"

    def to_dict(self) -> dict[str, Any]:
        """The comparison, JSON-ready."""
        return {
            "title": self.title,
            "notes": self.notes,
            "dinogen": self.version,
            "order": self.order,
            "main_metric": self.main_column.name if self.main_column else None,
            "warnings": self.warnings,
            "columns": [asdict(column) for column in self.columns],
            "runs": [_run_dict(run) for run in self.all_runs],
            "not_available": [
                {"metrics": metrics, "reason": reason, "runs": runs}
                for metrics, reason, runs in self.unavailable
            ],
            "seeds": [asdict(one) for one in self.seeds],
            "equal": [asdict(one) for one in self.equal],
            "failures": {
                run.name: {"status": run.status, "what": run.problems}
                for run in (*self.failed, *self.with_problems)
            },
            "damaged": {run.name: run.damage for run in self.damaged},
            "fingerprints": self.fingerprints,
        }


def _damaged(damaged: Sequence[ComparedRun], runs: Sequence[ComparedRun]) -> list[str]:
    """A warning if files are damaged."""
    if not damaged:
        return []
    names = ", ".join(run.name for run in damaged)
    return [
        f"DAMAGED FILES in {len(damaged)} of {len(runs)} runs: {names}. Failures lists "
        "what is wrong with each; the rest is compared."
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
        "problems": run.problems,
        "numbers": {row.pop("name"): row for row in number_rows(run)},
        "curves": {
            "measured": run.measured,
            "training_s": {"kimg": run.times[0], "values": run.times[1]},
            "loss": {"kimg": run.loss[0], "values": run.loss[1]},
        },
        "visualizations": [
            {
                "name": visual.name,
                "file": str(visual.path) if visual.path else None,
                "caption": visual.caption,
                "nimg": visual.nimg,
                "seed": visual.seed,
                "command": visual.command,
                "reason": visual.reason,
            }
            for visual in run.visualizations
        ],
    }


def render_text(comparison: Comparison) -> str:
    """A comparison without images and curves, as Markdown."""
    lines = [f"# {_cell(comparison.title)}", ""]
    lines += [f"{_cell(text)}\n" for text in comparison.notes]
    lines += [f"> **Warning.** {_cell(text)}\n>" for text in comparison.warnings]
    lines += ["", f"## Metrics ({comparison.order})", ""]
    columns = comparison.columns
    heads = [f"{column.full_label} {column.arrow}".strip() for column in columns]
    lines += _table(
        ["run", "family", *heads],
        (
            [run.name, run.family, *(_value(run, column) for column in columns)]
            for run in comparison.runs
        ),
    )
    lines += [
        "",
        "Bold: best of its column; ≈: within two spreads of the best; ± spread; "
        "n: generated images / real ones; few images: fewer than 1,000 of either, or fewer "
        "than the features have dimensions; own network: the run was trained with the network that "
        "measures.",
        "",
    ]
    for metrics, reason, runs in comparison.unavailable:
        lines.append(f"- Not available: {_cell(metrics)} ({', '.join(runs)}): {_cell(reason)}")
    lines += _seeds(comparison) + _equal(comparison) + _failures(comparison)
    lines += _provenance(comparison)
    return "\n".join(lines).rstrip() + "\n"


def _value(run: ComparedRun, column: Column) -> str:
    """A cell of the table: value, spread, counts."""
    number = run.numbers.get(column.name)
    if number is None or number.value is None:
        return "–"
    text = column.text(number.value)
    if number.spread is not None:
        text += f" ± {column.text(number.spread)}"
    if run.name in column.best:
        text = f"**{text}**"
    elif run.name in column.near:
        text = f"≈ {text}"
    if number.num_samples is not None:
        real = "" if number.num_reference is None else f" / {number.num_reference:,}"
        text += f" (n {number.num_samples:,}{real})"
    if not column.comparable and number.fingerprint:
        text += f" `{number.fingerprint}`"
    words = caution_words(number.caution)
    return text + (f" ({words})" if words else "")


def _seeds(comparison: Comparison) -> list[str]:
    if not comparison.seeds:
        return []
    columns = [
        column
        for column in comparison.columns
        if any(column.name in one.values for one in comparison.seeds)
    ]
    rows = []
    for one in comparison.seeds:
        row = [one.name, str(len(one.runs))]
        for column in columns:
            found = one.values.get(column.name)
            row.append(f"{column.text(found[0])} ± {column.text(found[1])}" if found else "–")
        rows.append(row)
    heads = [column.full_label for column in columns]
    return ["", "## Over seeds", "", *_table(["experiment", "runs", *heads], rows)]


def _equal(comparison: Comparison) -> list[str]:
    lines: list[str] = []
    for one in comparison.equal:
        lines += ["", f"## After {one.words}, in {_cell(one.folder)}", ""]
        heads = [f"{label_of(name)} {one.arrows.get(name, '')}".strip() for name in one.names]
        rows = []
        for name, runs, values in one.rows:
            cells = [name, str(len(runs))]
            for metric in one.names:
                value, spread = values.get(metric, (None, None))
                text = "–" if value is None else f"{value:.4g}"
                text += "" if spread is None else f" ± {spread:.2g}"
                if name in one.best.get(metric, ()):
                    text = f"**{text}**"
                words = one.cautions[name].get(metric)
                cells.append(f"{text} ({words})" if words else text)
            rows.append(cells)
        lines += _table(["experiment", "runs", *heads], rows)
        if one.left_out:
            lines += ["", f"Without a record of their time: {', '.join(one.left_out)}."]
    return lines


def _failures(comparison: Comparison) -> list[str]:
    lines = ["", "## Failures", ""]
    for run in (*comparison.failed, *comparison.with_problems):
        lines.append(f"- **{_cell(run.name)}** ({run.status}): {_cell('; '.join(run.problems))}")
    if len(lines) == 3:
        lines.append("None: every run has a result and no problems.")
    return lines


def _provenance(comparison: Comparison) -> list[str]:
    lines = ["", "## Where every number comes from"]
    for run in comparison.all_runs:
        lines += ["", f"### {_cell(run.name)}", ""]
        lines.append(f"- folder `{run.folder}`, config.yaml sha256 `{run.config_sha256}`")
        lines.append(f"- data `{run.data}`, fingerprint `{run.data_sha256}`")
        lines += [f"- {key}: {_cell(text)}" for key, text in run.notes.items()]
        for key, source in run.sources.items():
            versions = ", ".join(f"{name} {text}" for name, text in source.versions.items())
            lines.append(
                f"- {key}: `{source.command}` wrote `{source.file}` at {source.nimg} images "
                f"({versions}; {source.device})"
            )
        rows = [row for row in number_rows(run) if row["value"] is not None]
        if rows:
            keys = ("value", "spread", "num_samples", "num_reference", "fingerprint", "source")
            lines.append("")
            lines += _table(
                ["number", *(key.removeprefix("num_") for key in keys)],
                ([row["name"], *(_origin(row[key]) for key in keys)] for row in rows),
            )
    if comparison.fingerprints:
        lines += ["", "### Fingerprints", ""]
        for key, facts in comparison.fingerprints.items():
            said = ", ".join(f"{name} {value}" for name, value in facts.items()) or "not recorded"
            lines.append(f"- `{key}`: {_cell(said)}")
    return lines


def _origin(value: object) -> str:
    if value is None:
        return ""
    return all_digits(value) if isinstance(value, float) else str(value)


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    return [
        "| " + " | ".join(_cell(head) for head in heads) + " |",
        "|" + " --- |" * len(heads),
        *("| " + " | ".join(_cell(text) for text in row) + " |" for row in rows),
    ]


def _cell(text: str) -> str:
    """Text that cannot end a cell or a line, or become HTML."""
    for sign, harmless in (("|", "\\|"), ("<", "&lt;"), ("\r", " "), ("\n", " ")):
        text = text.replace(sign, harmless)
    return text
