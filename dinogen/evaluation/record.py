"""What an evaluation is to measure, and evaluation.json: what it and earlier ones measured."""

from __future__ import annotations

import logging
import re
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dinogen.config import ConfigError, MetricsConfig, parse_config
from dinogen.distributed import process_group
from dinogen.errors import UserError
from dinogen.files import why_not_writable, write_json
from dinogen.metrics import suite
from dinogen.metrics.registry import chosen_names
from dinogen.metrics.value import Facts, MetricValue
from dinogen.runs.files import read_evaluation
from dinogen.runs.fingerprint import differences
from dinogen.runs.layout import EVALUATION
from shards.format.manifest import SPLITS

log = logging.getLogger(__name__)

# Two results in which these are equal are of the same images, so both may be in one file.
_SAME = ("resolution", "nimg", "images")
_WEIGHTS = "weights_sha256"  # the same, but earlier versions did not write it
# What the family measures of itself, which goes together.
_OWN = ("metrics", "health", "warnings", "floor", "split", "num_samples", "num_skipped")
# Those of them that are about its held-out samples.
_OF_SAMPLES = ("floor", "split", "num_samples", "num_skipped")
# Called on rank 0 with each part of the result as soon as it is known.
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
        """The folder of the file."""
        return self.path.parent


def find_path(folder: Path, out: Path | None) -> Path:
    """The file of a result: in a folder, or where ``--out`` says."""
    if out is None:
        return folder / EVALUATION
    return out if out.suffix == ".json" and not out.is_dir() else out / EVALUATION


def find_place(folder: Path, out: Path | None, make: bool = False) -> Place:
    """Where to write, and whether that is possible, tried before the work; every rank calls it.

    Args:
        folder: of what is measured.
        out: a file, ``*.json``, or a folder, which is made; None for ``FOLDER/evaluation.json``.
        make: whether to make ``folder`` too.

    Raises:
        UserError: ``out`` cannot be written.
    """
    path = find_path(folder, out)
    problem = None
    with process_group.rank_zero_section() as mine:
        if mine:
            problem = why_not_writable(path, make=make or out is not None)
    problem = process_group.broadcast_object(problem)
    if problem is None:
        return Place(path, True)
    if out is not None:
        raise UserError(f"--out {out}: cannot be written: {problem}: name another place")
    if process_group.is_main():
        log.warning("%s cannot be written: %s", path, problem)
        log.warning("RESULTS WILL ONLY BE PRINTED: give --out FILE or FOLDER to keep them")
    return Place(path, False)


def metric_value_teller(tell: Tell | None) -> suite.Tell | None:
    """Wraps ``tell`` so that it gets each measured value as a part of the result."""
    if tell is None:
        return None

    def told(metric_value: MetricValue, fingerprints: Mapping[str, Facts]) -> None:
        tell(
            {
                "measured": {metric_value.name: metric_value.to_dict()},
                "fingerprints": dict(fingerprints),
            }
        )

    return told


def write_result(
    place: Place,
    result: dict[str, Any],
    found: suite.Measurement,
    sampling: dict[str, Any] | None,
    words: list[str],
) -> dict[str, Any]:
    """Write the result, if its place can be written; every rank has to call it.

    Earlier results of the same images that are not measured again are kept, with their
    fingerprints and commands, and listed in ``measured_before``. If a metric is measured again
    against something else, the log says what differs.

    Args:
        place: of the file.
        result: all but what follows.
        found: metric values and fingerprints.
        sampling: how fast the images were made; None if they were not.
        words: of the command, behind ``dinogen evaluate``.

    Returns:
        The result as written, on every rank.

    Raises:
        UserError: the place could be written when the work began, and now cannot.
    """
    command = shlex.join(["dinogen", "evaluate", *words])
    result |= {
        "measured": {k: v.to_dict() | {"command": command} for k, v in found.metric_values.items()},
        "fingerprints": found.fingerprints,
        "sampling": sampling,
        "command": command,
        "measured_before": [],
        "kept": place.writable,
    }
    problem = None
    with process_group.rank_zero_section() as mine:
        if mine:
            earlier = read_evaluation(place.path)
            for said in earlier.messages():
                log.warning("%s; earlier results that cannot be read are left out", said)
            before = earlier.value or {}
            weights = result.get(_WEIGHTS)
            same = all(before.get(key) == result.get(key) for key in _SAME)
            if same and before.get(_WEIGHTS, weights) == weights:
                _keep(result, before)
            if place.writable:
                try:
                    write_json(place.path, result)
                except OSError as error:
                    problem = error.strerror or str(error)
    problem, written = process_group.broadcast_object([problem, result])
    if problem is not None:
        raise UserError(
            f"{place.path}: can no longer be written: {problem}: the results are only in the "
            "output above; measure again with --out FILE"
        )
    kept: dict[str, Any] = written
    return kept


def _keep(result: dict[str, Any], before: dict[str, Any]) -> None:
    """Take over what was measured before and is not now."""
    old: dict[str, Any] = before.get("measured") or {}
    marks = (before.get("fingerprints") or {}) | result["fingerprints"]
    measured = dict(result["measured"])
    for name, metric_value in old.items():
        new = measured.get(name)
        if new is None or (new["value"] is None and metric_value["value"] is not None):
            measured[name] = metric_value
            result["measured_before"].append(name)
            if new is not None:  # requested but not available: the old value does not answer that
                result["not_measured"] = (result.get("not_measured") or {}) | {name: new["reason"]}
        elif (
            new["value"] is not None
            and metric_value["value"] is not None
            and new["fingerprint"] != metric_value["fingerprint"]
        ):
            now, then = (
                marks.get(new["fingerprint"], {}),
                marks.get(metric_value["fingerprint"], {}),
            )
            log.warning(
                "%s was measured before against something else, so the two values cannot be "
                "compared: %s",
                name,
                "; ".join(differences(now, then)),
            )
    used = {metric_value["fingerprint"] for metric_value in measured.values()}
    result["measured"] = measured
    result["fingerprints"] = {mark: facts for mark, facts in marks.items() if mark in used}
    result["sampling"] = result["sampling"] or before.get("sampling")
    own, own_before = result.get("metrics") or {}, before.get("metrics") or {}
    if own_before and not own:
        result |= {key: before[key] for key in _OWN if key in before}
        result["measured_before"].append(HELD_OUT)
    elif not any(map(is_held_out, own)) and any(map(is_held_out, own_before)):
        # now only the probe ran, for guide_diversity
        result["metrics"] = own | {k: v for k, v in own_before.items() if is_held_out(k)}
        result |= {key: before[key] for key in _OF_SAMPLES if key in before}
        result["measured_before"].append(HELD_OUT)


def is_held_out(name: str) -> bool:
    """Whether a name in ``metrics`` is of a mean over held-out samples."""
    return name.startswith(f"{HELD_OUT}/")


# Among the names of metrics it means what the family itself measures: held-out samples, a probe.
HELD_OUT = "held_out"
# Locations, which may have changed since: contents are compared by hashes.
PLACES = re.compile(
    r"data\.(path|mix|cache_dir|cache_gb|num_threads)(?=[.=])"
    r"|(guide|clip|guides\.\w+|family\.latent)\.(path|revision)(?==)"
)


@dataclass(frozen=True)
class EvaluationRequest:
    """What is to be measured, beyond what the run's config says.

    Attributes:
        names: of metrics, and ``held_out`` for what the family itself measures; those of
            ``metrics.names``, or all, and ``held_out``, if empty.
        num_samples: number of images that are generated, or measured of a folder, and the
            largest number of held-out samples; ``metrics.num_samples`` and all of them if None.
        split: of held-out samples and real images; val and ``metrics.reference_split`` if None.
        reference: packed shards, or a folder of images, to compare with; the run's own data if
            None.
        changes: ``metrics.KEY=VALUE`` items, and places such as ``data.path=FOLDER``.
    """

    names: tuple[str, ...] = ()
    num_samples: int | None = None
    split: str | None = None
    reference: str | None = None
    changes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_changes(self.changes)
        if self.split is not None and self.split not in SPLITS:
            raise ConfigError(f"--split {self.split}: splits are {', '.join(SPLITS)}")

    @property
    def held_out(self) -> bool:
        """Whether what the family itself measures is requested."""
        return not self.names or HELD_OUT in self.names

    @property
    def places(self) -> tuple[str, ...]:
        """Changes that say where something is."""
        return tuple(item for item in self.changes if not item.startswith("metrics."))

    def settings(self, metrics: MetricsConfig) -> MetricsConfig:
        """The section ``metrics:`` as requested; without names if only ``held_out`` is.

        Raises:
            ConfigError: a change or a metric is not known.
        """
        own = [item for item in self.changes if item.startswith("metrics.")]
        stated = parse_config({"metrics": metrics.model_dump(mode="json")}, own).metrics
        names = [name for name in self.names if name != HELD_OUT]
        changes: dict[str, Any] = {
            "names": chosen_names(names, "--metrics")
            if names
            else ()
            if self.names
            else chosen_names(stated.names, "metrics.names"),
            "num_samples": self.num_samples or stated.num_samples,
        }
        if self.split is not None:
            changes["reference_split"] = self.split
        return stated.model_copy(update=changes)

    def words(self) -> list[str]:
        """The same as options of ``dinogen evaluate``."""
        options = {
            "--metrics": ",".join(self.names),
            "--num-samples": self.num_samples,
            "--split": self.split,
            "--reference": self.reference,
        }
        given = {option: str(value) for option, value in options.items() if value}
        return [word for pair in given.items() for word in pair] + list(self.changes)


def check_changes(changes: tuple[str, ...]) -> None:
    """Refuse changes of what a run was trained with.

    Raises:
        ConfigError: naming the first.
    """
    for item in changes:
        if not item.startswith("metrics.") and not PLACES.match(item):
            raise ConfigError(
                f"{item}: only keys of metrics: and places, such as data.path= and guide.path=, "
                "can be changed here"
            )
