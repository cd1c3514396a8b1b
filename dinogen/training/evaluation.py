"""evaluation.json: what was measured of a checkpoint or a folder, also by earlier commands."""

from __future__ import annotations

import logging
import shlex
from pathlib import Path
from typing import Any

from dinogen import dist
from dinogen.files import write_json
from dinogen.metrics.fingerprint import differences
from dinogen.metrics.suite import Measurement
from dinogen.report.runfiles import read_evaluation

log = logging.getLogger(__name__)

RESULT = "evaluation.json"
# Two results with these alike are of the same pictures, so their figures may stand side by side.
_SAME = ("resolution", "nimg", "pictures")


def write_result(
    folder: Path,
    result: dict[str, Any],
    found: Measurement,
    sampling: dict[str, Any] | None,
    words: list[str],
) -> dict[str, Any]:
    """Write ``FOLDER/evaluation.json``; every rank has to call it.

    Figures that were measured before of the same pictures, and not now, are kept with their
    fingerprints and commands. Who measures anew against something else is told what differs.

    Args:
        folder: of the stage, or of the pictures.
        result: all but what follows.
        found: figures and fingerprints.
        sampling: how fast the pictures were made; None if they were not.
        words: of the command, behind ``dinogen evaluate``.

    Returns:
        The result as written, on every rank.
    """
    command = shlex.join(["dinogen", "evaluate", *words])
    result |= {
        "measured": {k: v.to_dict() | {"command": command} for k, v in found.figures.items()},
        "fingerprints": found.fingerprints,
        "sampling": sampling,
        "command": command,
    }
    with dist.main_section() as mine:
        if mine:
            path = folder / RESULT
            earlier = read_evaluation(path)
            for trouble in earlier.told():
                log.warning("%s; figures of before that cannot be read are left out", trouble)
            before = earlier.value or {}
            if all(before.get(key) == result.get(key) for key in _SAME):
                _keep(result, before)
            write_json(path, result)
    written: dict[str, Any] = dist.broadcast_object(result)
    return written


def _keep(result: dict[str, Any], before: dict[str, Any]) -> None:
    """Take over what was measured before and is not now."""
    old: dict[str, Any] = before.get("measured") or {}
    marks = (before.get("fingerprints") or {}) | result["fingerprints"]
    measured = dict(result["measured"])
    for name, figure in old.items():
        new = measured.get(name)
        if new is None or (new["value"] is None and figure["value"] is not None):
            measured[name] = figure
        elif new["value"] is not None and new["fingerprint"] != figure["fingerprint"]:
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
