"""A comparison as Markdown: for notes, pull requests and terminals."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from dinogen.report.compare.columns import Column, all_digits
from dinogen.report.compare.comparison import Comparison
from dinogen.report.compare.model import ComparedRun
from dinogen.report.compare.table import number_rows


def render_text(comparison: Comparison) -> str:
    """All of a comparison but its pictures and curves, as Markdown."""
    lines = [f"# {_cell(comparison.title)}", ""]
    lines += [f"> **Warning.** {_cell(text)}\n>" for text in comparison.warnings]
    lines += ["", f"## Metric values ({comparison.order})", ""]
    columns = comparison.columns
    heads = [f"{column.full_label} {column.arrow}".strip() for column in columns]
    lines += _table(
        ["run", "family", *heads],
        (
            [run.name, run.family, *(_metric_value(run, column) for column in columns)]
            for run in comparison.runs
        ),
    )
    lines += [
        "",
        "Bold: best of its column; ≈: two spreads do not tell it apart from the best; ± spread; "
        "n: generated images / real ones; few images: fewer than 1,000 of either, or than the "
        "features have dimensions.",
        "",
    ]
    for metrics, reason, runs in comparison.unavailable:
        lines.append(f"- Not available: {_cell(metrics)} ({', '.join(runs)}): {_cell(reason)}")
    lines += _seeds(comparison) + _story(comparison) + _failures(comparison)
    lines += _provenance(comparison)
    return "\n".join(lines).rstrip() + "\n"


def _metric_value(run: ComparedRun, column: Column) -> str:
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
    return text + (" (few images)" if number.caution else "")


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


def _story(comparison: Comparison) -> list[str]:
    name = comparison.main_metric.full_label if comparison.main_metric else "metric"
    lines = []
    for chapter in comparison.story:
        lines += ["", f"## {_cell(chapter.family)}, step by step", ""]
        lines += _table(
            ["step", "run", "change", name, "what failed", "next"],
            (
                [
                    row.step,
                    row.run,
                    row.change,
                    f"**{row.metric}**" if row.best else row.metric,
                    row.failed,
                    row.next,
                ]
                for row in chapter.rows
            ),
        )
    return lines


def _failures(comparison: Comparison) -> list[str]:
    lines = ["", "## Failures", ""]
    for run in (*comparison.failed, *comparison.with_problem):
        lines.append(f"- **{_cell(run.name)}** ({run.status}): {_cell('; '.join(run.problems))}")
    if len(lines) == 3:
        lines.append("None: every run has a result and no problem.")
    return lines


def _provenance(comparison: Comparison) -> list[str]:
    lines = ["", "## Where every number comes from"]
    for run in comparison.all_runs:
        lines += ["", f"### {_cell(run.name)}", ""]
        lines.append(f"- folder `{run.folder}`, config.yaml sha256 `{run.config_sha256}`")
        lines.append(f"- data `{run.data}`, fingerprint `{run.data_sha256}`")
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
