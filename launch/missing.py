"""Makes what a comparison would lack: figures and pictures of runs that are done."""

from __future__ import annotations

import logging
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from dinogen.config import Config, StageConfig, load_config
from dinogen.errors import UserError
from dinogen.report.compare_columns import MEASURED
from launch.progress import figure_of, is_looked, stage_result

log = logging.getLogger(__name__)


def make_missing(
    folders: Sequence[Path], metrics: str | None = None, changes: Sequence[str] = ()
) -> list[str]:
    """Give `dinogen evaluate` and `dinogen look` for each run whose end lacks theirs.

    Each is a process of its own, so that one that fails costs the others nothing.

    Args:
        folders: of the runs.
        metrics: names, comma separated; a run that lacks a value of one is measured again. If
            not given, a run is measured if none of its metrics ever was.
        changes: ``KEY=VALUE`` for evaluate.

    Returns:
        What failed, a line each.
    """
    problems = []
    for folder in folders:
        for words in _lacking(folder, metrics, changes):
            log.info("dinogen %s", shlex.join(words))
            code = subprocess.run(
                [sys.executable, "-m", "launch.cli", *words], check=False
            ).returncode
            if code:
                problems.append(f"dinogen {shlex.join(words)}: exit code {code}")
    return problems


def last_done(folder: Path) -> tuple[Config, StageConfig] | None:
    """The config of a run and its largest stage that is done; None if there is none."""
    try:
        config = load_config(folder / "config.yaml").model_copy(update={"run": folder})
    except UserError as error:
        log.warning("%s", error)
        return None
    done = [stage for stage in config.stages if stage_result(config, stage) is not None]
    return (config, done[-1]) if done else None


def _lacking(folder: Path, metrics: str | None, changes: Sequence[str]) -> list[list[str]]:
    """Commands that a run lacks; none if no stage of it is done."""
    found = last_done(folder)
    if found is None:
        return []
    config, stage = found
    where = [str(folder), "--stage", str(stage.resolution)]
    commands = []
    if not _is_measured(config, stage, metrics):
        chosen = ["--metrics", metrics] if metrics else []
        commands.append(["evaluate", *where, *chosen, *changes])
    if not is_looked(config, stage):
        commands.append(["look", *where])
    return commands


def _is_measured(config: Config, stage: StageConfig, metrics: str | None) -> bool:
    if metrics is None:
        names = [name for _, names in MEASURED for name, _ in names]
        return any(figure_of(config, stage, name) is not None for name in names)
    figures = [figure_of(config, stage, name.strip()) for name in metrics.split(",")]
    return all(one is not None and one.get("value") is not None for one in figures)
