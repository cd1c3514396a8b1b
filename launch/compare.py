"""The runs that ``dinogen compare`` was given, and measuring and drawing what they lack."""

from __future__ import annotations

import json
import logging
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from dinogen import hub
from dinogen.config import Config, load_config, parse_config
from dinogen.errors import UserError
from dinogen.files import write_text
from dinogen.report.compare.read import find_runs, is_run
from dinogen.report.compare.table import MEASURED
from dinogen.runs.run import Run, Stage
from launch.study.plan import is_config_folder

log = logging.getLogger(__name__)


def run_pending_steps(
    folders: Sequence[Path], metrics: str | None = None, changes: Sequence[str] = ()
) -> list[str]:
    """Run `dinogen evaluate` and `dinogen look` for each run whose last stage lacks their results.

    Each is a process of its own, so that one that fails does not affect the others.

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


def last_done(folder: Path) -> Stage | None:
    """The largest stage of a run that is done; None if there is none, or no config."""
    try:
        return Run(folder).last_done
    except UserError as error:
        log.warning("%s", error)
        return None


def _lacking(folder: Path, metrics: str | None, changes: Sequence[str]) -> list[list[str]]:
    """Commands whose results a run lacks; none if no stage of it is done."""
    stage = last_done(folder)
    if stage is None:
        return []
    where = [str(folder), "--stage", str(stage.resolution)]
    commands = []
    if not _is_measured(stage, metrics):
        chosen = ["--metrics", metrics] if metrics else []
        commands.append(["evaluate", *where, *chosen, *changes])
    if not stage.visualized:
        commands.append(["look", *where])
    return commands


def _is_measured(stage: Stage, metrics: str | None) -> bool:
    if metrics is None:
        names = [name for _, names in MEASURED for name, _ in names]
        return any(stage.metric(name) is not None for name in names)
    metric_values = [stage.metric(name.strip()) for name in metrics.split(",")]
    return all(one is not None and one.get("value") is not None for one in metric_values)


@dataclass(frozen=True)
class Sweep:
    """Metric values of the kept checkpoints of a stage.

    Attributes:
        path: ``RUN/RxR/checkpoints.jsonl``, a line per checkpoint.
        num_lines: how many checkpoints are in it.
        problems: what failed, a line each.
    """

    path: Path
    num_lines: int
    problems: list[str]


def sweep_checkpoints(
    folder: Path, metrics: str, words: Sequence[str] = (), size: int | None = None
) -> Sweep | None:
    """Run `dinogen evaluate` for each kept checkpoint of a stage that is not measured yet.

    Args:
        folder: of the run.
        metrics: names, comma separated.
        words: further options of evaluate, and ``KEY=VALUE``.
        size: resolution of the stage; None for the last one that is done.

    Returns:
        What is known now; None if no stage is done.
    """
    stage = last_done(folder) if size is None else Run(folder).stage(size)
    if stage is None:
        return None
    names = {name.strip() for name in metrics.split(",")}
    problems = []
    lines = _read(stage)
    for nimg in stage.checkpoints.nimg:
        if names <= set(lines.get(nimg, {}).get("metrics", {})):
            continue
        options = ["--stage", str(stage.resolution), "--nimg", str(nimg), "--metrics", metrics]
        result = _evaluate(folder, stage, [*options, *words])
        if result is None:
            command = shlex.join(["dinogen", "evaluate", str(folder), *options, *words])
            problems.append(f"{command}: failed")
            continue
        old = lines.get(nimg, {"metrics": {}, "fingerprints": {}})
        lines[nimg] = {
            "nimg": nimg,
            "stage": stage.resolution,
            "metrics": old["metrics"] | (result.get("measured") or {}),
            "fingerprints": old["fingerprints"] | (result.get("fingerprints") or {}),
        }
        text = "".join(json.dumps(lines[key]) + "\n" for key in sorted(lines))
        write_text(stage.sweep_file, text)
    return Sweep(stage.sweep_file, len(lines), problems)


def _evaluate(run: Path, stage: Stage, words: Sequence[str]) -> dict[str, Any] | None:
    """The result of evaluate for a checkpoint; None if it fails.

    evaluate writes next to the checkpoints, where the metric values of the run's end have to stay.
    So it gets a temporary folder with a link to them.
    """
    with TemporaryDirectory() as name:
        borrowed = Run(name).stage(stage.resolution)
        place = borrowed.run.path
        shutil.copy(stage.run.config_file, borrowed.run.config_file)
        borrowed.folder.mkdir()
        borrowed.checkpoints.folder.symlink_to(stage.checkpoints.folder.absolute())
        log.info("dinogen evaluate %s %s", run, shlex.join(words))
        command = [sys.executable, "-m", "launch.cli", "evaluate", str(place), *words]
        if subprocess.run(command, check=False).returncode:
            return None
        found = borrowed.read_evaluation()
        for problem in found.messages():
            log.warning("%s", problem)
        # the commands in it name the temporary folder
        text = json.dumps(found.value).replace(str(place), str(run))
        written: dict[str, Any] | None = json.loads(text)
        return written


def _read(stage: Stage) -> dict[int, dict[str, Any]]:
    """The sound lines that exist already, by their images."""
    found = stage.read_sweep()
    for problem in found.messages():
        log.warning("%s", problem)
    return {line["nimg"]: {"fingerprints": {}} | line for line in found.value}


_KEY = re.compile(r"[A-Za-z_]\w*(\.\w+)*")


def sort_words(words: Sequence[str]) -> tuple[list[Path], list[str]]:
    """Paths, and ``KEY=VALUE`` changes for evaluate.

    A word that exists is a path, even if it contains a "=". Any other word is a change only if its
    key is a key of a config, so that a mistyped path is an error.

    Raises:
        UserError: a word is neither, or a config cannot take a change.
    """
    paths, changes = [], []
    for word in words:
        key, found, _ = word.partition("=")
        if hub.is_address(word):
            paths.append(_run_on_hub(word))
        elif os.path.lexists(word):
            paths.append(Path(word))
        elif found and _KEY.fullmatch(key) and key.partition(".")[0] in Config.model_fields:
            changes.append(word)
        elif found and "/" not in key:
            raise UserError(
                f"{word}: no such folder, and {key!r} is not a key of a config: give a folder that "
                "exists, or a change such as metrics.num_samples=10000"
            )
        else:
            raise UserError(f"{word}: no such folder: give folders of runs, or one that holds some")
    parse_config({}, changes, source="KEY=VALUE")
    return paths, changes


def _run_on_hub(word: str) -> Path:
    """The run that an address stands for, as a folder.

    Raises:
        UserError: it stands for a file, which has no curves to compare.
    """
    found = hub.working_path(word)
    if found.is_file():
        raise UserError(
            f"{word}: holds one exported generator; compare takes runs, with their stages: give "
            f"the run, or measure it alone: dinogen evaluate {word}"
        )
    return found


def folders_of(paths: Sequence[Path]) -> tuple[list[Path], list[str]]:
    """The folders of all runs that some paths stand for, each once, and the problems.

    Raises:
        UserError: no path holds a run.
    """
    folders: list[Path] = []
    problems: list[str] = []
    lost: list[UserError] = []
    for path in paths:
        if not is_run(path) and path.is_dir() and is_config_folder(path):
            for file in sorted(path.glob("*.yaml")):
                try:
                    folders.append(load_config(file).run)
                except UserError as error:
                    problems.append(f"{error}\n{file}: its run is left out")
            continue
        try:
            folders += find_runs([path])
        except UserError as error:  # it exists, but is not a run: it is listed as damaged
            lost.append(error)
            folders.append(path)
    if len(folders) == len(lost):
        raise UserError("\n".join([*problems, *map(str, lost)]))
    return list(dict.fromkeys(folders)), problems
