"""``RUN/stats.csv``: the lines of all stages as one wide table, for spreadsheets and pandas."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Mapping
from typing import Any

from dinogen.files import write_text
from dinogen.runs.run import Stage
from dinogen.training.logging.sinks.base import Charts, Event, LiveSink

_FIRST = ("nimg", "stage")


class CsvSink(LiveSink):
    """One row per log line, one column per name.

    The table always follows from the ``stats.jsonl`` of the stages. It is written from them, whole,
    when a stage begins and when a line brings a new column; other lines are appended.
    """

    columns: tuple[str, ...] = ()

    def start(self, stage: Stage, nimg: int, charts: Charts) -> None:
        """See :class:`LiveSink`."""
        self._rewrite()

    def write(self, event: Event) -> None:
        """Append the values of an event, whose line is in stats.jsonl already."""
        if not event.values:
            return
        if not set(event.values) <= set(self.columns):
            self._rewrite()
            return
        row = {"nimg": event.nimg, "stage": event.stage, **event.values}
        with self.run.table_file.open("a", encoding="utf-8", newline="") as file:
            file.write(_rows(self.columns, [row]))

    def _rewrite(self) -> None:
        lines = [line for stage in self.run.begun for line in stage.stats]
        names = {name: None for line in lines for name in line}
        self.columns = tuple(dict.fromkeys((*_FIRST, *names)))
        header = _rows(self.columns, [dict(zip(self.columns, self.columns, strict=True))])
        write_text(self.run.table_file, header + _rows(self.columns, lines))


def _rows(columns: tuple[str, ...], rows: Iterable[Mapping[str, Any]]) -> str:
    """Rows as text; what a row does not have, and what is not finite, is left empty."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    for row in rows:
        writer.writerow([_cell(row.get(name)) for name in columns])
    return text.getvalue()


def _cell(value: Any) -> Any:
    return "" if value is None or (isinstance(value, float) and not math.isfinite(value)) else value
