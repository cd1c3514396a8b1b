"""What a comparison knows of a run: numbers with their origin, pictures, curves, trouble."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from dinogen.report.compare.looks import Look
from dinogen.runs.files import Found, Line

T = TypeVar("T")


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
        reason: why there is no value, with the remedy.
        source: key of :attr:`Run.sources`.
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
class Run:
    """All that a comparison says about one run.

    Attributes (those that do not explain themselves):
        troubles: what a reader has to know of it: damage, collapse, where it stopped.
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
    troubles: list[str] = field(default_factory=list)
    damage: list[str] = field(default_factory=list)

    @property
    def finished(self) -> bool:
        """Whether the last stage of its config has a result."""
        return self.status == "finished"


def take(run: Run, found: Found[T]) -> T:
    """What is sound of one of a run's files; what is not becomes a trouble of the run."""
    said = found.told(run.folder)
    run.troubles += said
    run.damage += said
    return found.value
