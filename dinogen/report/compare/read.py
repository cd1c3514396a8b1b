"""Reads the folders of runs for a comparison; of a failed run, what there is."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from dinogen.errors import UserError
from dinogen.report.compare.model import (
    ComparedRun,
    Number,
    Source,
    Visualization,
    find_visualizations,
    take,
)
from dinogen.report.compare.table import MEASURED
from dinogen.runs.files import read_config, read_raw, read_text, series, study_runs
from dinogen.runs.layout import CONFIG, EVALUATION, METRICS, RESULT, stage_name
from dinogen.runs.run import Run, Stage
from dinogen.runs.values import caution_of, finite

log = logging.getLogger(__name__)

NOTES = ("step", "change", "failed", "next")


def is_run(path: Path) -> bool:
    """Whether a folder is a run: it has a config, or stages if the config is lost."""
    return os.path.lexists(path / CONFIG) or bool(Run(path).begun)


def find_runs(paths: Iterable[Path]) -> list[Path]:
    """Folders of runs: those given, and those inside a given folder that is not a run.

    If some paths hold runs, a path that holds none counts as a lost run, and is listed as such.

    Raises:
        UserError: a path does not exist, or no path holds a run.
    """
    found: list[Path] = []
    lost: list[Path] = []
    for path in paths:
        if path.name == CONFIG and path.is_file():
            path = path.parent
        if is_run(path):
            found.append(path)
            continue
        if not os.path.lexists(path):
            raise UserError(f"{path}: no such folder: give folders of runs, or one that holds some")
        # a study also lists runs that ended before they wrote a config.yaml
        below = list(study_runs(path))
        below += [one for one in _folders_below(path) if is_run(one)]
        if not below:
            lost.append(path)
        found += below or [path]
    if lost and len(lost) == len(found):
        raise UserError(f"{lost[0]}: no run here or below (no {CONFIG}): train one first")
    return list(dict.fromkeys(found))


def _folders_below(path: Path) -> list[Path]:
    """The folders one and two levels below, sorted; an unreadable one counts as empty."""
    found: list[Path] = []
    level = [path]
    for _ in range(2):
        following = []
        for folder in level:
            try:
                following += sorted(one for one in folder.iterdir() if one.is_dir())
            except OSError as error:
                log.warning("%s: cannot be read: %s", folder, error.strerror)
        found += following
        level = following
    return found


def read_runs(folders: Iterable[Path]) -> list[ComparedRun]:
    """The runs in the order given, each with the shortest unique name."""
    folders = list(dict.fromkeys(folders))
    parts = [folder.resolve().parts for folder in folders]
    depth = 1
    while depth < max(map(len, parts), default=1) and len({p[-depth:] for p in parts}) < len(parts):
        depth += 1
    return [
        _read_run(folder, _printable("/".join(part[-depth:]).lstrip("/")))
        for folder, part in zip(folders, parts, strict=True)
    ]


def _printable(name: str) -> str:
    """A name that can be written as UTF-8: the name of a folder may be any bytes."""
    return name.encode("utf-8", "replace").decode("utf-8")


def _read_run(folder: Path, name: str) -> ComparedRun:
    """One run; what is wrong with its files only affects this run."""
    run = ComparedRun(folder, name)
    try:
        _read_files(run)
    except Exception as error:  # a bug of ours must not cost the other runs their page
        log.exception("%s: cannot be read", folder)
        run.status = "damaged"
        run.damage.append(f"cannot be read: {type(error).__name__}: {error}")
        run.problems.append(run.damage[-1])
    return run


def _read_files(run: ComparedRun) -> None:
    folder = run.folder
    if Run(folder).study is not None:
        run.track = folder.absolute().parent
    _read_attempts(run)
    _read_config(run)
    if not folder.is_dir():
        _say_not_begun(run)
        return
    stages = take(run, Run(folder).read_stages())
    results = {}
    for stage in stages:
        result = take(run, stage.read_result())
        if result is not None:
            results[stage.resolution] = result
    planned = [stage.get("resolution") for stage in run.config.get("stages") or ()]
    if planned and planned[-1] in results:
        run.status = "finished"
    elif run.config:
        run.status = "unfinished" if stages else "not begun"
    elif stages:
        run.status = "damaged"
    if not stages:
        run.problems.append("it ended before its first stage: no stage has a folder")
        return
    run.resolution = max(results, default=stages[-1].resolution)
    main = next(stage for stage in stages if stage.resolution == run.resolution)
    _read_losses(run, stages)
    if not run.finished and not (run.status == "damaged" and stages[-1].resolution in results):
        _say_how_far(run, stages[-1])
    _read_checkpoint(run, main)
    if results:
        read_costs(run, results)
    read_measured(run, main)
    index, run.visualizations, problems = find_visualizations(main, results.get(run.resolution))
    take(run, index)
    run.problems += problems
    real = (results.get(run.resolution, {}).get("files") or {}).get("real")
    if real and (main.folder / real).is_file():
        run.real = Visualization("real", main.folder / real, f"real images, {main.name}")


def _say_not_begun(run: ComparedRun) -> None:
    """There is no folder: it was never created, or something else has its name."""
    if os.path.lexists(run.folder):
        run.status = "damaged"
        run.damage.append("not a folder, but a file or a broken link")
        run.problems.append(run.damage[-1])
    else:
        run.problems.append("never begun: there is no such folder")


def _read_config(run: ComparedRun) -> None:
    path = run.folder / CONFIG
    if not os.path.lexists(path):
        # the config that the study would have used still has its family and notes
        copy = run.folder.parent.parent / "configs" / run.folder.parent.name / run.folder.name
        path = copy.with_name(f"{copy.name}.yaml")
        if not path.is_file():
            if run.folder.is_dir():
                run.damage.append(f"{CONFIG} is missing")
                run.problems.append(run.damage[-1])
            return
    raw = read_raw(path)
    if raw.value:
        run.config_sha256 = hashlib.sha256(raw.value).hexdigest()
    run.config_text = _printable(read_text(path).value.replace("\0", "\ufffd"))
    found = read_config(path)
    run.config = take(run, found)
    if not run.config and not found.problems:
        run.damage.append(f"{CONFIG} is empty")
        run.problems.append(run.damage[-1])
    run.family = (run.config.get("family") or {}).get("name") or "unknown"
    run.seed = run.config.get("seed")
    data = run.config.get("data") or {}
    mix = [str(part.get("path")) for part in data.get("mix") or ()]
    run.data = " + ".join(mix) or data.get("path")
    notes = run.config.get("notes") or {}
    run.notes = {key: notes[key] for key in NOTES if notes.get(key) is not None}


def _read_attempts(run: ComparedRun) -> None:
    """The error of the last attempt at each step of a study, and its log.

    A run may be in the folder of its study, or below the folder that holds ``study-NAME``.
    """
    folder = run.folder.absolute()
    beside = [study for above in folder.parents[:3] for study in above.glob("study-*")]
    for study in dict.fromkeys([folder.parent.parent, *beside]):
        tried = study_runs(study).get(folder, [])
        newest: dict[Any, dict[str, Any]] = {one.get("step"): one for one in tried}
        for step, one in newest.items():
            if one.get("what"):
                run.problems.append(f"{step}: {one['what']} (log: {one.get('log')})")


def _read_losses(run: ComparedRun, stages: list[Stage]) -> None:
    """The loss and the time over all stages, which continue the count of images."""
    timed = True
    for stage in stages:
        found = stage.read_stats()
        lines = take(run, found)
        if found.there and not lines and read_raw(found.path).value:
            run.damage.append(f"{stage.name}/{found.path.name}: holds no line of statistics")
            run.problems.append(run.damage[-1])
        kimg, loss = series(lines, "loss")
        run.loss = (run.loss[0] + kimg, run.loss[1] + loss)
        before = run.times[1][-1] if run.times[1] else 0.0
        kimg, seconds = series(lines, "training_s")
        if not kimg or len(kimg) < len(lines):  # an earlier version wrote some of the lines
            timed = False
        run.times = (run.times[0] + kimg, run.times[1] + [before + one for one in seconds])
    if not timed:
        run.times = ([], [])


def _say_how_far(run: ComparedRun, stage: Stage) -> None:
    """The progress of a run without a result, for the list of failures."""
    lines = stage.stats
    if not lines:
        run.problems.append(f"stopped or still running in stage {stage.name}: no log line yet")
        return
    lengths = [planned.get("kimg") for planned in run.config.get("stages") or ()]
    whole = f" of {sum(lengths):.4g}" if lengths and None not in lengths else ""
    run.problems.append(
        f"stopped or still running in stage {stage.name}: "
        f"{lines[-1]['nimg'] / 1000:.4g}{whole} thousand images, no result"
    )
    broken = 0
    for line in reversed(lines):
        if "loss" not in line or finite(line["loss"]) is not None:
            break
        broken += 1
    if broken:
        run.problems.append(f"its last {broken} log lines have no finite loss")


def _read_checkpoint(run: ComparedRun, stage: Stage) -> None:
    """The data fingerprint in the newest checkpoint."""
    for found in stage.checkpoints.iter_states():
        state = take(run, found)
        if state is not None:
            run.data_sha256 = state.get("data")
            return


PROMPTED = {name for group, names in MEASURED if group == "Prompts" for name, _ in names}


def read_costs(run: ComparedRun, results: dict[int, dict[str, Any]]) -> None:
    """Numbers of training: summed over stages where that makes sense."""
    last = results[max(results)]
    run.facts = last
    run.sources["training"] = Source(
        f"{stage_name(max(results))}/{RESULT}",
        f"dinogen train {run.folder / CONFIG}",
        last.get("nimg"),
        last.get("versions") or {},
        last.get("device"),
    )
    parts = list(results.values())
    seconds = [finite(one.get("seconds")) for one in parts]
    hours = [
        (one or 0.0) * (part.get("world_size") or 1) / 3600
        for one, part in zip(seconds, parts, strict=True)
    ]
    memory = [m for part in parts if (m := finite(part.get("peak_memory_mb"))) is not None]
    kind = "cpu_hours" if last.get("device") == "cpu" else "gpu_hours"
    steps = [finite(one.get("training_s")) for one in parts]
    costs: dict[str, float | None] = {
        "num_parameters": finite(last.get("num_parameters")),
        "nimg": finite(last.get("nimg")),
        "seconds": None if None in seconds else sum(one or 0.0 for one in seconds),
        "training_s": None if None in steps else sum(one or 0.0 for one in steps),
        kind: None if None in seconds else sum(hours),
        "peak_memory_mb": max(memory, default=None),
        "training_images_per_s": finite(last.get("images_per_s")),
    }
    for name, value in costs.items():
        run.numbers[name] = Number(name, value, "training")
    health = last.get("health") or "unknown"
    if health != "ok":
        said = " ".join(last.get("warnings") or ())
        run.problems.append(said if said.startswith(health) else f"{health}: {said}")
    if last.get("num_skipped"):
        run.problems.append(f"{last['num_skipped']} damaged samples were replaced")


def read_measured(run: ComparedRun, stage: Stage) -> None:
    """Metric values of `dinogen evaluate`; those it lacks, as last measured in training."""
    trained = run.facts.get("nimg")
    in_training = take(run, stage.read_metrics())
    run.measured = take(run, stage.read_sweep()) or in_training
    for line in run.measured:
        run.fingerprints |= line.get("fingerprints") or {}
        for name, one in line["metrics"].items():
            if one is not None:
                one["caution"] = _caution(name, one)
    if in_training:
        newest = in_training[-1]
        run.fingerprints |= newest.get("fingerprints") or {}
        run.sources["in_training"] = Source(
            f"{stage.name}/{METRICS}",
            f"dinogen train {run.folder / CONFIG}",
            newest["nimg"],
            run.facts.get("versions") or {},
            run.facts.get("device"),
        )
        _add_values(run, newest["metrics"], "in_training")
    evaluation = stage.read_evaluation()
    found = take(run, evaluation)
    if found is None:
        if run.facts and not evaluation.there:
            run.problems.append(f"never measured: dinogen evaluate {run.folder}")
        return
    run.sources["evaluation"] = Source(
        f"{stage.name}/{EVALUATION}",
        found.get("command") or f"dinogen evaluate {run.folder}",
        found.get("nimg"),
        found.get("versions") or {},
        found.get("device"),
    )
    run.fingerprints |= found.get("fingerprints") or {}
    _add_values(run, found.get("measured") or {}, "evaluation")
    speed = found.get("sampling") or {}
    run.numbers["sampling_images_per_s"] = Number(
        "sampling_images_per_s",
        finite(speed.get("images_per_s")),
        "evaluation",
        better="higher",
        num_samples=speed.get("num"),
    )
    for name, value in (found.get("metrics") or {}).items():
        run.others[name] = Number(
            name, finite(value), "evaluation", num_samples=found.get("num_samples")
        )
    if trained is not None and found.get("nimg") not in (None, trained):
        run.problems.append(
            f"measured at {found['nimg']:,} images, but trained to {trained:,}: evaluate it again"
        )


def _add_values(run: ComparedRun, values: dict[str, Any], source: str) -> None:
    """Add metric values by name; one with a value is not replaced by one without."""
    for name, one in values.items():
        if one is None:
            continue
        number = Number(
            name=name,
            value=one.get("value"),
            source=_source_of(run, source, one.get("command")),
            better=one.get("better") or "none",
            spread=one.get("spread"),
            num_samples=one.get("num_samples"),
            num_reference=one.get("num_reference"),
            fingerprint=one.get("fingerprint"),
            alike=run.alike(one),
            reason=one.get("reason"),
            caution=_caution(name, one),
        )
        if number.value is not None or name not in run.numbers:
            run.numbers[name] = number


def _caution(name: str, one: dict[str, Any]) -> str | None:
    """The caution in the file; for files of earlier versions it follows from the counts."""
    if one.get("value") is None or "caution" in one:
        return one.get("caution")
    # for prompts, num_reference is the number of prompts
    num_real = None if name in PROMPTED else one.get("num_reference")
    return caution_of(one.get("num_samples"), num_real)


def _source_of(run: ComparedRun, key: str, command: str | None) -> str:
    """The source of a value: an evaluation keeps the values of earlier commands."""
    if command is None or command == run.sources[key].command:
        return key
    number = 2
    while (name := f"{key}_{number}") in run.sources and run.sources[name].command != command:
        number += 1
    run.sources[name] = replace(run.sources[key], command=command)
    return name
