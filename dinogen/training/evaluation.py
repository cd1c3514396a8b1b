"""evaluation.json: what was measured of a checkpoint or a folder, also by earlier commands."""

from __future__ import annotations

import logging
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dinogen import dist
from dinogen.errors import UserError
from dinogen.files import why_not_writable, write_json
from dinogen.metrics import suite
from dinogen.metrics.figure import Figure
from dinogen.metrics.fingerprint import Facts, differences
from dinogen.report.runfiles import read_evaluation
from dinogen.training.wish import HELD_OUT

log = logging.getLogger(__name__)

RESULT = "evaluation.json"
# Two results with these alike are of the same images, so their figures may stand side by side.
_SAME = ("resolution", "nimg", "pictures")
_WEIGHTS = "weights_sha256"  # likewise, but earlier versions did not write it
# What the family measures of itself, which goes together.
_OWN = ("metrics", "verdict", "warnings", "floor", "split", "num_samples", "num_skipped")
# Those of them that are about its held-out samples.
_OF_SAMPLES = ("floor", "split", "num_samples", "num_skipped")
# Told a part of the result as soon as it is known, on rank 0.
Tell = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class Place:
    """Where a result goes.

    Attributes:
        path: the file.
        writable: whether it can be written; if not, the result is printed alone.
    """

    path: Path
    writable: bool

    @property
    def folder(self) -> Path:
        """That it lies in."""
        return self.path.parent


def find_path(folder: Path, out: Path | None) -> Path:
    """The file of a result: in a folder, or where ``--out`` says."""
    if out is None:
        return folder / RESULT
    return out if out.suffix == ".json" and not out.is_dir() else out / RESULT


def find_place(folder: Path, out: Path | None) -> Place:
    """Where to write, and whether that can be done, tried before the work; every rank calls it.

    Args:
        folder: of what is measured.
        out: a file, ``*.json``, or a folder, which is made; None for ``FOLDER/evaluation.json``.

    Raises:
        UserError: ``out`` cannot be written.
    """
    path = find_path(folder, out)
    trouble = None
    with dist.main_section() as mine:
        if mine:
            trouble = why_not_writable(path, make=out is not None)
    trouble = dist.broadcast_object(trouble)
    if trouble is None:
        return Place(path, True)
    if out is not None:
        raise UserError(f"--out {out}: cannot be written: {trouble}: name another place")
    if dist.is_main():
        log.warning("%s cannot be written: %s", path, trouble)
        log.warning("FIGURES WILL BE PRINTED ONLY: give --out FILE or FOLDER to keep them")
    return Place(path, False)


def figure_teller(tell: Tell | None) -> suite.Tell | None:
    """Tells a figure of the suite as a part of the result."""
    if tell is None:
        return None

    def told(figure: Figure, fingerprints: Mapping[str, Facts]) -> None:
        tell({"measured": {figure.name: figure.to_dict()}, "fingerprints": dict(fingerprints)})

    return told


def write_result(
    place: Place,
    result: dict[str, Any],
    found: suite.Measurement,
    sampling: dict[str, Any] | None,
    words: list[str],
) -> dict[str, Any]:
    """Write the result, if its place can be written; every rank has to call it.

    Figures that were measured before of the same images, and not now, are kept with their
    fingerprints and commands, and named. Who measures again against something else is told what
    differs.

    Args:
        place: of the file.
        result: all but what follows.
        found: figures and fingerprints.
        sampling: how fast the images were made; None if they were not.
        words: of the command, behind ``dinogen evaluate``.

    Returns:
        The result as written, on every rank.

    Raises:
        UserError: the place could be written when the work began, and now cannot.
    """
    command = shlex.join(["dinogen", "evaluate", *words])
    result |= {
        "measured": {k: v.to_dict() | {"command": command} for k, v in found.figures.items()},
        "fingerprints": found.fingerprints,
        "sampling": sampling,
        "command": command,
        "measured_before": [],
        "kept": place.writable,
    }
    trouble = None
    with dist.main_section() as mine:
        if mine:
            earlier = read_evaluation(place.path)
            for said in earlier.told():
                log.warning("%s; figures of before that cannot be read are left out", said)
            before = earlier.value or {}
            weights = result.get(_WEIGHTS)
            same = all(before.get(key) == result.get(key) for key in _SAME)
            if same and before.get(_WEIGHTS, weights) == weights:
                _keep(result, before)
            if place.writable:
                try:
                    write_json(place.path, result)
                except OSError as error:
                    trouble = error.strerror or str(error)
    trouble, written = dist.broadcast_object([trouble, result])
    if trouble is not None:
        raise UserError(
            f"{place.path}: cannot be written any more: {trouble}: the figures above are all there "
            "is; measure again with --out FILE"
        )
    kept: dict[str, Any] = written
    return kept


def _keep(result: dict[str, Any], before: dict[str, Any]) -> None:
    """Take over what was measured before and is not now."""
    old: dict[str, Any] = before.get("measured") or {}
    marks = (before.get("fingerprints") or {}) | result["fingerprints"]
    measured = dict(result["measured"])
    for name, figure in old.items():
        new = measured.get(name)
        if new is None or (new["value"] is None and figure["value"] is not None):
            measured[name] = figure
            result["measured_before"].append(name)
            if new is not None:  # asked for and not available: the old figure is no answer
                result["not_measured"] = (result.get("not_measured") or {}) | {name: new["reason"]}
        elif (
            new["value"] is not None
            and figure["value"] is not None
            and new["fingerprint"] != figure["fingerprint"]
        ):
            now, then = marks.get(new["fingerprint"], {}), marks.get(figure["fingerprint"], {})
            log.warning(
                "%s: was measured before against something else, the two figures cannot be "
                "compared: %s",
                name,
                "; ".join(differences(now, then)),
            )
    used = {figure["fingerprint"] for figure in measured.values()}
    result["measured"] = measured
    result["fingerprints"] = {mark: facts for mark, facts in marks.items() if mark in used}
    result["sampling"] = result["sampling"] or before.get("sampling")
    own, own_before = result.get("metrics") or {}, before.get("metrics") or {}
    if own_before and not own:
        result |= {key: before[key] for key in _OWN if key in before}
        result["measured_before"].append(HELD_OUT)
    elif not any(map(is_held_out, own)) and any(map(is_held_out, own_before)):
        # probed now, but for guide_diversity alone
        result["metrics"] = own | {k: v for k, v in own_before.items() if is_held_out(k)}
        result |= {key: before[key] for key in _OF_SAMPLES if key in before}
        result["measured_before"].append(HELD_OUT)


def is_held_out(name: str) -> bool:
    """Whether a name in ``metrics`` is of a mean over held-out samples."""
    return name.startswith(f"{HELD_OUT}/")
