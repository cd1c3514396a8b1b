"""Measures a checkpoint's averaged networks, or a folder of images, on any number of ranks."""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from dinogen.config import ConfigError, MetricsConfig
from dinogen.distributed import process_group
from dinogen.distributed.failure import failure_propagation
from dinogen.errors import UserError
from dinogen.evaluation.record import (
    EvaluationRequest,
    Tell,
    find_place,
    metric_value_teller,
    write_result,
)
from dinogen.evaluation.subject import (
    chosen_samples,
    guide_diversity,
    held_out_means,
    real_images,
    reference_at,
    subject_of,
)
from dinogen.families.abilities import MeasuresHeldOut, Probes, constants_of
from dinogen.families.base import Family, Health
from dinogen.hub import shown, working_path
from dinogen.metrics.reconstruction import BETTER as RECONSTRUCTION
from dinogen.metrics.registry import GUIDE_DIVERSITY, OF_FEATURES, better
from dinogen.metrics.sources import Folder, Generated, Reference, image_files
from dinogen.metrics.suite import Extractors, Measurement, Subject, measure
from dinogen.metrics.value import MetricValue
from dinogen.runs.layout import is_exported
from dinogen.runs.run import Run
from dinogen.runs.values import with_new_keys
from dinogen.training.checkpointing.checkpoint import check_same_data, versions
from dinogen.training.checkpointing.snapshot import Snapshot, load_snapshot, run_config
from dinogen.training.data import class_shares, data_fingerprint, data_or_reason
from dinogen.training.logging.sinks.senders import show_results
from shards.errors import ShardsError
from shards.read.dataset import Dataset

log = logging.getLogger(__name__)

# What to do where data.path is not what a checkpoint was trained on; nothing is trained here.
OTHER_DATA = (
    "set data.path= to the shards that it was trained on, or use --reference to compare generated "
    "images with other data"
)


def evaluate(
    run: Path | str,
    resolution: int | None = None,
    split: str | None = None,
    num_samples: int | None = None,
    *,
    nimg: int | None = None,
    names: Sequence[str] = (),
    reference: str | None = None,
    changes: Sequence[str] = (),
    out: Path | None = None,
    tell: Tell | None = None,
) -> dict[str, Any]:
    """Measure a checkpoint and write ``RUN/RxR/evaluation.json``.

    Each sample counts exactly once on any number of ranks. A damaged held-out one is left out, if
    ``data.on_error`` is ``skip``, and counted as such. Earlier results of the same checkpoint are
    kept unless they are measured again. Data, guide and weights are loaded only if a requested
    metric needs them; where they are missing, that metric is reported as not available and the
    others are measured.

    ```python
    result = dinogen.evaluate("runs/first", names=["fid", "kid"], num_samples=10000)
    print(result["measured"]["fid"]["value"])
    ```

    Args:
        run: folder of the run, or a file of ``dinogen export``, whose result is written to
            ``FILE-exported/RxR/evaluation.json``, or an address of the hub, whose result is
            written to ``user--name-COMMIT/RxR/evaluation.json`` in the current folder.
        resolution: which stage; by default the largest that has a checkpoint.
        split: ``train``, ``val`` or ``test``: of held-out samples and of real images; by default
            ``val`` and ``metrics.reference_split``.
        num_samples: how many images to generate, and at most how many held-out samples to read;
            by default ``metrics.num_samples`` and all of them.
        nimg: which checkpoint, by the number of images it has seen; by default the newest.
        names: of metrics, such as ``fid``, and ``held_out`` for what the family itself measures;
            by default ``metrics.names``, or all, and ``held_out``.
        reference: folder of packed shards or of images to compare with; by default the run's own
            data.
        changes: ``KEY=VALUE`` items: keys of ``metrics:``, and where data and guide are now, such
            as ``data.path=/mnt/faces``.
        out: file (``*.json``) or folder to write to; by default the stage's folder.
        tell: called on rank 0 with each part of the result as soon as it is known.

    Returns:
        The result as written. ``metrics`` holds the metric values by ``SOURCE/NAME``, null where
        one is not finite: ``held_out/*`` are means over the samples, ``probe/*`` what the family's
        probe found. ``measured`` holds those of generated images by name, as ``Metric
        value.to_dict`` has them and with the command, and ``fingerprints`` what each was measured
        against. ``measured_before`` names what an earlier command measured, ``not_measured`` why
        the family's own metric values are not available, or why a kept one was not measured again.
        Of a folder that cannot be written, nothing is kept, which is said before the work begins.

    Raises:
        ConfigError: no such run, checkpoint or metric.
        UserError: ``out`` cannot be written.
    """
    request = EvaluationRequest(tuple(names), num_samples, split, reference, tuple(changes))
    run = working_path(run)
    config = run_config(run, request.places)
    run = run if is_exported(run) else config.run
    process_group.init()
    process_group.set_cpu_threads()
    with failure_propagation():
        snapshot = load_snapshot(run, resolution, nimg, request.places)
        config = snapshot.family.config
        settings = request.settings(config.metrics)
        place = find_place(snapshot.place.folder, out, make=is_exported(run))
        needs = _Needs(snapshot)
        result = _facts(snapshot)
        own = _own_values(needs, request, settings)
        result |= own.result(request.split or "val")
        if tell is not None and process_group.is_main():
            tell(result)
        found, sampling = _measure(needs, settings, request, own.health, tell)
        size = str(snapshot.resolution)
        words = [shown(run), "--stage", size, "--nimg", str(snapshot.nimg), *request.words()]
        written = write_result(place, result, found, sampling, words)
        if place.writable and out is None:
            _summarise(snapshot)
        return written


class _Needs:
    """Data and frozen networks, each loaded when a metric first needs it; or why it is missing.

    Every rank has to read the same attributes in the same order.
    """

    def __init__(self, snapshot: Snapshot) -> None:
        self.snapshot = snapshot
        self._data: Dataset | UserError | None = None
        self._begun: UserError | bool = False

    @property
    def data(self) -> Dataset | UserError:
        """What the run was trained on."""
        if self._data is None:
            config = self.snapshot.family.config

            def check(data: Dataset) -> None:
                check_same_data(
                    self.snapshot.checkpoint, config, data_fingerprint(data), OTHER_DATA
                )

            self._data = data_or_reason(config, check)
        return self._data

    @property
    def begun(self) -> Family | UserError:
        """The family with all that it was trained with, such as its guide."""
        if self._begun is False:
            data = self.data
            self._begun = data if isinstance(data, UserError) else self._begin(data)
        return self._begun if isinstance(self._begun, UserError) else self.snapshot.family

    def _begin(self, data: Dataset) -> UserError | bool:
        failure: Exception | None = None
        try:
            self.snapshot.family.begin(data)
        except (UserError, ShardsError, OSError) as error:
            failure = error
        if process_group.any_rank(failure is not None):
            return UserError(str(failure or "it cannot be loaded on another rank"))
        return True


@dataclass
class _Own:
    """What the family itself measures.

    Attributes:
        means: over held-out samples.
        num_samples: sound ones behind them.
        num_skipped: damaged ones.
        health: of the probe; None if it was not requested, or is not available.
        floor: of the loss, where it is known.
        missing: by ``held_out`` and ``probe``, why one is not available.
    """

    means: dict[str, float] = field(default_factory=dict)
    num_samples: int = 0
    num_skipped: int = 0
    health: Health | None = None
    floor: float | None = None
    missing: dict[str, str] = field(default_factory=dict)

    def result(self, split: str) -> dict[str, Any]:
        """The part of evaluation.json that is about it."""
        metric_values = {f"held_out/{name}": mean for name, mean in self.means.items()}
        said: dict[str, Any] = {}
        if self.health is not None:
            metric_values |= {f"probe/{name}": one for name, one in self.health.scalars.items()}
            # the manifest knows the variance of train alone
            said["floor"] = self.floor if split == "train" else None
            said |= {"health": self.health.status, "warnings": list(self.health.warnings)}
        return said | {
            "split": split,
            "metrics": {k: v if math.isfinite(v) else None for k, v in metric_values.items()},
            "num_samples": self.num_samples,
            "num_skipped": self.num_skipped,
            "not_measured": self.missing,
        }


def _own_values(needs: _Needs, request: EvaluationRequest, settings: MetricsConfig) -> _Own:
    """Measure held-out samples, and probe, if requested. Every rank has to call it."""
    own = _Own()
    if not request.held_out and GUIDE_DIVERSITY not in settings.names:
        return own
    snapshot, family = needs.snapshot, needs.begun
    if isinstance(family, UserError):
        own.missing = {"probe": str(family)} if isinstance(snapshot.family, Probes) else {}
        if request.held_out and isinstance(snapshot.family, MeasuresHeldOut):
            own.missing["held_out"] = str(family)
        return own
    data = needs.data
    assert not isinstance(data, UserError)
    if request.held_out:
        try:
            if numbers := _held_out_numbers(family, data, request):
                split = request.split or "val"
                networks = snapshot.ema.networks
                own.means, own.num_samples = held_out_means(family, networks, data, split, numbers)
                own.num_skipped = len(numbers) - own.num_samples
        except (UserError, ShardsError) as error:
            own.missing["held_out"] = str(error)
    own.health, own.floor = _probe(snapshot), constants_of(family).get("floor")
    return own


@torch.no_grad()
def _probe(snapshot: Snapshot) -> Health:
    """The family's probe, the same as in training, so that its values compare; on rank 0."""
    found = None
    with process_group.rank_zero_section() as mine:
        if mine:
            family, loss = snapshot.family, snapshot.checkpoint.state["progress"].get("loss")
            progress = with_new_keys(snapshot.checkpoint.state["progress"])
            # what was measured while it trained, at this checkpoint
            health = Health({}, progress.get("health", "ok"), tuple(progress.get("warnings", ())))
            if isinstance(family, Probes):
                health = family.probe(snapshot.ema.networks, loss)
            known = health.scalars.items()
            scalars = {k: float(v) if math.isfinite(v) else None for k, v in known}
            found = [scalars, health.status, list(health.warnings)]
    scalars, said, warnings = process_group.broadcast_object(found)
    finite = {name: math.nan if value is None else value for name, value in scalars.items()}
    return Health(finite, said, tuple(warnings))


def _held_out_numbers(family: Family, data: Dataset, request: EvaluationRequest) -> list[int]:
    """Samples for what the family itself measures; none if it measures nothing, or if the images
    are compared with other data and the run's data have no such samples.

    Raises:
        ConfigError: there are none.
    """
    split = request.split or "val"
    own = isinstance(family, MeasuresHeldOut)
    if not own or (request.reference is not None and not data.num_samples(split)):
        return []
    return chosen_samples(data, split, request.num_samples, "--split")


def _measure(
    needs: _Needs,
    settings: MetricsConfig,
    request: EvaluationRequest,
    health: Health | None,
    tell: Tell | None,
) -> tuple[Measurement, dict[str, Any] | None]:
    """Measure samples of the averages; and how fast they were made, if they were."""
    snapshot = needs.snapshot
    family, resolution = snapshot.family, snapshot.resolution
    asked = [name for name in settings.names if name != GUIDE_DIVERSITY]
    unneeded = UserError("no requested metric needs it")
    real: Reference | UserError = unneeded
    train: Reference | UserError = unneeded
    metrics = [OF_FEATURES[name] for name in asked if name in OF_FEATURES]
    if any(metric.train for metric in metrics):
        key = "data.split"
        train = _real(needs.data, family.config.data.split, None, resolution, key)
    if any(metric.real for metric in metrics) or any(name in RECONSTRUCTION for name in asked):
        if request.reference is None:
            split, num = settings.reference_split, settings.num_reference
            real = _real(needs.data, split, num, resolution, "metrics.reference_split")
        else:
            real, _ = reference_at(request.reference, settings, resolution)
    shares = class_shares(family, needs.data) if asked and family.inputs.labels else None
    facts = snapshot.checkpoint.state["facts"]
    networks, num = snapshot.ema.networks, settings.num_samples
    subject = subject_of(family, networks, num, real, train, settings, facts, shares)
    extractors = Extractors(settings, family.device)
    teller = metric_value_teller(tell)
    found = measure(asked, extractors, subject, settings.num_bootstrap, settings.cache, teller)
    if GUIDE_DIVERSITY in settings.names:
        found.add(_guide_diversity(needs, health), None)
        found.say(GUIDE_DIVERSITY)
    if not found.made:
        return found, None
    assert isinstance(subject.generated, Generated)
    speed = float(process_group.all_reduce_sum(torch.tensor(subject.generated.images_per_s)))
    return found, {"images_per_s": speed, "num": settings.num_samples}


def _guide_diversity(needs: _Needs, health: Health | None) -> MetricValue:
    if health is None:
        reason = str(needs.begun) if isinstance(needs.begun, UserError) else "it was not probed"
        return MetricValue.missing(GUIDE_DIVERSITY, better(GUIDE_DIVERSITY), reason)
    scalars = {k: v if math.isfinite(v) else None for k, v in health.scalars.items()}
    return guide_diversity(needs.snapshot.family, scalars)


def _real(
    data: Dataset | UserError, split: str, num: int | None, resolution: int, key: str
) -> Reference | UserError:
    if isinstance(data, UserError):
        return data
    return real_images(data, split, num, resolution, key)


def _facts(snapshot: Snapshot) -> dict[str, Any]:
    """What evaluation.json says of the checkpoint itself."""
    family = snapshot.family
    return {
        "stage": snapshot.resolution,
        "resolution": snapshot.resolution,
        "family": family.config.family.name,
        "nimg": snapshot.nimg,
        **snapshot.checkpoint.state["facts"],
        "weights_sha256": _weights(snapshot.checkpoint.state["files"]),
        "world_size": process_group.world_size(),
        "device": str(family.device),
        "versions": versions(),
    }


def _weights(files: dict[str, str]) -> str:
    """SHA-256 over those of the moving averages: two runs may have seen equally many images."""
    hashes = sorted(f"{name} {sha256}" for name, sha256 in files.items() if ".ema." in name)
    return hashlib.sha256("\n".join(hashes).encode()).hexdigest()


def _summarise(snapshot: Snapshot) -> None:
    """Summarise the stage for TensorBoard; the metric values are kept even if that fails.

    Every rank has to call it.
    """
    with process_group.rank_zero_section() as mine:
        if not mine:
            return
        try:
            show_results(snapshot.place)
        except OSError as error:
            log.warning("TensorBoard does not show these metric values: %s", error)


def is_folder_of_images(path: Path) -> bool:
    """Whether ``path`` holds images and no run."""
    return not Run(path).has_config and bool(image_files(path))


def evaluate_folder(
    folder: Path,
    num_samples: int | None = None,
    *,
    split: str | None = None,
    names: Sequence[str] = (),
    reference: str | None = None,
    changes: Sequence[str] = (),
    out: Path | None = None,
    tell: Tell | None = None,
) -> dict[str, Any]:
    """Measure the images in a folder, made by any program; write ``FOLDER/evaluation.json``.

    ```python
    result = dinogen.evaluate_folder(
        "images", names=["fid", "spectrum"], reference="data/faces", split="train"
    )
    for name, metric in result["measured"].items():
        print(name, metric["value"], metric["reason"])
    ```

    Args:
        folder: of the files, which are square and all of one size.
        num_samples: how many to measure, the first by name; by default all.
        split: ``train``, ``val`` or ``test`` of the reference, if it is packed shards; by default
            ``val``.
        names: of metrics, such as ``fid``; by default all.
        reference: folder of packed shards or of images to compare with; without it only the
            metrics that need no real images are available.
        changes: ``metrics.KEY=VALUE`` items, such as ``metrics.dinov2=facebook/dinov2-large``.
        out: file (``*.json``) or folder to write to; by default ``folder``.
        tell: called on rank 0 with each part of the result as soon as it is known.

    Returns:
        The result as written, with ``measured`` and ``fingerprints`` as in :func:`evaluate`.

    Raises:
        UserError: no file can be measured, or the reference does not fit.
    """
    request = EvaluationRequest(tuple(names), num_samples, split, reference, tuple(changes))
    process_group.use_device("auto")
    process_group.init()
    process_group.set_cpu_threads()
    with failure_propagation():
        settings = request.settings(MetricsConfig())
        place = find_place(folder, out)
        images = Folder(folder, num_samples)
        real, train = reference_at(reference, settings, images.resolution)
        none = ConfigError("a folder holds images and no network")
        asked = [name for name in settings.names if name != GUIDE_DIVERSITY]
        subject = Subject(images, real, train, none, none)
        extractors = Extractors(settings, process_group.device())
        result = {
            "folder": str(folder),
            "images": images.facts()["data"],
            "resolution": images.resolution,
            "num_samples": images.num,
            "left_out": images.left_out,
            "world_size": process_group.world_size(),
            "device": str(process_group.device()),
            "versions": versions(),
        }
        if tell is not None and process_group.is_main():
            tell(result)
        teller = metric_value_teller(tell)
        found = measure(asked, extractors, subject, settings.num_bootstrap, settings.cache, teller)
        return write_result(place, result, found, None, [str(folder), *request.words()])
