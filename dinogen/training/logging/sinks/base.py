"""What a sink is: it takes in events of a run, which stand at the images seen, and shows them.

Sinks differ in whether they can forget. A run that was killed goes on at its last checkpoint and
logs the images after it once more. :class:`LiveSink` drops what it has past that point, so it is
given each event at once, by the process that trains. :class:`SentSink` cannot, for a server has no
such request: it is given an event when a checkpoint covers it, by a process of its own
(:mod:`dinogen.training.logging.sinks.sender`), so that no server can slow training down.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from dinogen.config import Section
from dinogen.runs.run import Run, Stage

# {category: {chart: [kind, [tag pattern]]}}, as TensorBoard's tab Custom Scalars takes it
Charts = Mapping[str, Mapping[str, list[Any]]]


@dataclass(frozen=True)
class Event:
    """What a run logs at one moment.

    Attributes:
        nimg: images shown so far, in all stages: the x axis.
        stage: resolution of the stage.
        values: by name; None where a value could not be measured, and NaN may occur.
        images: PNG files by name.
        health: the new health status, where it changes.
        warnings: what was found wrong, as sentences.
    """

    nimg: int
    stage: int
    values: Mapping[str, float | None] = field(default_factory=dict)
    images: Mapping[str, Path] = field(default_factory=dict)
    health: str | None = None
    warnings: tuple[str, ...] = ()


class NoOptions(Section):
    """The options of a sink that has none."""


class Sink(ABC):
    """A place where runs are shown; its name is that of its file.

    Attributes:
        Options: what ``logging: [{NAME: {...}}]`` may hold.
        package: what has to be installed, ``dinogen[NAME]`` as an extra; None if nothing.
    """

    Options: ClassVar[type[Section]] = NoOptions
    package: ClassVar[str | None] = None

    @abstractmethod
    def write(self, event: Event) -> None:
        """Take in one event; they come by ascending ``nimg``.

        Raises:
            Exception: any that the library raises; the sink is closed and opened again.
        """

    def close(self, status: str) -> None:  # noqa: B027
        """Let go of files and connections.

        Args:
            status: ``done``, ``stopped`` (the run goes on later) or ``failed``.
        """


class LiveSink(Sink):
    """Drops what it has past a point, and is given each event as it happens.

    Args:
        options: checked.
        run: whose events it takes in.
    """

    def __init__(self, options: Section, run: Run) -> None:
        self.options = options
        self.run = run

    @abstractmethod
    def start(self, stage: Stage, nimg: int, charts: Charts) -> None:
        """Begin or resume a stage at ``nimg``; what is there of later images is dropped."""

    def flush(self) -> None:
        """Bring what was written to disk; done before each checkpoint."""


class SentSink(Sink):
    """Cannot drop what it has, and is given each event once.

    Args:
        options: checked.
        run: whose events it takes in.
        record: kept in ``RUN/logging/NAME.json`` from one process to the next, for the id of the
            run over there; JSON-ready, filled by :meth:`open`. ``sent`` and ``summary`` in it
            belong to the sender.

    Attributes:
        address: where the run is to be seen, for the log; known when it is open.
    """

    address = ""

    def __init__(self, options: Section, run: Run, record: dict[str, Any]) -> None:
        self.options = options
        self.run = run
        self.record = record

    @abstractmethod
    def open(self) -> int | None:
        """Begin the run over there, or continue it under the id of the record.

        Returns:
            ``nimg`` of the last event that is there, -1 for none; None if only the record tells.
        """

    @abstractmethod
    def flush(self) -> None:
        """Return when what was written is handed over."""

    @abstractmethod
    def summarize(self, values: Mapping[str, tuple[float, int]], status: Mapping[str, str]) -> None:
        """Show the results of a finished stage; may be called again with newer ones.

        Args:
            values: final metric values, and the images seen when each was measured.
            status: ``health``, ``stage``, ``guide`` and so on, in words.
        """


def group_of(run: Run) -> str | None:
    """What runs are grouped by unless an option says so: the study that they belong to."""
    return None if run.study is None else run.study.name
