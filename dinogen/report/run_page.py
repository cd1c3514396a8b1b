"""The page of a run: generated and real images, loss and numbers of every stage, in one file."""

from __future__ import annotations

import base64
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from dinogen.errors import UserError
from dinogen.files import write_text
from dinogen.runs.files import read_raw, read_text
from dinogen.runs.run import Run
from dinogen.runs.values import finite

log = logging.getLogger(__name__)

Show = Callable[[dict[str, Any]], str]
TEMPLATE = Path(__file__).with_name("page.html")
BADGES = {"ok": "ok", "COLLAPSING": "warn", "COLLAPSED": "bad"}


@dataclass(frozen=True)
class PageImage:
    """An image on the page.

    Attributes:
        caption: what it shows.
        name: file name inside the stage's folder.
        data: the file as a data URI; None if it is missing, which the page shows.
    """

    caption: str
    name: str
    data: str | None


@dataclass(frozen=True)
class Stage:
    """What the page shows of one finished stage."""

    name: str
    result: dict[str, Any]
    images: tuple[PageImage, ...]
    curve: PageImage

    @property
    def health(self) -> str:
        """``ok``, ``COLLAPSING`` or ``COLLAPSED``."""
        return self.result.get("health") or "unknown"

    @property
    def badge(self) -> str:
        """CSS class of the health status; an unknown one must not look good."""
        return BADGES.get(self.health, "bad")


@dataclass(frozen=True)
class Beside:
    """Another run, whose last images a page shows below those of its own.

    Attributes:
        run: its folder.
        caption: of its images.
        text: what the two show together.
    """

    run: Path
    caption: str
    text: str


def write_page(run: Path, page: Path | None = None, beside: Beside | None = None) -> Path:
    """Write the page of a run from the run's files; the page needs no other file.

    Args:
        run: folder of a run with at least one finished stage.
        page: the file; ``RUN/index.html`` if None.
        beside: a run that the page compares with: it then opens with the images of both.

    Returns:
        The page.

    A stage whose result cannot be read is left out, with a warning in the log and on the page.

    Raises:
        UserError: the run has no finished stage.
    """
    place = Run(run)
    page = page or place.page
    stages, damaged = _read_stages(place)
    other: PageImage | None = None
    if beside is not None:
        others, damaged_too = _read_stages(Run(beside.run))
        damaged += damaged_too
        other = replace(others[-1].images[0], caption=beside.caption) if others else None
    for problem in damaged:
        log.warning("%s", problem)
    if not stages:
        raise UserError(f"{run}: no stage is finished (no valid result.json in it): train it first")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    html = template.render(
        title=page.resolve().parent.name,
        stages=stages,
        beside=beside,
        other=other,
        damaged=damaged,
        rows=[(label, [show(stage.result) for stage in stages]) for label, show in ROWS.items()],
        guides=sorted(
            {str(s.result["guide_label"]) for s in stages if s.result.get("guide_label")}
        ),
        random_guide=any(stage.result.get("random_guide") for stage in stages),
        collapsed=[stage.name for stage in stages if stage.health == "COLLAPSED"],
        collapsing=[stage.name for stage in stages if stage.health == "COLLAPSING"],
        guide=stages[-1].result.get("guide") or {},
        versions=stages[-1].result.get("versions") or {},
        config=_read_text(place.config_file),
    )
    write_text(page, html)
    return page


def _read_stages(run: Run) -> tuple[list[Stage], list[str]]:
    """The finished stages, smallest resolution first, and what is wrong with their files."""
    stages, damaged = [], []
    for stage in run.begun:
        found = stage.read_result()
        damaged += found.messages(run.path)
        if found.value is not None:
            stages.append(_stage(stage.folder, found.value))
    return stages, damaged


def _stage(folder: Path, result: dict[str, Any]) -> Stage:
    files = result.get("files") or {}
    return Stage(
        name=folder.name,
        result=result,
        images=(
            _read_image(folder, "generated", files.get("final")),
            _read_image(folder, "real", files.get("real")),
        ),
        curve=_read_image(folder, "loss curve", files.get("loss_curve")),
    )


def _read_image(folder: Path, caption: str, name: str | None) -> PageImage:
    path = folder / (name or caption)
    raw = read_raw(path)
    if not raw.value:
        return PageImage(caption, path.name, None)
    data = base64.b64encode(raw.value).decode("ascii")
    return PageImage(caption, path.name, f"data:image/png;base64,{data}")


def _read_text(path: Path) -> str:
    found = read_text(path)
    if not found.there:
        return f"{path.name} is missing"
    return found.value or "; ".join(found.messages(path.parent)) or f"{path.name} is empty"


def _number(name: str, form: str, scale: float = 1.0) -> Show:
    """Reads a number of a result as text; a dash without one."""

    def show(result: dict[str, Any]) -> str:
        value = finite(result.get(name))
        return "–" if value is None else form.format(value * scale)

    return show


def _word(name: str) -> Show:
    def show(result: dict[str, Any]) -> str:
        value = result.get(name)
        return "–" if value is None else str(value)

    return show


def _time(result: dict[str, Any]) -> str:
    seconds = finite(result.get("seconds"))
    if seconds is None:
        return "–"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


ROWS: dict[str, Show] = {
    "health": _word("health"),
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
