"""What ``dinogen launch`` was asked for, on any place, and which stages are meant."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from dinogen.config import Config
from dinogen.errors import UserError


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
        metric: of a study: a metric value that the evaluation has to hold, or it is made again;
            images
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


def choose_stages(config: Config, text: str | None) -> list[int]:
    """Resolutions of the stages that ``text`` names, in their order; all of them for None.

    Args:
        config: the whole run.
        text: one resolution (``8``), or the first and the last of a range (``4..64``).

    Raises:
        UserError: no such stage, or not written like that.
    """
    sizes = [stage.resolution for stage in config.stages]
    if text is None:
        return sizes
    first, dots, last = text.partition("..")
    if not first.isdigit() or (dots and not last.isdigit()):
        raise UserError(f"stages '{text}': write one resolution, such as 8, or a range, as 4..64")
    low, high = int(first), int(last or first)
    for size in (low, high):
        if size not in sizes:
            raise UserError(f"stage {size} is not in the config: stages are {sizes}")
    if low > high:
        raise UserError(f"stages '{text}': write the smaller one first, as {high}..{low}")
    return [size for size in sizes if low <= size <= high]
