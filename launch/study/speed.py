"""The speed of a config: a short run of it in a process of its own, which is thrown away."""

from __future__ import annotations

import math
import statistics
import time
from dataclasses import replace
from itertools import pairwise

from dinogen.config import StageConfig
from dinogen.config.training import EvalConfig, LogConfig
from dinogen.errors import UserError
from dinogen.runs.run import Stage
from dinogen.runs.values import amount
from launch.study.budget import Measured, fingerprint, read_budgets, stage_shares, total_kimg
from launch.study.plan import Study
from launch.study.runs import StudyRun

# Folder of the study where these runs are, until they are removed: no track can have its name.
SPEED = ".speed"
# Regularisers come every 16th step at the latest: so long a line holds each of them once.
_LINE_STEPS = 16
_FEWEST_LINES = 3  # of each stage; the first warms up
_MOST_LINES = 200
# Seconds of steps that a speed is taken from: with fewer it is measured again, over more steps.
_LEAST_S, _WANTED_S = 2.0, 4.0


def short_run(study: Study, run: StudyRun, num_lines: int = _FEWEST_LINES) -> StudyRun:
    """The same config, some steps of each stage, without measuring and drawing.

    Args:
        study: the study.
        run: any run of the config.
        num_lines: log lines of each stage, of 16 steps of the largest batch.
    """
    assert run.budget is not None
    run_id = f"{SPEED}/{run.budget.key}"
    largest = max(stage.batch for stage in run.config.stages)
    every = _LINE_STEPS * largest / 1000
    stages = tuple(_short(stage, every * num_lines) for stage in run.config.stages)
    never = 1e9
    log = LogConfig(every_kimg=every, probe_kimg=never, samples_kimg=never, num_samples=1)
    changes = {
        "run": study.folder / run_id,
        "stages": stages,
        "eval": EvalConfig(),
        "log": log,
        "logging": (),
        "checkpoint": run.config.checkpoint.model_copy(update={"every_kimg": never}),
    }
    config = run.config.model_copy(update=changes)
    return replace(run, id=run_id, config=config, budget=None)


def _short(stage: StageConfig, kimg: float) -> StageConfig:
    """A stage of another length, of which as much fades in.

    The learning rate rises throughout: at its full height the first updates may not be finite.
    """
    share = stage.fade_kimg / stage.kimg if stage.kimg else 0.0
    lengths = {
        "kimg": kimg,
        "epochs": None,
        "fade_kimg": share * kimg,
        "warmup_kimg": kimg,
        "decay_kimg": 0.0,
    }
    return stage.model_copy(update=lengths)


def add_speed(study: Study, short: StudyRun, run: StudyRun) -> str:
    """Write the speed of a short run, and the images that follow from it, into budget.json.

    Args:
        study: the study.
        short: see :func:`short_run`; it has ended.
        run: the run that it stands for.

    Returns:
        What was measured, in words.

    Raises:
        UserError: a stage has too few log lines.
    """
    assert run.budget is not None
    minutes, config = run.budget.minutes, run.config
    speeds = {stage.name: stage_speed(stage) for stage in short.stages}
    shares = stage_shares(config, str(run.source))
    result = short.stages[-1].result or {}
    measured = Measured(
        minutes=minutes,
        kimg=total_kimg(minutes, shares, list(speeds.values())),
        images_per_s={name: round(one, 3) for name, one in speeds.items()},
        device=str(result.get("device")),
        num_processes=int(result.get("world_size") or 1),
        config=fingerprint(config),
        when=time.strftime("%Y-%m-%d %H:%M:%S"),
    )
    read_budgets(study.folder).add(run.budget.key, measured)
    return measured.words


def lines_wanted(short: StudyRun) -> int | None:
    """Log lines that a second short run needs, where the first was too fast to be timed.

    Args:
        short: see :func:`short_run`; it has ended.

    Returns:
        None if it took long enough.

    Raises:
        UserError: a stage has too few log lines.
    """
    took = [_times(stage) for stage in short.stages]
    least = min(times[-1][1] - times[0][1] for times in took)
    if least >= _LEAST_S:
        return None
    num_timed = min(len(times) for times in took) - 1
    return min(_MOST_LINES, 1 + math.ceil(num_timed * _WANTED_S / max(least, 1e-9)))


def stage_speed(stage: Stage) -> float:
    """Images per second of the steps of a stage, without those that warm up.

    The median over the log lines: what else the machine does for a moment does not count.

    Raises:
        UserError: there are fewer than three lines.
    """
    speeds = [
        (nimg - before) / max(seconds - start, 1e-9)
        for (before, start), (nimg, seconds) in pairwise(_times(stage))
    ]
    return float(statistics.median(speeds))


def _times(stage: Stage) -> list[tuple[int, float]]:
    """Images, and the seconds that their steps took, of each log line."""
    lines = stage.read_stats({"training_s": amount}).value
    times = [(one["nimg"], one["training_s"]) for one in lines if one.get("training_s") is not None]
    if len(times) < _FEWEST_LINES:
        raise UserError(f"{stage.stats_file}: holds too few log lines to measure a speed")
    return times
