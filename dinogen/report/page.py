"""The page of a run: every stage beside real pictures, its curve and its numbers, in one file."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from dinogen.errors import UserError
from dinogen.files import write_text

PAGE = "index.html"
Show = Callable[[dict[str, Any]], str]
TEMPLATE = Path(__file__).with_name("page.html")
BADGES = {"ok": "ok", "COLLAPSING": "warn", "COLLAPSED": "bad"}


@dataclass(frozen=True)
class Picture:
    """A picture of the page.

    Attributes:
        caption: what it shows.
        name: file name inside the stage's folder.
        data: the file as a data URI; None if it is missing, which the page says.
    """

    caption: str
    name: str
    data: str | None


@dataclass(frozen=True)
class Stage:
    """What the page says about one finished stage."""

    name: str
    result: dict[str, Any]
    pictures: tuple[Picture, ...]
    curve: Picture

    @property
    def verdict(self) -> str:
        """``ok``, ``COLLAPSING`` or ``COLLAPSED``."""
        return str(self.result.get("verdict", "unknown"))

    @property
    def badge(self) -> str:
        """CSS class of the verdict; one that is not known must not look good."""
        return BADGES.get(self.verdict, "bad")


def write_page(run: Path) -> Path:
    """Write ``RUN/index.html`` from the run's files; nothing outside the file is needed to read it.

    Args:
        run: folder of a run with at least one finished stage.

    Returns:
        The page.

    Raises:
        UserError: the run has no finished stage, or a result cannot be read.
    """
    stages = [_read_stage(path) for path in _results(run)]
    if not stages:
        raise UserError(f"{run}: no stage is finished (no result.json below it): train it first")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    html = template.render(
        title=run.resolve().name,
        stages=stages,
        rows=[(label, [show(stage.result) for stage in stages]) for label, show in ROWS.items()],
        guides=sorted(
            {str(s.result["guide_label"]) for s in stages if s.result.get("guide_label")}
        ),
        random_guide=any(stage.result.get("random_guide") for stage in stages),
        collapsed=[stage.name for stage in stages if stage.verdict == "COLLAPSED"],
        collapsing=[stage.name for stage in stages if stage.verdict == "COLLAPSING"],
        guide=stages[-1].result.get("guide") or {},
        versions=stages[-1].result.get("versions") or {},
        config=_read_text(run / "config.yaml"),
    )
    page = run / PAGE
    write_text(page, html)
    return page


def _results(run: Path) -> list[Path]:
    """result.json of each finished stage, smallest resolution first."""
    paths = [
        path for path in run.glob("*x*/result.json") if path.parent.name.split("x")[0].isdigit()
    ]
    return sorted(paths, key=lambda path: int(path.parent.name.split("x")[0]))


def _read_stage(path: Path) -> Stage:
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        files = dict(result["files"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not a stage's result ({error}): train the stage again") from None
    folder = path.parent
    return Stage(
        name=folder.name,
        result=result,
        pictures=(
            _read_picture(folder, "generated", files.get("final")),
            _read_picture(folder, "real", files.get("real")),
        ),
        curve=_read_picture(folder, "loss curve", files.get("loss_curve")),
    )


def _read_picture(folder: Path, caption: str, name: str | None) -> Picture:
    path = folder / (name or caption)
    if not path.is_file():
        return Picture(caption, path.name, None)
    data = base64.b64encode(path.read_bytes()).decode("ascii")
    return Picture(caption, path.name, f"data:image/png;base64,{data}")


def _read_text(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.is_file() else f"{path.name} is missing"


def _number(name: str, form: str, scale: float = 1.0) -> Show:
    """Reads a number of a result as text; a dash where the run has none."""

    def show(result: dict[str, Any]) -> str:
        value = result.get(name)
        if isinstance(value, (int, float)) and math.isfinite(value):
            return form.format(value * scale)
        return "–"

    return show


def _word(name: str) -> Show:
    def show(result: dict[str, Any]) -> str:
        value = result.get(name)
        return "–" if value is None else str(value)

    return show


def _time(result: dict[str, Any]) -> str:
    seconds = result.get("seconds")
    if not isinstance(seconds, (int, float)) or not math.isfinite(seconds):
        return "–"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


ROWS: dict[str, Show] = {
    "verdict": _word("verdict"),
    "images shown": _number("nimg", "{:,.0f}"),
    "loss": _number("loss", "{:.4g}"),
    "collapse floor": _number("floor", "{:.4g}"),
    "loss / floor": _number("loss_over_floor", "{:.3f}"),
    "diversity / real": _number("diversity", "{:.1%}"),
    "images/s": _number("images_per_s", "{:,.1f}"),
    "waiting for data": _number("data_wait", "{:.1%}"),
    "damaged samples replaced": _number("num_skipped", "{:,.0f}"),
    "time, (h:)m:s": _time,
    "peak GPU memory, MiB": _number("peak_memory_mb", "{:,.0f}"),
    "parameters, million": _number("num_parameters", "{:.2f}", 1e-6),
    "device": _word("device"),
    "precision": _word("precision"),
    "processes": _word("world_size"),
}
