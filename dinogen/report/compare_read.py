"""Reads the folders of runs for a comparison; one that failed is read as far as it went."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from dinogen.config_file import read_mapping
from dinogen.errors import UserError
from dinogen.report.compare_looks import Look, read_looks
from dinogen.report.compare_model import Run, finite, read_json, read_lines
from dinogen.report.compare_numbers import read_costs, read_measured
from dinogen.report.stats import read_stats, series

NOTES = ("step", "change", "failed", "next")


def find_runs(paths: Iterable[Path]) -> list[Path]:
    """Folders of runs: those given, and those below a given folder that is no run itself.

    Raises:
        UserError: a folder is missing, or holds no run.
    """
    found: list[Path] = []
    for path in paths:
        if (path / "config.yaml").is_file():
            found.append(path)
            continue
        if not path.is_dir():
            raise UserError(f"{path}: no such folder: give folders of runs, or one that holds some")
        # a study knows of runs that never came to a config.yaml of their own
        below = [path / name for name in _attempts(path)]
        for depth in ("*", "*/*"):
            below += sorted(config.parent for config in path.glob(f"{depth}/config.yaml"))
        if not below:
            raise UserError(f"{path}: no run here or below (no config.yaml): train one first")
        found += below
    return list(dict.fromkeys(found))


def read_runs(folders: Iterable[Path]) -> list[Run]:
    """The runs in the order given, each under the shortest name that no other has."""
    folders = list(dict.fromkeys(folders))
    parts = [folder.resolve().parts for folder in folders]
    depth = 1
    while depth < max(map(len, parts), default=1) and len({p[-depth:] for p in parts}) < len(parts):
        depth += 1
    return [
        _read_run(folder, "/".join(part[-depth:]).lstrip("/"))
        for folder, part in zip(folders, parts, strict=True)
    ]


def _read_run(folder: Path, name: str) -> Run:
    run = Run(folder, name)
    _read_attempts(run)
    _read_config(run)
    if not folder.is_dir():
        run.troubles.append("never begun: there is no such folder")
        return run
    stages = sorted(
        (int(path.name.partition("x")[0]), path)
        for path in folder.iterdir()
        if re.fullmatch(r"(\d+)x\1", path.name) and path.is_dir()
    )
    results = {}
    for resolution, path in stages:
        result = read_json(path / "result.json", run)
        if result is not None:
            results[resolution] = result
    planned = [stage.get("resolution") for stage in run.config.get("stages") or ()]
    if planned and planned[-1] in results:
        run.status = "finished"
    elif run.config:
        run.status = "unfinished" if stages else "not begun"
    if not stages:
        run.troubles.append("it ended before its first stage: no stage has a folder")
        return run
    run.resolution = max(results, default=stages[-1][0])
    main = folder / f"{run.resolution}x{run.resolution}"
    _read_losses(run, [path for _, path in stages])
    if not run.finished:
        _say_how_far(run, stages[-1][1])
    _read_checkpoint(run, main)
    if results:
        read_costs(run, results)
    read_measured(run, main)
    run.looks, troubles = read_looks(main, results.get(run.resolution))
    run.troubles += troubles
    real = (results.get(run.resolution, {}).get("files") or {}).get("real")
    if real and (main / real).is_file():
        run.real = Look("real", main / real, f"real pictures, {run.resolution}x{run.resolution}")
    return run


def _read_config(run: Run) -> None:
    path = run.folder / "config.yaml"
    if not path.is_file():
        # what a study would have started it with still tells its family and notes
        path = run.folder.parent.parent / "configs" / run.folder.parent.name / run.folder.name
        path = path.with_name(f"{path.name}.yaml")
        if not path.is_file():
            return
    run.config_sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    try:
        run.config_text = path.read_text(encoding="utf-8")
        run.config = read_mapping(path)
    except (UserError, ValueError) as error:
        run.troubles.append(f"config.yaml cannot be read: {error}")
        return
    run.family = str((run.config.get("family") or {}).get("name", "unknown"))
    run.seed = run.config.get("seed")
    data = run.config.get("data") or {}
    mix = [str(part.get("path")) for part in data.get("mix") or ()]
    run.data = " + ".join(mix) or data.get("path")
    notes = run.config.get("notes") or {}
    run.notes = {key: str(notes[key]) for key in NOTES if notes.get(key) is not None}


def _attempts(study: Path) -> dict[str, list[dict[str, Any]]]:
    """What `dinogen study` has tried in a folder, by run; nothing if it holds no study."""
    try:
        data = json.loads((study / "study.json").read_text(encoding="utf-8"))
        return {str(name): list(tried) for name, tried in data["runs"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def _read_attempts(run: Run) -> None:
    """What went wrong when a step of a run of a study was tried last, and where its log is."""
    folder = run.folder.absolute()
    tried = _attempts(folder.parent.parent).get(f"{folder.parent.name}/{folder.name}", [])
    newest = {one.get("step"): one for one in tried}
    for step, one in newest.items():
        if one.get("what"):
            run.troubles.append(f"{step}: {one['what']} (log: {one.get('log')})")


def _read_losses(run: Run, folders: list[Path]) -> None:
    """The loss over all stages; they count images on."""
    for folder in folders:
        lines = read_lines(run, folder / "stats.jsonl")
        kimg, loss = series(lines, "loss")
        run.loss = (run.loss[0] + kimg, run.loss[1] + loss)


def _say_how_far(run: Run, folder: Path) -> None:
    """Where a run without a result stands, for the list of what failed."""
    path = folder / "stats.jsonl"
    try:
        lines = read_stats(path)
    except UserError:
        run.troubles.append(f"stopped or still at work in stage {folder.name}: not a log line yet")
        return
    stages = run.config.get("stages") or ()
    lengths = [stage.get("kimg") for stage in stages]
    whole = f" of {sum(lengths):.4g}" if lengths and None not in lengths else ""
    run.troubles.append(
        f"stopped or still at work in stage {folder.name}: "
        f"{lines[-1]['nimg'] / 1000:.4g}{whole} thousand images, no result"
    )
    broken = 0
    for line in reversed(lines):
        if "loss" not in line or finite(line["loss"]) is not None:
            break
        broken += 1
    if broken:
        run.troubles.append(f"its last {broken} log lines hold no finite loss")


def _read_checkpoint(run: Run, stage: Path) -> None:
    """What the newest checkpoint knows of the data."""
    for path in sorted(stage.glob("checkpoints/*/state.json"), reverse=True):
        state = read_json(path, run)
        if state is not None:
            run.data_sha256 = state.get("data")
            return
