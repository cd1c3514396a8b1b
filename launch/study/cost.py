"""How long the runs of a study will take, at measured speeds."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dinogen.config import Config
from dinogen.errors import UserError
from dinogen.report.progress import rounded
from dinogen.runs.run import Run, Stage
from dinogen.runs.values import amount
from launch.study.runs import StudyRun
from shards.errors import ShardsError

_RECENT = 20  # log lines whose median stands for a stage that is not done


@dataclass(frozen=True)
class Speed:
    """The measured speed of a stage.

    Attributes:
        images_per_s: over all processes.
        where: folder of the stage, or budget.json.
        device: such as ``NVIDIA H100``; None if the stage is not done.
        num_processes: number of processes that shared the work; None if the stage is not done.
        same: whether it is from the same config, and not only the same family and resolution.
    """

    images_per_s: float
    where: Path
    device: str | None
    num_processes: int | None
    same: bool


@dataclass(frozen=True)
class Cost:
    """The training that is left of a run.

    Attributes:
        num_images: number of images; None if a length is in epochs and the data are not here.
        seconds: at the speeds found; None if there is none for a stage that is left.
        processor_s: ``seconds`` times the number of processes; None if that is unknown.
        speeds: the speeds that were used.
        why: what is not known; empty if everything is.
    """

    num_images: int | None
    seconds: float | None
    processor_s: float | None
    speeds: tuple[Speed, ...]
    why: str


NOTHING_LEFT = Cost(0, 0.0, 0.0, (), "")


def cost_of(run: StudyRun, others: Sequence[StudyRun]) -> Cost:
    """The training that is left of a run: the images left of each stage over its measured speed.

    A speed is the one that its length in minutes follows from. Of other runs it is taken from the
    run itself, or from one of the same config (another seed, or trained outside the study), or from
    one of the same family and resolution.

    Args:
        run: the run.
        others: runs whose speeds may be used.
    """
    if run.unmeasured and run.budget is not None:
        why = "its speed is not measured yet, so its time is the minutes that it is given"
        return Cost(None, run.budget.minutes * 60, None, (), why)
    config = with_known_lengths(run.config)
    if config is None:
        why = "its length is in epochs, and its data are not here"
        return Cost(None, None, None, (), why)
    start, num_left = 0, 0
    seconds: float | None = 0.0
    processor_s: float | None = 0.0
    speeds: list[Speed] = []
    unknown: list[str] = []
    for stage in Run.of(config).planned:
        end = start + stage.config.num_images
        seen = stage.nimg or start
        left = 0 if stage.done else max(0, end - seen)
        start = end
        num_left += left
        if not left:
            continue
        speed = _budget_speed(run, stage.name) or find_speed(run, stage.resolution, others)
        if speed is None:
            unknown.append(stage.name)
            continue
        speeds.append(speed)
        if seconds is not None:
            seconds += left / speed.images_per_s
        if processor_s is not None and speed.num_processes:
            processor_s += left / speed.images_per_s * speed.num_processes
        else:
            processor_s = None
    if unknown:
        why = f"no {config.family.name} was trained at {', '.join(unknown)} yet"
        return Cost(num_left, None, None, tuple(speeds), why)
    return Cost(num_left, seconds, processor_s, tuple(speeds), "")


def _budget_speed(run: StudyRun, stage: str) -> Speed | None:
    if run.budget is None or run.budget.measured is None:
        return None
    known = run.budget.measured
    speed = known.images_per_s.get(stage)
    if speed is None:  # its stages have changed since
        return None
    return Speed(speed, run.budget.file, known.device, known.num_processes, True)


def find_speed(run: StudyRun, resolution: int, others: Sequence[StudyRun]) -> Speed | None:
    """The nearest measured speed of a stage; None if there is none."""
    alike = [one for one in others if one.source == run.source]
    family = run.config.family.name
    relatives = [one for one in others if one.config.family.name == family]
    own = [run.folder, *(one.folder for one in alike), run.outside]
    rest = [one for other in relatives for one in (other.folder, other.outside)]
    for same, folders in ((True, own), (False, rest)):
        for folder in dict.fromkeys(folders):
            speed = stage_speed(Run(folder).stage(resolution), family, same)
            if speed is not None:
                return speed
    return None


def stage_speed(stage: Stage, family: str, same: bool) -> Speed | None:
    """The speed in a stage's files; None if there is none, or they are of another family.

    Args:
        stage: of any run.
        family: what the run should be.
        same: see :class:`Speed`.
    """
    result = stage.result
    if result is None:
        return _read_log(stage, same)
    speed = result.get("images_per_s")
    if result.get("family") != family or not speed:
        return None
    return Speed(float(speed), stage.folder, result.get("device"), result.get("world_size"), same)


def _read_log(stage: Stage, same: bool) -> Speed | None:
    lines = stage.read_stats({"images_per_s": amount}).value[-_RECENT:]
    found = [line["images_per_s"] for line in lines if line.get("images_per_s")]
    return Speed(statistics.median(found), stage.folder, None, None, same) if found else None


def with_known_lengths(config: Config) -> Config | None:
    """The config with lengths in images; None if they are in epochs and the data are not here."""
    if all(stage.kimg is not None for stage in config.stages):
        return config
    paths = [one.path for one in config.data.mix] or [config.data.path]
    if any("://" in path for path in paths):
        return None  # reading it would download it
    from dinogen.config import with_lengths
    from dinogen.training.data import open_data

    try:
        return with_lengths(config, open_data(config).num_samples(config.data.split))
    except (UserError, ShardsError, OSError):
        return None


def duration(seconds: float) -> str:
    """Seconds in a readable unit: ``40 s``, ``12 min``, ``3.5 h``, ``2.1 days``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    for size, most, unit in ((60, 5400, "min"), (3600, 172_800, "h")):
        if seconds < most:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds / 86_400:.3g} days"


def speed_words(speeds: Sequence[Speed]) -> str:
    """The measured speeds behind a time, and where they come from."""
    return "; ".join(
        f"{rounded(one.images_per_s, 3)}/s"
        + (f" on {one.num_processes}x {one.device}" if one.device else "")
        + f" in {one.where}"
        + ("" if one.same else " (another config of the family)")
        for one in speeds
    )
