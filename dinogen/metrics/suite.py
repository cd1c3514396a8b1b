"""Measures generated pictures by any number of metrics: each made once, each judged once."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

from torch import Tensor

from dinogen import dist
from dinogen.errors import UserError
from dinogen.metrics.collect import Collected, Seen, Source, collect
from dinogen.metrics.figure import Figure
from dinogen.metrics.fingerprint import Facts, fingerprint, fingerprint_id
from dinogen.metrics.judged import Judges
from dinogen.metrics.judges import Judge, JudgeInfo, NotAvailable
from dinogen.metrics.lpips_diversity import NUM_SAMPLES, lpips_diversity
from dinogen.metrics.names import JUDGED, LPIPS_DIVERSITY, Metric, Sets, better
from dinogen.metrics.prompted import BETTER as PROMPTED
from dinogen.metrics.prompted import Prompted, prompted_figures
from dinogen.metrics.reconstruction import BETTER as RECONSTRUCTION
from dinogen.metrics.reconstruction import reconstruction
from dinogen.metrics.reference import seen_of_reference
from dinogen.metrics.sources import Reconstructed, Reference

BATCH = 50  # pictures made and judged at a time
_SEED = 0  # of the halves that spreads are taken over: no figure may depend on a run's seed


class Sized(Source, Protocol):
    """Pictures whose side is known before they are made."""

    resolution: int


@dataclass(frozen=True)
class Subject:
    """What is measured, and what it is compared with; or why that is not there.

    Attributes:
        generated: the pictures measured.
        real: those they are compared with, of the same side.
        train: those that were learnt from.
        pairs: real pictures and their reconstructions.
        prompted: pictures that were asked for by prompts.
    """

    generated: Sized
    real: Reference | UserError
    train: Reference | UserError
    pairs: Reconstructed | UserError
    prompted: Prompted | UserError


@dataclass
class Measurement:
    """What was found, the same on every rank.

    Attributes:
        figures: by name of the metric, one for each that was asked for.
        fingerprints: by their ids, what the figures were measured against.
        made: whether pictures were generated: nothing is, if no metric can be had.
    """

    figures: dict[str, Figure] = field(default_factory=dict)
    fingerprints: dict[str, Facts] = field(default_factory=dict)
    made: bool = False

    def add(self, figure: Figure, facts: Facts | None) -> None:
        """Take in a figure, under the fingerprint of what it was measured against."""
        if facts is not None and figure.value is not None:
            figure = replace(figure, fingerprint=fingerprint_id(facts))
            self.fingerprints[fingerprint_id(facts)] = facts
        self.figures[figure.name] = figure


def measure(
    names: Iterable[str],
    judges: Judges,
    subject: Subject,
    num_halves: int = 0,
    cache: Path | None = None,
) -> Measurement:
    """Measure; all ranks together, with the same figures on any number of them.

    Args:
        names: of metrics, all but guide_diversity, which a family measures itself.
        judges: who judge.
        subject: what is measured.
        num_halves: halves of the generated pictures, for spreads; no spread below 2.
        cache: folder of reference statistics.
    """
    asked = list(names)
    found = Measurement()
    for name in asked:
        reason = why_not(name, judges, subject)
        if reason is not None:
            found.add(Figure.missing(name, better(name), reason), None)
    there = [name for name in asked if name not in found.figures]
    chosen = {name: JUDGED[name] for name in there if name in JUDGED}
    num_pictures = NUM_SAMPLES if LPIPS_DIVERSITY in there else 0
    if chosen or num_pictures:
        made = _judge(chosen, judges, subject, num_halves, cache, num_pictures, found)
        found.made = True
        if made.pictures is not None:
            _compare(made.pictures, judges, subject, found)
    _reconstruct([name for name in there if name in RECONSTRUCTION], judges, subject, found)
    if asked_for := [name for name in there if name in PROMPTED]:
        clip = judges.get("clip")
        assert isinstance(subject.prompted, Prompted) and not isinstance(clip, NotAvailable)
        for figure, facts in prompted_figures(asked_for, subject.prompted, clip, BATCH):
            found.add(figure, facts)
    found.figures = {name: found.figures[name] for name in asked}
    return found


def why_not(name: str, judges: Judges, subject: Subject) -> str | None:
    """Why a metric cannot be had; None if it can. Every rank has to ask."""
    needed: list[object] = []
    if name in JUDGED:
        metric = JUDGED[name]
        needed.append(judges.get(metric.judge))
        needed += [subject.real] if metric.real else []
        needed += [subject.train] if metric.train else []
    elif name in RECONSTRUCTION:
        needed.append(subject.pairs)
    elif name in PROMPTED:
        needed += [subject.prompted, judges.get("clip")]
    if name in (LPIPS_DIVERSITY, "reconstruction_lpips"):
        needed.append(judges.perceptual())
    return next((str(one) for one in needed if isinstance(one, UserError)), None)


def _judge(
    chosen: dict[str, Metric],
    judges: Judges,
    subject: Subject,
    num_halves: int,
    cache: Path | None,
    num_pictures: int,
    found: Measurement,
) -> Collected:
    """Show everything to the judges, and work out their metrics on rank 0."""
    metrics = list(chosen.values())
    on_real, on_train = [m for m in metrics if m.real], [m for m in metrics if m.train]
    keep_real = {m.judge for m in on_real if m.real == "rows"}
    real = _seen(subject.real, _loaded(on_real, judges), keep_real, cache)
    train = _seen(subject.train, _loaded(on_train, judges), {m.judge for m in on_train}, cache)
    keep = {m.judge for m in metrics if m.rows or num_halves > 1}
    source: Source = subject.generated if metrics else _First(subject.generated, num_pictures)
    made = collect(source, _loaded(metrics, judges), keep, BATCH, num_pictures)
    results = None
    with dist.main_section() as mine:
        if mine:
            sets = {
                judge: Sets(seen, real.get(judge), train.get(judge), num_halves, _SEED)
                for judge, seen in made.seen.items()
            }
            results = [
                _figure(name, metric, sets[metric.judge], made.num, subject).to_dict()
                for name, metric in chosen.items()
            ]
    for stored in dist.broadcast_object(results):
        figure = Figure.from_dict(stored)
        metric = chosen[figure.name]
        info = made.seen[metric.judge].info
        found.add(figure, _facts(metric, info, subject))
    return made


def _figure(name: str, metric: Metric, sets: Sets, num: int, subject: Subject) -> Figure:
    """One figure; too few pictures are a reason why there is none."""
    num_real = subject.real.num if metric.real and isinstance(subject.real, Reference) else None
    try:
        estimate = metric.estimate(sets)
    except ValueError as error:
        return Figure.missing(name, metric.better, str(error))
    return Figure(name, estimate.value, estimate.spread, metric.better, num, num_real, None)


def _facts(metric: Metric, judge: JudgeInfo, subject: Subject) -> Facts:
    """What a metric's figure was measured against."""
    made = subject.generated
    if not metric.real or not isinstance(subject.real, Reference):
        return fingerprint(judge, made.resolution, made.num)
    reference = subject.real.facts()
    if metric.train and isinstance(subject.train, Reference):
        learnt = subject.train.facts()
        beside = f"{subject.train.num} of {learnt['split']} of {learnt['data'][:12]}"
        reference = reference | {"split": f"{reference['split']} beside {beside}"}
    return fingerprint(judge, made.resolution, made.num, reference, subject.real.num)


def _seen(
    source: Reference | UserError, judges: list[Judge], keep: set[str], cache: Path | None
) -> dict[str, Seen]:
    if not judges or isinstance(source, UserError):
        return {}
    return seen_of_reference(source, judges, keep, BATCH, cache)


def _loaded(metrics: list[Metric], judges: Judges) -> list[Judge]:
    """The judges of metrics that can be had, each once."""
    found = (judges.get(name) for name in dict.fromkeys(metric.judge for metric in metrics))
    return [judge for judge in found if not isinstance(judge, NotAvailable)]


class _First:
    """The first pictures of a source alone, where nothing needs the others."""

    def __init__(self, source: Source, num: int) -> None:
        self.num = min(num, source.num)
        self.read = source.read


def _compare(pictures: Tensor, judges: Judges, subject: Subject, found: Measurement) -> None:
    """How unlike each other some generated pictures look."""
    perceptual = judges.perceptual()
    assert not isinstance(perceptual, NotAvailable)
    figure = lpips_diversity(pictures, perceptual)
    facts = fingerprint(perceptual.info, subject.generated.resolution, figure.num_samples)
    found.add(figure, facts)


def _reconstruct(names: list[str], judges: Judges, subject: Subject, found: Measurement) -> None:
    """How near reconstructions of real pictures are to them."""
    pairs = subject.pairs
    if not names or isinstance(pairs, UserError):
        return
    perceptual = judges.perceptual()
    figures = reconstruction(pairs, perceptual)
    for name in names:
        # PSNR and SSIM compare the pixels themselves
        judge = JudgeInfo(name, "", "none", 0, 0, False)
        if name == "reconstruction_lpips" and not isinstance(perceptual, NotAvailable):
            judge = perceptual.info
        real = pairs.real
        found.add(
            figures[name], fingerprint(judge, real.resolution, real.num, real.facts(), real.num)
        )
