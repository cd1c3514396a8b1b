"""A run to start, on this machine or by SLURM, with the options of ``dinogen launch``."""

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
        overrides: ``KEY=VALUE`` changes, including those that options stand for.
        config: the file with these changes.
        stages: as on the command line, ``8`` or ``4..64``; None for all.
        num_processes: number of processes on this machine; None for one per GPU.
        max_restarts: how often failed processes are started again; None for the default.
        photos: folder of photos to make the data from first; None if the data are packed.
        dry_run: print what would be done, and do nothing.
        unchecked: start without looking at data, weights and ranks first.
        metric: decides in a study: the evaluation is repeated until it has this metric, and is
            followed by visualizations; None outside of studies.
    """

    path: Path
    overrides: tuple[str, ...]
    config: Config
    stages: str | None = None
    num_processes: int | None = None
    max_restarts: int | None = None
    photos: Path | None = None
    dry_run: bool = False
    unchecked: bool = False
    metric: str | None = None


def choose_stages(config: Config, text: str | None) -> list[int]:
    """Resolutions of the stages that ``text`` names, in order; all of them for None.

    Args:
        config: the whole run.
        text: one resolution (``8``), or the first and the last of a range (``4..64``).

    Raises:
        UserError: there is no such stage, or ``text`` has another form.
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
