"""What a comparison knows of a run: numbers with their origin, images, curves, problem."""

from __future__ import annotations

import base64
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from dinogen.files import named_folder
from dinogen.runs.files import Found, Line, read_raw
from dinogen.runs.run import Stage

T = TypeVar("T")


@dataclass(frozen=True)
class Number:
    """One metric value of a run.

    Attributes:
        name: such as ``fid768`` or ``seconds``.
        value: None where it is not available; ``reason`` then says why.
        spread: standard deviation, in the unit of the value; None where there is none.
        better: ``lower``, ``higher`` or ``none``.
        num_samples: generated pictures that it was measured on.
        num_reference: real pictures that they were compared with.
        fingerprint: id of how it was measured; only equal ones compare.
        reason: why there is no value, with the remedy.
        source: key of :attr:`ComparedRun.sources`.
        caution: why it is to be read with care; None if nothing speaks against it.
    """

    name: str
    value: float | None
    source: str
    better: str = "none"
    spread: float | None = None
    num_samples: int | None = None
    num_reference: int | None = None
    fingerprint: str | None = None
    reason: str | None = None
    caution: str | None = None


@dataclass(frozen=True)
class Source:
    """Where numbers were read, and what made them.

    Attributes:
        file: relative to the run.
        command: that makes the file again.
        nimg: images that the run had been shown.
        versions: of dinogen, torch, python.
        device: in words.
    """

    file: str
    command: str
    nimg: int | None
    versions: dict[str, str]
    device: str | None


@dataclass
class ComparedRun:
    """All that a comparison says about one run.

    Attributes (those that do not explain themselves):
        problems: what a reader has to know of it: damage, collapse, where it stopped.
        damage: those of them that say which of its files is damaged.
    """

    folder: Path
    name: str
    family: str = "unknown"
    status: str = "missing"
    seed: int | None = None
    resolution: int | None = None
    config: dict[str, Any] = field(default_factory=dict)
    config_text: str = ""
    config_sha256: str | None = None
    data: str | None = None
    data_sha256: str | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)
    numbers: dict[str, Number] = field(default_factory=dict)
    others: dict[str, Number] = field(default_factory=dict)
    sources: dict[str, Source] = field(default_factory=dict)
    fingerprints: dict[str, dict[str, Any]] = field(default_factory=dict)
    measured: list[Line] = field(default_factory=list)
    loss: tuple[list[float], list[float]] = field(default_factory=lambda: ([], []))
    looks: list[Look] = field(default_factory=list)
    real: Look | None = None
    problems: list[str] = field(default_factory=list)
    damage: list[str] = field(default_factory=list)

    @property
    def finished(self) -> bool:
        """Whether the last stage of its config has a result."""
        return self.status == "finished"


def take(run: ComparedRun, found: Found[T]) -> T:
    """What is sound of one of a run's files; what is not becomes a problem of the run."""
    said = found.told(named_folder(run.folder))
    run.problems += said
    run.damage += said
    return found.value


MAX_BYTES = 4_000_000
TYPES = {".png": "png", ".gif": "gif", ".jpg": "jpeg", ".jpeg": "jpeg", ".webp": "webp"}

# Which pictures stand under which heading, by the beginning of their names.
SECTIONS = {
    "samples": ("grid16", "grid64", "final"),
    "interpolations": ("interpolation",),
    "progress": ("progression",),
    "latents": ("psi", "styles", "directions"),
    "reconstructions": ("reconstruction",),
    "worst": ("worst",),
    "neighbours": ("neighbour",),
}


@dataclass(frozen=True)
class Look:
    """A picture, or why there is none.

    Attributes:
        name: such as ``grid16``.
        path: the file; None if it was left out.
        caption: what it shows.
        nimg: images that the run had been shown.
        seed: that it was drawn with.
        command: that draws it again.
        reason: why it was left out.
    """

    name: str
    path: Path | None
    caption: str
    nimg: int | None = None
    seed: int | None = None
    command: str | None = None
    reason: str | None = None

    @property
    def uri(self) -> str | None:
        """The file as a data URI; None if it cannot be read or it is too large for a page."""
        if self.path is None:
            return None
        kind = TYPES.get(self.path.suffix.lower())
        data = read_raw(self.path).value
        if kind is None or not 0 < len(data) <= MAX_BYTES:
            return None
        return f"data:image/{kind};base64,{base64.b64encode(data).decode('ascii')}"

    @property
    def section(self) -> str:
        """Under which heading it stands: a key of :data:`SECTIONS`, or ``more``."""
        if self.name.endswith("_animated"):
            return "more"  # many moving pictures on one page make nobody wiser
        for section, beginnings in SECTIONS.items():
            if self.name.startswith(beginnings):
                return section
        return "more"


def read_looks(
    stage: Stage, result: dict[str, Any] | None
) -> tuple[Found[dict[str, dict[str, Any]]], list[Look], list[str]]:
    """looks.json, its images, else the last grid of training; and what is missing.

    Args:
        stage: of the run.
        result: its result.json, as checked.
    """
    index = stage.read_visualizations()
    folder = stage.visualizations_folder
    looks = [_look(name, one, folder) for name, one in index.value.items()]
    missing = [one.path.name for one in looks if one.path and not one.path.is_file()]
    problems = []
    if missing:
        problems.append(f"images are missing: {', '.join(missing)}: run dinogen look again")
    if not any(one.section == "samples" and one.path for one in looks) and result:
        name = (result.get("files") or {}).get("final")
        if name and (stage.folder / name).is_file():
            caption = "drawn at the end of training, under the seed of the run"
            looks.append(Look("final", stage.folder / name, caption, result.get("nimg")))
    return index, looks, problems


def _look(name: str, one: dict[str, Any], folder: Path) -> Look:
    file = one.get("file")
    return Look(
        name=name,
        path=folder / file if file else None,
        caption=one.get("caption") or name,
        nimg=one.get("nimg"),
        seed=one.get("seed"),
        command=one.get("command"),
        reason=one.get("reason"),
    )
