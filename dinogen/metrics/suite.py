"""Measures generated images by any number of metrics: each made once, each judged once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

from torch import Tensor

from dinogen.distributed import process_group
from dinogen.errors import UserError
from dinogen.metrics.collect import Collected, Seen, Source, Unreadable, collect, seen_of_reference
from dinogen.metrics.extractors import ExtractorInfo, Extractors, FeatureExtractor, NotAvailable
from dinogen.metrics.lpips_diversity import NUM_SAMPLES, lpips_diversity
from dinogen.metrics.prompted import BETTER as PROMPTED
from dinogen.metrics.prompted import Prompted, prompted_figures
from dinogen.metrics.reconstruction import BETTER as RECONSTRUCTION
from dinogen.metrics.reconstruction import reconstruction
from dinogen.metrics.registry import JUDGED, LPIPS_DIVERSITY, Metric, Sets, better
from dinogen.metrics.sources import Generated, Reconstructed, Reference
from dinogen.metrics.value import Facts, Figure, fingerprint, fingerprint_id
from dinogen.report.cautions import caution_of

BATCH = 50  # images made and judged at a time
_SEED = 0  # of the halves that spreads are taken over: no figure may depend on a run's seed


class Sized(Source, Protocol):
    """Images whose side is known before they are made."""

    resolution: int


@dataclass(frozen=True)
class Subject:
    """What is measured, and what it is compared with; or why that is not there.

    Attributes:
        generated: the images measured.
        real: those they are compared with, of the same side.
        train: those that were learnt from.
        pairs: real images and their reconstructions.
        prompted: images that were asked for by prompts.
    """

    generated: Sized
    real: Reference | UserError
    train: Reference | UserError
    pairs: Reconstructed | UserError
    prompted: Prompted | UserError


Tell = Callable[[Figure, Mapping[str, Facts]], None]


@dataclass
class Measurement:
    """What was found, the same on every rank.

    Attributes:
        figures: by name of the metric, one for each that was asked for.
        fingerprints: by their ids, what the figures were measured against.
        made: whether images were generated: nothing is, if no metric is available.
        tell: see :func:`measure`.
    """

    figures: dict[str, Figure] = field(default_factory=dict)
    fingerprints: dict[str, Facts] = field(default_factory=dict)
    made: bool = False
    tell: Tell | None = None

    def say(self, name: str) -> None:
        """Tell a figure that was taken in, on rank 0."""
        figure = self.figures[name]
        if self.tell is not None and figure.value is not None and process_group.is_main():
            self.tell(figure, self.fingerprints)

    def add(self, figure: Figure, facts: Facts | None, num_dims: int | None = None) -> Figure:
        """Take in a figure, under the fingerprint of what it was measured against.

        Args:
            figure: of a metric.
            facts: its fingerprint; None where it compares with nothing.
            num_dims: dimensions whose covariance it reads; None for other metrics.

        Returns:
            The figure as it was taken in: with its fingerprint, and with a caution if it needs one.
        """
        if figure.value is not None:
            if facts is not None:
                figure = replace(figure, fingerprint=fingerprint_id(facts))
                self.fingerprints[fingerprint_id(facts)] = facts
            # prompts are counted where others count real images
            num_real = None if figure.name in PROMPTED else figure.num_reference
            caution = caution_of(figure.num_samples, num_real, num_dims)
            figure = replace(figure, caution=caution)
        self.figures[figure.name] = figure
        return figure


def measure(
    names: Iterable[str],
    extractors: Extractors,
    subject: Subject,
    num_halves: int = 0,
    cache: Path | None = None,
    tell: Tell | None = None,
) -> Measurement:
    """Measure; all ranks together, with the same figures on any number of them.

    Args:
        names: of metrics, all but guide_diversity, which a family measures itself.
        feature extractors: who feature extractor.
        subject: what is measured.
        num_halves: halves of the generated images, for spreads; no spread below 2.
        cache: folder of reference statistics.
        tell: told each figure that has a value as soon as it is known, on rank 0.
    """
    asked = list(names)
    found = Measurement(tell=tell)
    for name in asked:
        reason = why_not(name, extractors, subject)
        if reason is not None:
            found.add(Figure.missing(name, better(name), reason), None)
    there = [name for name in asked if name not in found.figures]
    chosen = {name: JUDGED[name] for name in there if name in JUDGED}
    num_images = NUM_SAMPLES if LPIPS_DIVERSITY in there else 0
    if chosen or num_images:
        made = _judge(chosen, extractors, subject, num_halves, cache, num_images, found)
        found.made = made is not None
        if made is not None and made.images is not None:
            _compare(made.images, extractors, subject, found)
    _reconstruct([name for name in there if name in RECONSTRUCTION], extractors, subject, found)
    if asked_for := [name for name in there if name in PROMPTED]:
        clip = extractors.get("clip")
        assert isinstance(subject.prompted, Prompted) and not isinstance(clip, NotAvailable)
        for figure, facts in prompted_figures(asked_for, subject.prompted, clip, BATCH):
            found.add(figure, facts)
            found.say(figure.name)
    found.figures = {name: found.figures[name] for name in asked}
    return found


def why_not(name: str, extractors: Extractors, subject: Subject) -> str | None:
    """Why a metric cannot be had; None if it can. Every rank has to ask."""
    needed: list[object] = []
    if name in JUDGED:
        metric = JUDGED[name]
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


def _judge(
    chosen: dict[str, Metric],
    extractors: Extractors,
    subject: Subject,
    num_halves: int,
    cache: Path | None,
    num_images: int,
    found: Measurement,
) -> Collected | None:
    """Show everything to the feature extractors, and work out their metrics on rank 0."""
    real, bad_real = _seen(subject.real, chosen, extractors, cache, train=False)
    train, bad_train = _seen(subject.train, chosen, extractors, cache, train=True)
    for name, metric in list(chosen.items()):
        reason = (bad_real if metric.real else None) or (bad_train if metric.train else None)
        if reason is not None:
            found.add(Figure.missing(name, metric.better, reason), None)
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
                figure = _figure(name, metric, sets[metric.extractor], made.num, subject)
                _take(figure, metric, made, subject, found)
                found.say(name)
                results.append(figure.to_dict())
    for stored in process_group.broadcast_object(results):
        figure = Figure.from_dict(stored)
        _take(figure, chosen[figure.name], made, subject, found)
    return made


def _take(
    figure: Figure, metric: Metric, made: Collected, subject: Subject, found: Measurement
) -> None:
    info = made.seen[metric.extractor].info
    dims = info.num_channels if metric.covariance else None
    found.add(figure, _facts(metric, info, subject), dims)


def _figure(name: str, metric: Metric, sets: Sets, num: int, subject: Subject) -> Figure:
    """One figure; too few images are a reason why there is none."""
    num_real = subject.real.num if metric.real and isinstance(subject.real, Reference) else None
    try:
        estimate = metric.estimate(sets)
    except (ValueError, ArithmeticError, RuntimeError) as error:
        # one that cannot be worked out costs the others nothing
        return Figure.missing(name, metric.better, str(error) or type(error).__name__)
    return Figure(name, estimate.value, estimate.spread, metric.better, num, num_real, None)


def _facts(metric: Metric, extractor: ExtractorInfo, subject: Subject) -> Facts:
    """What a metric's figure was measured against."""
    made, how = subject.generated, _how(subject)
    if not metric.real or not isinstance(subject.real, Reference):
        return fingerprint(extractor, made.resolution, made.num, sampling=how)
    reference = subject.real.facts()
    if metric.train and isinstance(subject.train, Reference):
        learnt = subject.train.facts()
        beside = f"{subject.train.num} of {learnt['split']} of {learnt['data'][:12]}"
        reference = reference | {"split": f"{reference['split']} beside {beside}"}
    return fingerprint(extractor, made.resolution, made.num, reference, subject.real.num, how)


def _how(subject: Subject) -> Facts:
    """How the images were drawn, where that is not as everywhere."""
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
    """The feature extractors of metrics that can be had, each once."""
    found = (extractors.get(name) for name in dict.fromkeys(metric.extractor for metric in metrics))
    return [extractor for extractor in found if not isinstance(extractor, NotAvailable)]


class _First:
    """The first images of a source alone, where nothing needs the others."""

    def __init__(self, source: Source, num: int) -> None:
        self.num = min(num, source.num)
        self.read = source.read


def _compare(images: Tensor, extractors: Extractors, subject: Subject, found: Measurement) -> None:
    """How unlike each other some generated images look."""
    perceptual = extractors.perceptual()
    assert not isinstance(perceptual, NotAvailable)
    figure = lpips_diversity(images, perceptual)
    resolution, num, how = subject.generated.resolution, figure.num_samples, _how(subject)
    facts = fingerprint(perceptual.info, resolution, num, sampling=how)
    found.add(figure, facts)
    found.say(figure.name)


def _reconstruct(
    names: list[str], extractors: Extractors, subject: Subject, found: Measurement
) -> None:
    """How near reconstructions of real images are to them."""
    pairs = subject.pairs
    if not names or isinstance(pairs, UserError):
        return
    perceptual = extractors.perceptual()
    try:
        figures = reconstruction(pairs, perceptual)
    except Unreadable as error:
        for name in names:
            found.add(Figure.missing(name, better(name), str(error)), None)
        return
    for name in names:
        # PSNR and SSIM compare the pixels themselves
        extractor = ExtractorInfo(name, "", "none", 0, 0, False)
        if name == "reconstruction_lpips" and not isinstance(perceptual, NotAvailable):
            extractor = perceptual.info
        real = pairs.real
        found.add(
            figures[name], fingerprint(extractor, real.resolution, real.num, real.facts(), real.num)
        )
        found.say(name)
