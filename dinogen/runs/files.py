"""Reads every file of a run: what is valid in it, and what is wrong with the rest.

Files of a run can be damaged by kills, full disks, editors, and other versions. All code reads them
here. No function raises because of a file's content: it returns values of the documented types, and
messages about everything else.
"""

from __future__ import annotations

import logging
import math
import os
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from dinogen.config.base import read_mapping
from dinogen.errors import UserError
from dinogen.runs.layout import STUDY, stage_resolution
from dinogen.runs.values import (
    MAX_VALUES,
    Kind,
    Partly,
    amount,
    byte_of,
    checked,
    count,
    each,
    finite,
    flag,
    keys_of,
    list_of,
    number,
    parse_object,
    plain,
    section,
    short,
    text_of,
    with_new_keys,
    word,
)

T = TypeVar("T")
Line = dict[str, Any]

# larger than any file that dinogen writes in a run
MAX_BYTES = 256 << 20
_MAX_SAID = 3  # damaged lines that are listed individually


@dataclass(frozen=True)
class Found(Generic[T]):
    """What was read from one file.

    Attributes:
        path: the file.
        value: the valid part; empty if the file is missing or not readable.
        problems: what is wrong with it; each continues the name of the file.
        there: whether the path exists.
    """

    path: Path
    value: T
    problems: tuple[str, ...] = ()
    there: bool = True

    def messages(self, root: Path | None = None) -> list[str]:
        """The problems, each with the name of the file, relative to ``root`` if inside it."""
        name = self.path
        if root is not None and name.is_relative_to(root):
            name = name.relative_to(root)
        return [f"{name}{problem}" for problem in self.problems]


# ---- files ---------------------------------------------------------------------------------------


def read_raw(path: Path) -> Found[bytes]:
    """The bytes of a file; a pipe, folder or device is a problem, and is not waited for."""
    try:
        about = path.stat()
        if not stat.S_ISREG(about.st_mode):
            what = "a folder" if stat.S_ISDIR(about.st_mode) else "not a regular file"
            return Found(path, b"", (f" cannot be read: it is {what}",))
        if about.st_size > MAX_BYTES:
            return Found(path, b"", (f" cannot be read: it has {about.st_size >> 20} MiB",))
        return Found(path, path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return Found(path, b"", there=False)
    except OSError as error:
        return Found(path, b"", (f" cannot be read: {error.strerror or error}",))
    except ValueError as error:  # a zero byte in the path
        return Found(path, b"", (f" cannot be read: {error}",))


def read_text(path: Path) -> Found[str]:
    """A file as UTF-8 text; invalid bytes become U+FFFD, and are a problem."""
    raw = read_raw(path)
    if raw.problems or not raw.there:
        return Found(path, "", raw.problems, raw.there)
    try:
        return Found(path, raw.value.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        text = raw.value.decode("utf-8", "replace")
        return Found(path, text, (f" is not UTF-8 text: byte {error.start} is {byte_of(error)}",))


def read_object(path: Path) -> Found[dict[str, Any] | None]:
    """The JSON object in a file; None without one."""
    raw = read_raw(path)
    if raw.problems or not raw.there:
        return Found(path, None, raw.problems, raw.there)
    try:
        return Found(path, with_new_keys(parse_object(raw.value)))
    except ValueError as error:
        return Found(path, None, (f" cannot be read: {error}",))


def read_lines(path: Path, kinds: Mapping[str, Kind] | None = None) -> Found[list[Line]]:
    """The valid lines of a file with one JSON object per line, by ascending ``nimg``.

    A run that was killed and resumed may have logged the same images twice: the later lines
    replace everything from there on.

    Args:
        path: the file.
        kinds: kinds of further keys, see :func:`checked`; ``nimg`` is always a whole number.
    """
    raw = read_raw(path)
    lines: list[Line] = []
    bad: list[str] = []
    for place, row in enumerate(raw.value.splitlines(), start=1):
        try:
            line = parse_object(row)
            if "nimg" not in line:
                raise ValueError("nimg is missing")
            nimg = count(line["nimg"])
        except ValueError as error:
            bad.append(f"line {place} is left out: {error}")
            continue
        line, problems = checked(line | {"nimg": nimg}, kinds or {})
        bad += [f"line {place}: {problem}" for problem in problems]
        while lines and lines[-1]["nimg"] >= nimg:
            lines.pop()
        lines.append(line)
    said = [f": {one}" for one in bad[:_MAX_SAID]]
    if len(bad) > _MAX_SAID:
        said.append(f": {len(bad) - _MAX_SAID} more lines are damaged")
    return Found(path, lines, (*raw.problems, *said), raw.there)


def line_nimg(row: bytes) -> float:
    """``nimg`` of a line of a ``*.jsonl``; infinite where the line is damaged or was cut off."""
    try:
        return count(parse_object(row).get("nimg"))
    except ValueError:
        return math.inf


def stage_folders(run: Path) -> Found[list[tuple[int, Path]]]:
    """``(resolution, folder)`` of the stages of a run that have begun, smallest first."""
    found = []
    try:
        for path in run.iterdir():
            resolution = stage_resolution(path.name)
            if resolution is not None and path.is_dir():
                found.append((resolution, path))
    except (FileNotFoundError, NotADirectoryError):
        return Found(run, [], there=False)
    except OSError as error:
        return Found(run, [], (f" cannot be read: {error.strerror or error}",))
    return Found(run, sorted(found))


# ---- contents of each file -----------------------------------------------------------------------


def read_result(path: Path) -> Found[dict[str, Any] | None]:
    """result.json of a stage: its results, and the names of its images."""
    return _checked(read_object(path), _RESULT, needs=("nimg",))


def read_evaluation(path: Path) -> Found[dict[str, Any] | None]:
    """evaluation.json; each entry of ``measured`` can be shown."""
    return _checked(read_object(path), _EVALUATION)


def read_metrics(path: Path) -> Found[list[Line]]:
    """Lines of metric values measured during training; lines without ``metrics`` are left out.

    For metrics.jsonl and checkpoints.jsonl.
    """
    found = read_lines(path, _METRICS_LINE)
    lines = [line for line in found.value if isinstance(line.get("metrics"), dict)]
    return Found(path, lines, found.problems, found.there)


def read_health(path: Path) -> Found[list[Line]]:
    """health.jsonl: each change of the health status; lines without ``status`` are left out."""
    found = read_lines(path, _HEALTH_LINE)
    lines = [line for line in found.value if line.get("status") is not None]
    return Found(path, lines, found.problems, found.there)


def read_visualizations(path: Path) -> Found[dict[str, dict[str, Any]]]:
    """visualizations.json: what `dinogen look` has drawn, by name."""
    found = read_object(path)
    visuals: dict[str, dict[str, Any]] = {}
    problems = list(found.problems)
    for name, one in (found.value or {}).items():
        try:
            visuals[name], bad = checked(section(one), _VISUALIZATION)
        except ValueError as error:
            bad = [str(error)]
        problems += [f": {name}: {reason}" for reason in bad]
    return Found(path, visuals, tuple(problems), found.there)


def read_attempts(path: Path) -> Found[dict[str, list[dict[str, Any]]]]:
    """study.json: the attempts of `dinogen study`, by run, oldest first."""
    found = read_object(path)
    problems = list(found.problems)
    attempts: dict[str, list[dict[str, Any]]] = {}
    try:
        runs = section((found.value or {}).get("runs") or {})
    except ValueError as error:
        runs = {}
        problems.append(f": runs: {error}")
    for name, tried in runs.items():
        attempts[name] = []
        for one in tried if isinstance(tried, list) else [tried]:
            try:
                attempt, bad = checked(section(one), _ATTEMPT)
                attempts[name].append(attempt)
            except ValueError as error:
                bad = [str(error)]
            problems += [f": runs: {name}: {reason}" for reason in bad]
    return Found(path, attempts, tuple(problems), found.there)


def study_runs(study: Path) -> dict[Path, list[dict[str, Any]]]:
    """The attempts in the study.json of a study's folder, by the folders of their runs.

    ``folders`` in it says where runs are, relative to the study; others are in folders of the study
    that have their names.
    """
    path = study / STUDY
    folders = (read_object(path).value or {}).get("folders")
    known = folders if isinstance(folders, dict) else {}
    return {
        Path(os.path.normpath(study / str(known.get(name, name)))): attempts
        for name, attempts in read_attempts(path).value.items()
    }


def read_config(path: Path) -> Found[dict[str, Any]]:
    """config.yaml as plain values; the sections that reports use are checked.

    The schema is not applied, so configs of earlier and later versions can be read too.
    """
    raw = read_raw(path)
    if raw.problems or not raw.there:
        return Found(path, {}, raw.problems, raw.there)
    try:
        values = plain(read_mapping(path), [MAX_VALUES])
    except UserError as error:
        return Found(path, {}, (f" cannot be read: {str(error).removeprefix(f'{path}: ')}",))
    except (ValueError, RecursionError) as error:
        return Found(path, {}, (f" cannot be read: {error or 'it is nested too deep'}",))
    config, problems = checked(values, _CONFIG)
    return Found(path, config, tuple(f": {problem}" for problem in problems))


def read_state(path: Path) -> Found[dict[str, Any] | None]:
    """state.json of a checkpoint: the progress of the run, and its training data."""
    return _checked(read_object(path), _STATE)


def state_problem(state: object) -> str | None:
    """Why a state.json cannot be resumed or sampled from; None if it can."""
    try:
        value = section(state)
        for key in ("progress", "config", "facts", "versions", "files", "engine", "logger"):
            if key not in value:
                raise ValueError(f"{key} is missing")
            section(value[key], key)
        progress = value["progress"]
        count(progress.get("nimg"), "progress.nimg")
        unknown = [key for key in progress if key not in _PROGRESS]
        given = {key: one for key, one in progress.items() if one is not None}
        if reasons := [f"{key} is not known" for key in unknown] + checked(given, _PROGRESS)[1]:
            raise ValueError(f"progress: {reasons[0]}")
        for key in ("sums", "weights"):
            section(value["logger"].get(key), f"logger.{key}")
        count(value.get("start"), "start")
        word(value["versions"].get("dinogen"), "versions.dinogen")
    except ValueError as error:
        return str(error)
    return None


def _checked(
    found: Found[dict[str, Any] | None], kinds: Mapping[str, Kind], needs: tuple[str, ...] = ()
) -> Found[dict[str, Any] | None]:
    """An object with its known keys checked."""
    if found.value is None:
        return found
    given = found.value
    value, reasons = checked(given, kinds)
    reasons += [
        f"{key} is {'not a finite number' if key in found.value else 'missing'}"
        for key in needs
        if found.value.get(key) is None
    ]
    return Found(found.path, value, tuple(f": {one}" for one in reasons))


def iter_values(lines: list[Line], name: str) -> Iterator[tuple[int, float]]:
    """``(nimg, value)`` of the lines that hold a finite number under ``name``."""
    for line in lines:
        value = finite(line.get(name))
        if value is not None:
            yield line["nimg"], value


def _metric_value(value: Any) -> dict[str, Any]:
    """One metric value: a finite number, or None and the reason."""
    given = section(value)
    sound, reasons = checked(given, _METRIC_VALUE)
    if "value" not in sound:
        raise ValueError("; ".join(reasons) or "value is missing")
    whole = dict.fromkeys(_NEEDED) | {"better": "none"} | sound
    if whole["value"] is None and whole["reason"] is None:
        whole["reason"] = "the file has no value, and no reason"
    if reasons:
        raise Partly(whole, reasons)
    return whole


def _code(value: Any) -> int:
    """An exit code: below 0 it is a signal's."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError(f"{short(value)} is no exit code")
    return value


def _better(value: Any) -> str:
    if value not in ("lower", "higher", "none"):
        raise ValueError(f"{short(value)} is not one of lower, higher, none")
    return str(value)


def _name(value: Any) -> str:
    """The name of a file inside a folder of the run; it cannot lead out of it."""
    name = word(value)
    if Path(name).is_absolute() or ".." in Path(name).parts or "\0" in name:
        raise ValueError(f"{short(value)} is not a file in this folder")
    return name


_METRIC_VALUE: dict[str, Kind] = {
    "value": number,
    "spread": amount,
    "better": _better,
    "num_samples": count,
    "num_reference": count,
    "fingerprint": word,
    "reason": word,
    "caution": word,
    "command": word,
}
# present in every value; earlier versions wrote no caution
_NEEDED = [key for key in _METRIC_VALUE if key != "caution"]
_RESULT: dict[str, Kind] = {
    "nimg": count,
    "resolution": count,
    "family": word,
    "seconds": amount,
    "training_s": amount,
    "world_size": count,
    "peak_memory_mb": amount,
    "num_parameters": count,
    "images_per_s": amount,
    "num_skipped": count,
    "health": word,
    "warnings": list_of(word),
    "device": word,
    "precision": word,
    "versions": each(text_of),
    "files": each(_name, none=True),
    "guide_label": word,
    "random_guide": flag,
    "ended_early": flag,
    "guide": section,
}
_EVALUATION: dict[str, Kind] = {
    "nimg": count,
    "resolution": count,
    "num_samples": count,
    "num_skipped": count,
    "split": word,
    "metrics": each(number, none=True),
    "measured": each(_metric_value),
    "fingerprints": each(section),
    "sampling": keys_of({"images_per_s": amount, "num": count}),
    "command": word,
    "device": word,
    "versions": each(text_of),
}
_METRICS_LINE: dict[str, Kind] = {
    "metrics": each(_metric_value),
    "fingerprints": each(section),
}
_HEALTH_LINE: dict[str, Kind] = {"status": word, "warnings": list_of(word)}
_VISUALIZATION: dict[str, Kind] = {
    "file": _name,
    "caption": word,
    "nimg": count,
    "seed": count,
    "command": word,
    "reason": word,
}
_ATTEMPT: dict[str, Kind] = {
    "step": word,
    "command": list_of(word),
    "log": word,
    "began": word,
    "seconds": amount,
    "code": _code,
    "what": word,
}
_NOTES = ("step", "change", "failed", "next")
_CONFIG: dict[str, Kind] = {
    "run": word,
    "seed": count,
    "data": keys_of({"path": word, "mix": list_of(keys_of({"path": word}))}),
    "family": keys_of({"name": word}),
    "notes": keys_of(dict.fromkeys(_NOTES, text_of)),
    "stages": list_of(keys_of({"resolution": count, "kimg": number, "epochs": number})),
}
# of a checkpoint; loss and best may be None as well
_PROGRESS: dict[str, Kind] = {
    "nimg": count,
    "step": count,
    "num_skipped": count,
    "seconds": amount,
    "measuring_s": amount,
    "loss": number,
    "logged": count,
    "health": word,
    "warnings": list_of(word),
    "best": number,
    "best_nimg": count,
    "num_worse": count,
}
_STATE: dict[str, Kind] = {"data": word, "progress": section, "facts": section}


log = logging.getLogger(__name__)


def read_stats(path: Path | str) -> list[Line]:
    """The sound lines of a stats.jsonl in order of ``nimg``; damaged ones are logged.

    Raises:
        UserError: the file is missing or holds no line.
    """
    found = read_lines(Path(path))
    if not found.there:
        raise UserError(f"{path}: cannot be read: there is no such file")
    for problem in found.messages():
        log.warning("%s", problem)
    if not found.value:
        raise UserError(f"{path}: holds no line of statistics: has the stage made a step?")
    return found.value


def series(lines: list[Line], name: str) -> tuple[list[float], list[float]]:
    """``(kimg, value)`` of the lines that have a finite number under ``name``."""
    points = list(iter_values(lines, name))
    return [nimg / 1000 for nimg, _ in points], [value for _, value in points]
