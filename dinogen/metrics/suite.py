"""Measures generated images by any number of metrics: each made once, each seen once."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from dinogen.config import MetricsConfig
from dinogen.distributed import process_group
from dinogen.errors import UserError
from dinogen.metrics.collect import Collected, Seen, Source, Unreadable, collect, seen_of_reference
from dinogen.metrics.extractors.base import ExtractorInfo, FeatureExtractor, NotAvailable
from dinogen.metrics.extractors.lpips import Perceptual, load_perceptual
from dinogen.metrics.lpips_diversity import NUM_SAMPLES, lpips_diversity
from dinogen.metrics.prompted import BETTER as PROMPTED
from dinogen.metrics.prompted import Prompted, prompted_values
from dinogen.metrics.reconstruction import BETTER as RECONSTRUCTION
from dinogen.metrics.reconstruction import reconstruction
from dinogen.metrics.registry import LPIPS_DIVERSITY, OF_FEATURES, Metric, Sets, better
from dinogen.metrics.sources import Generated, Reconstructed, Reference
from dinogen.metrics.value import Facts, MetricValue, fingerprint
from dinogen.runs.fingerprint import fingerprint_id
from dinogen.runs.values import caution_of, trained_with

BATCH = 50  # images made and seen by the extractors at a time
_SEED = 0  # of the halves that spreads are taken over: no metric value may depend on a run's seed


class Sized(Source, Protocol):
    """Images whose side is known before they are made."""

    resolution: int


@dataclass(frozen=True)
class Subject:
    """What is measured, and what it is compared with; or why that is not there.

    Attributes:
        generated: the images measured.
        real: those they are compared with, of the same side.
        train: those that were trained on.
        pairs: real images and their reconstructions.
        prompted: images that were made for prompts.
        guides: names of the networks that guided the generator.
    """

    generated: Sized
    real: Reference | UserError
    train: Reference | UserError
    pairs: Reconstructed | UserError
    prompted: Prompted | UserError
    guides: tuple[str, ...] = ()


def load_extractor(name: str, config: MetricsConfig, device: torch.device) -> FeatureExtractor:
    """Load a feature extractor onto a device; all ranks together, so that all have it or none.

    A new feature extractor is one new file ``dinogen/metrics/extractors/NAME.py`` with a function
    ``load(path, device) -> FeatureExtractor``, and, if it has weights, their path as
    ``NAME`` in ``MetricsConfig``.

    Raises:
        NotAvailable: its weights are missing, here or on another rank; the message names
            ``metrics.NAME`` and how to get them.
    """
    module = importlib.import_module(f"dinogen.metrics.extractors.{name}")
    extractor: FeatureExtractor | None = None
    failed: NotAvailable | None = None
    try:
        extractor = module.load(getattr(config, name, None), device)
    except NotAvailable as error:
        failed = error
    if process_group.any_rank(failed is not None):
        raise failed or NotAvailable(
            f"metrics.{name}: it is missing on another node: give a path that all nodes can read"
        )
    assert extractor is not None
    return extractor


class Extractors:
    """Loads by name, once. Every rank has to ask for the same in the same order.

    Args:
        config: where their weights are.
        device: where they compute.
    """

    def __init__(self, config: MetricsConfig, device: torch.device) -> None:
        self._config, self._device = config, device
        self._known: dict[str, FeatureExtractor | NotAvailable] = {}
        self._perceptual: Perceptual | NotAvailable | None = None

    def get(self, name: str) -> FeatureExtractor | NotAvailable:
        """One feature extractor, or why there is none."""
        if name not in self._known:
            try:
                self._known[name] = load_extractor(name, self._config, self._device)
            except NotAvailable as error:
                self._known[name] = error
            except UserError as error:
                # a file of weights that is damaged is no reason to lose what others measure
                self._known[name] = NotAvailable(str(error))
        return self._known[name]

    def perceptual(self) -> Perceptual | NotAvailable:
        """LPIPS, or why there is none."""
        if self._perceptual is None:
            config = self._config
            try:
                self._perceptual = load_perceptual(
                    config.lpips, config.lpips_backbone, self._device
                )
            except NotAvailable as error:
                self._perceptual = error
            except UserError as error:
                self._perceptual = NotAvailable(str(error))
        return self._perceptual


Tell = Callable[[MetricValue, Mapping[str, Facts]], None]


@dataclass
class Measurement:
    """What was found, the same on every rank.

    Attributes:
        metric values: by name of the metric, one for each that was requested.
        fingerprints: by their ids, what the metric values were measured against.
        made: whether images were generated: nothing is, if no metric is available.
        tell: see :func:`measure`.
        guides: names of the networks that guided what is measured.
    """

    metric_values: dict[str, MetricValue] = field(default_factory=dict)
    fingerprints: dict[str, Facts] = field(default_factory=dict)
    made: bool = False
    tell: Tell | None = None
    guides: tuple[str, ...] = ()

    def say(self, name: str) -> None:
        """Pass a metric value that was added on to ``tell``, on rank 0."""
        metric_value = self.metric_values[name]
        if self.tell is not None and metric_value.value is not None and process_group.is_main():
            self.tell(metric_value, self.fingerprints)

    def add(
        self, metric_value: MetricValue, facts: Facts | None, num_dims: int | None = None
    ) -> MetricValue:
        """Take in a metric value, under the fingerprint of what it was measured against.

        Args:
            metric value: of a metric.
            facts: its fingerprint; None where it compares with nothing.
            num_dims: dimensions whose covariance it reads; None for other metrics.

        Returns:
            The metric value as it was taken in: with its fingerprint, and with a caution if it
            needs one.
        """
        if metric_value.value is not None:
            if facts is not None:
                metric_value = replace(metric_value, fingerprint=fingerprint_id(facts))
                self.fingerprints[fingerprint_id(facts)] = facts
            # prompts are counted where others count real images
            num_real = None if metric_value.name in PROMPTED else metric_value.num_reference
            said = [caution_of(metric_value.num_samples, num_real, num_dims)]
            metric = OF_FEATURES.get(metric_value.name)
            if metric is not None and metric.extractor.startswith(self.guides):
                said.append(trained_with(metric.extractor))
            caution = "; ".join(filter(None, said)) or None
            metric_value = replace(metric_value, caution=caution)
        self.metric_values[metric_value.name] = metric_value
        return metric_value


def measure(
    names: Iterable[str],
    extractors: Extractors,
    subject: Subject,
    num_halves: int = 0,
    cache: Path | None = None,
    tell: Tell | None = None,
) -> Measurement:
    """Measure; all ranks together, with the same metric values on any number of them.

    Args:
        names: of metrics, all but guide_diversity, which a family measures itself.
        extractors: load what the metrics need.
        subject: what is measured.
        num_halves: halves of the generated images, for spreads; no spread below 2.
        cache: folder of reference statistics.
        tell: called on rank 0 with each metric value that has a value as soon as it is known.
    """
    asked = list(names)
    found = Measurement(tell=tell, guides=subject.guides)
    for name in asked:
        reason = why_not(name, extractors, subject)
        if reason is not None:
            found.add(MetricValue.missing(name, better(name), reason), None)
    there = [name for name in asked if name not in found.metric_values]
    chosen = {name: OF_FEATURES[name] for name in there if name in OF_FEATURES}
    num_images = NUM_SAMPLES if LPIPS_DIVERSITY in there else 0
    if chosen or num_images:
        made = _logits(chosen, extractors, subject, num_halves, cache, num_images, found)
        found.made = made is not None
        if made is not None and made.images is not None:
            _compare(made.images, extractors, subject, found)
    _reconstruct([name for name in there if name in RECONSTRUCTION], extractors, subject, found)
    if asked_for := [name for name in there if name in PROMPTED]:
        clip = extractors.get("clip")
        assert isinstance(subject.prompted, Prompted) and not isinstance(clip, NotAvailable)
        for metric_value, facts in prompted_values(asked_for, subject.prompted, clip, BATCH):
            found.add(metric_value, facts)
            found.say(metric_value.name)
    found.metric_values = {name: found.metric_values[name] for name in asked}
    return found


def why_not(name: str, extractors: Extractors, subject: Subject) -> str | None:
    """Why a metric is not available; None if it is. Every rank has to call it."""
    needed: list[object] = []
    if name in OF_FEATURES:
        metric = OF_FEATURES[name]
        needed.append(extractors.get(metric.extractor))
        needed += [subject.real] if metric.real else []
        needed += [subject.train] if metric.train else []
    elif name in RECONSTRUCTION:
        needed.append(subject.pairs)
    elif name in PROMPTED:
        needed += [subject.prompted, extractors.get("clip")]
    if name in (LPIPS_DIVERSITY, "reconstruction_lpips"):
        needed.append(extractors.perceptual())
    return next((str(one) for one in needed if isinstance(one, UserError)), None)


def _logits(
    chosen: dict[str, Metric],
    extractors: Extractors,
    subject: Subject,
    num_halves: int,
    cache: Path | None,
    num_images: int,
    found: Measurement,
) -> Collected | None:
    """Show all images to the feature extractors, and compute their metrics on rank 0."""
    real, bad_real = _seen(subject.real, chosen, extractors, cache, train=False)
    train, bad_train = _seen(subject.train, chosen, extractors, cache, train=True)
    for name, metric in list(chosen.items()):
        reason = (bad_real if metric.real else None) or (bad_train if metric.train else None)
        if reason is not None:
            found.add(MetricValue.missing(name, metric.better, reason), None)
            del chosen[name]
    metrics = list(chosen.values())
    if not metrics and not num_images:
        return None
    keep = {m.extractor for m in metrics if m.rows or num_halves > 1}
    source: Source = subject.generated if metrics else _First(subject.generated, num_images)
    made = collect(source, _loaded(metrics, extractors), keep, BATCH, num_images)
    results = None
    with process_group.rank_zero_section() as mine:
        if mine:
            results = []
            sets = {
                extractor: Sets(seen, real.get(extractor), train.get(extractor), num_halves, _SEED)
                for extractor, seen in made.seen.items()
            }
            for name, metric in chosen.items():
                metric_value = _metric_value(
                    name, metric, sets[metric.extractor], made.num, subject
                )
                _take(metric_value, metric, made, subject, found)
                found.say(name)
                results.append(metric_value.to_dict())
    for stored in process_group.broadcast_object(results):
        metric_value = MetricValue.from_dict(stored)
        _take(metric_value, chosen[metric_value.name], made, subject, found)
    return made


def _take(
    metric_value: MetricValue, metric: Metric, made: Collected, subject: Subject, found: Measurement
) -> None:
    info = made.seen[metric.extractor].info
    dims = info.num_channels if metric.covariance else None
    found.add(metric_value, _facts(metric, info, subject), dims)


def _metric_value(name: str, metric: Metric, sets: Sets, num: int, subject: Subject) -> MetricValue:
    """One metric value; too few images are a reason why there is none."""
    num_real = subject.real.num if metric.real and isinstance(subject.real, Reference) else None
    try:
        estimate = metric.estimate(sets)
    except (ValueError, ArithmeticError, RuntimeError) as error:
        # the others are measured all the same
        return MetricValue.missing(name, metric.better, str(error) or type(error).__name__)
    return MetricValue(name, estimate.value, estimate.spread, metric.better, num, num_real, None)


def _facts(metric: Metric, extractor: ExtractorInfo, subject: Subject) -> Facts:
    """What a metric value was measured against."""
    made, how = subject.generated, _how(subject)
    if not metric.real or not isinstance(subject.real, Reference):
        return fingerprint(extractor, made.resolution, made.num, sampling=how)
    reference = subject.real.facts()
    if metric.train and isinstance(subject.train, Reference):
        train = subject.train.facts()
        trained_on = f"{subject.train.num} of {train['split']} of {train['data'][:12]}"
        # "beside" stays: the ids of stored results depend on it
        reference = reference | {"split": f"{reference['split']} beside {trained_on}"}
    return fingerprint(extractor, made.resolution, made.num, reference, subject.real.num, how)


def _how(subject: Subject) -> Facts:
    """How the images were drawn, if not in the usual way."""
    made = subject.generated
    return made.how if isinstance(made, Generated) else {}


def _seen(
    source: Reference | UserError,
    chosen: Mapping[str, Metric],
    extractors: Extractors,
    cache: Path | None,
    train: bool,
) -> tuple[dict[str, Seen], str | None]:
    """What feature extractors see of real images, or why they cannot be read."""
    needing = [m for m in chosen.values() if (m.train if train else m.real)]
    loaded = _loaded(needing, extractors)
    if not loaded or isinstance(source, UserError):
        return {}, None
    keep = {m.extractor for m in needing if train or m.real == "rows"}
    try:
        return seen_of_reference(source, loaded, keep, BATCH, cache), None
    except Unreadable as error:
        return {}, str(error)


def _loaded(metrics: list[Metric], extractors: Extractors) -> list[FeatureExtractor]:
    """The available feature extractors of metrics, each once."""
    found = (extractors.get(name) for name in dict.fromkeys(metric.extractor for metric in metrics))
    return [extractor for extractor in found if not isinstance(extractor, NotAvailable)]


class _First:
    """Only the first images of a source, if nothing needs the others."""

    def __init__(self, source: Source, num: int) -> None:
        self.num = min(num, source.num)
        self.read = source.read


def _compare(images: Tensor, extractors: Extractors, subject: Subject, found: Measurement) -> None:
    """How different from each other some generated images look."""
    perceptual = extractors.perceptual()
    assert not isinstance(perceptual, NotAvailable)
    metric_value = lpips_diversity(images, perceptual)
    resolution, num, how = subject.generated.resolution, metric_value.num_samples, _how(subject)
    facts = fingerprint(perceptual.info, resolution, num, sampling=how)
    found.add(metric_value, facts)
    found.say(metric_value.name)


def _reconstruct(
    names: list[str], extractors: Extractors, subject: Subject, found: Measurement
) -> None:
    """How close reconstructions of real images are to the originals."""
    pairs = subject.pairs
    if not names or isinstance(pairs, UserError):
        return
    perceptual = extractors.perceptual()
    try:
        metric_values = reconstruction(pairs, perceptual)
    except Unreadable as error:
        for name in names:
            found.add(MetricValue.missing(name, better(name), str(error)), None)
        return
    for name in names:
        # PSNR and SSIM compare the pixels themselves
        extractor = ExtractorInfo(name, "", "none", 0, 0, False)
        if name == "reconstruction_lpips" and not isinstance(perceptual, NotAvailable):
            extractor = perceptual.info
        real = pairs.real
        found.add(
            metric_values[name],
            fingerprint(extractor, real.resolution, real.num, real.facts(), real.num),
        )
        found.say(name)
