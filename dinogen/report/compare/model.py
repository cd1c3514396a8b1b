"""What a comparison knows of a run: numbers with their origin, images, curves, problems."""

from __future__ import annotations

import base64
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np

from dinogen.files import named_folder
from dinogen.runs.files import Found, Line, read_raw
from dinogen.runs.fingerprint import alike_id
from dinogen.runs.run import Stage

T = TypeVar("T")


@dataclass(frozen=True)
class Number:
    """One number of a run.

    Attributes:
        name: such as ``fid768`` or ``seconds``.
        value: None if it is not available; ``reason`` says why.
        spread: standard deviation, in the unit of the value; None where there is none.
        better: ``lower``, ``higher`` or ``none``.
        num_samples: number of generated images.
        num_reference: number of real images they were compared with.
        fingerprint: id of how it was measured.
        alike: id of what it has in common with those that it can be compared with
            (:func:`dinogen.runs.fingerprint.alike_id`).
        reason: why there is no value, with the remedy.
        source: key of :attr:`ComparedRun.sources`.
        caution: why it is uncertain; None if it is not.
    """

    name: str
    value: float | None
    source: str
    better: str = "none"
    spread: float | None = None
    num_samples: int | None = None
    num_reference: int | None = None
    fingerprint: str | None = None
    alike: str | None = None
    reason: str | None = None
    caution: str | None = None


@dataclass(frozen=True)
class Source:
    """Where numbers were read from, and what wrote them.

    Attributes:
        file: relative to the run.
        command: writes the file again.
        nimg: number of images seen.
        versions: of dinogen, torch, python.
        device: in words.
    """

    file: str
    command: str
    nimg: int | None
    versions: dict[str, str]
    device: str | None


class Point(NamedTuple):
    """A metric value that was measured during training, and after how many thousand images.

    Attributes:
        alike: see :class:`Number`.
        caution: why it is uncertain or favours the run; None if there is no reason.
    """

    kimg: float
    value: float
    alike: str | None
    caution: str | None


@dataclass
class ComparedRun:
    """Everything that a comparison shows of one run.

    Attributes (those that need an explanation):
        track: folder of the runs of a track, if it belongs to a study; else None.
        times: thousands of images, and the seconds of training that they took, over all stages;
            empty for a run of an earlier version.
        problems: damage, collapse, where it stopped.
        damage: those of them that are damaged files.
    """

    folder: Path
    name: str
    family: str = "unknown"
    status: str = "missing"
    track: Path | None = None
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
    times: tuple[list[float], list[float]] = field(default_factory=lambda: ([], []))
    visualizations: list[Visualization] = field(default_factory=list)
    real: Visualization | None = None
    problems: list[str] = field(default_factory=list)
    damage: list[str] = field(default_factory=list)

    @property
    def finished(self) -> bool:
        """Whether the last stage of its config has a result."""
        return self.status == "finished"

    def seconds_at(self, kimg: float) -> float | None:
        """Seconds of training until then, without measuring; None if its files do not say."""
        images, seconds = self.times
        if not images or kimg > images[-1]:
            return None
        return float(np.interp(kimg, [0.0, *images], [0.0, *seconds]))

    def alike(self, value: dict[str, Any]) -> str | None:
        """What a metric value of its files can be compared by (:func:`alike_id`)."""
        return alike_id(value.get("fingerprint"), self.fingerprints)

    def curve(self, name: str) -> list[Point]:
        """Values of a metric over training, those that are not available left out."""
        return [
            Point(line["nimg"] / 1000, one["value"], self.alike(one), one.get("caution"))
            for line in self.measured
            if (one := line["metrics"].get(name)) is not None and one.get("value") is not None
        ]


def take(run: ComparedRun, found: Found[T]) -> T:
    """The valid part of a file; what is wrong with it is added to the problems of the run."""
    said = found.messages(named_folder(run.folder))
    run.problems += said
    run.damage += said
    return found.value


MAX_BYTES = 4_000_000
TYPES = {".png": "png", ".gif": "gif", ".jpg": "jpeg", ".jpeg": "jpeg", ".webp": "webp"}

# The section of an image, by the beginning of its name.
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
class Visualization:
    """An image, or the reason why there is none.

    Attributes:
        name: such as ``grid16``.
        path: the file; None without an image.
        caption: what it shows.
        nimg: number of images seen.
        seed: it was drawn with.
        command: draws it again.
        reason: why there is no image.
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
        """The section it belongs to: a key of :data:`SECTIONS`, or ``more``."""
        if self.name.endswith("_animated"):
            return "more"  # several animations on one page distract
        for section, beginnings in SECTIONS.items():
            if self.name.startswith(beginnings):
                return section
        return "more"


def find_visualizations(
    stage: Stage, result: dict[str, Any] | None
) -> tuple[Found[dict[str, dict[str, Any]]], list[Visualization], list[str]]:
    """The index, the images (without samples the last grid of training), and what is missing.

    Args:
        stage: of the run.
        result: its result.json, as checked.
    """
    index = stage.read_visualizations()
    folder = stage.visualizations_folder
    visuals = [_visualization(name, one, folder) for name, one in index.value.items()]
    missing = [one.path.name for one in visuals if one.path and not one.path.is_file()]
    problems = []
    if missing:
        problems.append(f"images are missing: {', '.join(missing)}: run dinogen look again")
    if not any(one.section == "samples" and one.path for one in visuals) and result:
        name = (result.get("files") or {}).get("final")
        if name and (stage.folder / name).is_file():
            caption = "drawn at the end of training with the seed of the run"
            visuals.append(Visualization("final", stage.folder / name, caption, result.get("nimg")))
    return index, visuals, problems


def _visualization(name: str, one: dict[str, Any], folder: Path) -> Visualization:
    file = one.get("file")
    return Visualization(
        name=name,
        path=folder / file if file else None,
        caption=one.get("caption") or name,
        nimg=one.get("nimg"),
        seed=one.get("seed"),
        command=one.get("command"),
        reason=one.get("reason"),
    )
