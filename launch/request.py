"""What `dinogen launch` was asked for: the same for every place that it can start a run on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from dinogen.config import Config


@dataclass(frozen=True)
class Request:
    """A run to start.

    Attributes:
        path: the YAML file.
        overrides: ``KEY=VALUE`` changes, those of the options among them.
        config: both together.
        stages: as given, ``8`` or ``4..64``; None for all.
        num_processes: processes on this machine; None for one per GPU.
        max_restarts: how often failed processes are started again; None for the place's default.
        photos: folder of photos that the data are made of first; None if they are packed.
        dry_run: print what would be done, and do nothing.
        metric: of a study: a figure that the evaluation has to hold, or it is made anew; pictures
            to look at are made after it.
    """

    path: Path
    overrides: tuple[str, ...]
    config: Config
    stages: str | None = None
    num_processes: int | None = None
    max_restarts: int | None = None
    photos: Path | None = None
    dry_run: bool = False
    metric: str | None = None
