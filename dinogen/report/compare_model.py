"""What a comparison knows of a run: numbers with their origin, pictures, curves, trouble."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dinogen.errors import UserError
from dinogen.report.compare_looks import Look
from dinogen.report.stats import Line, read_stats


@dataclass(frozen=True)
class Number:
    """One figure of a run.

    Attributes:
        name: such as ``fid768`` or ``seconds``.
        value: None where it is not available; ``reason`` then says why.
        spread: standard deviation, in the unit of the value; None where there is none.
        better: ``lower``, ``higher`` or ``none``.
        num_samples: generated pictures that it was measured on.
        num_reference: real pictures that they were compared with.
        fingerprint: id of how it was measured; only equal ones compare.
        reason: why there is no value, with the mend.
        source: key of :attr:`Run.sources`.
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
class Run:
    """All that a comparison says about one run."""

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
    troubles: list[str] = field(default_factory=list)

    @property
    def finished(self) -> bool:
        """Whether the last stage of its config has a result."""
        return self.status == "finished"


def read_json(path: Path, run: Run) -> dict[str, Any] | None:
    """A JSON object; None if the file is missing, or broken, which is a trouble of the run."""
    if not path.is_file():
        return None
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(value, dict):
            raise ValueError("no object")
    except (OSError, ValueError) as error:
        run.troubles.append(f"{path.relative_to(run.folder)} cannot be read: {error}")
        return None
    return value


def read_lines(run: Run, path: Path) -> list[Line]:
    """Lines against nimg; none if there is no file, and a trouble of the run if none is whole."""
    if not path.is_file() or not path.stat().st_size:
        return []
    try:
        return read_stats(path)
    except UserError as error:
        run.troubles.append(str(error))
        return []


def finite(value: Any) -> float | None:
    """A finite number, else None."""
    if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
        return float(value)
    return None
