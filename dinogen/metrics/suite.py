"""Measures generated pictures by any number of metrics: each made once, each judged once."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from dinogen import dist
from dinogen.config_metrics import MetricsConfig
from dinogen.errors import UserError
from dinogen.metrics.bootstrap import Estimate
from dinogen.metrics.collect import Collected, Seen, Source, collect
from dinogen.metrics.figure import Figure
from dinogen.metrics.fingerprint import Facts, fingerprint, fingerprint_id
from dinogen.metrics.judges import Judge, NotAvailable, load_judge
from dinogen.metrics.names import JUDGED, Metric, Sets, better
from dinogen.metrics.reference import seen_of_reference
from dinogen.metrics.sources import Reference

log = logging.getLogger(__name__)

BATCH = 50  # pictures made and judged at a time
_SEED = 0  # of the halves that spreads are taken over: no figure may depend on a run's seed


class Sized(Source, Protocol):
    """Pictures whose side is known before they are made."""

    resolution: int


# From the first pictures, (N, 3, R, R) uint8 on the CPU, to a figure; called on rank 0 alone.
OfPictures = Callable[[Tensor], Figure]


@dataclass(frozen=True)
class Other:
    """A metric that looks at some of the generated pictures itself.

    Attributes:
        num_pictures: how many of the first ones it wants.
        figure: works it out.
    """

    num_pictures: int
    figure: OfPictures


@dataclass(frozen=True)
class Measurement:
    """What was found, the same on every rank.

    Attributes:
        figures: by name of the metric, one for each that was asked for.
        fingerprints: by their ids, what the figures were measured against.
    """

    figures: dict[str, Figure]
    fingerprints: dict[str, Facts] = field(default_factory=dict)


class Judges:
    """Judges that were asked for, each loaded once; or the reason why there is none.

    Args:
        config: where their weights are.
        device: where they compute.
    """

    def __init__(self, config: MetricsConfig, device: torch.device) -> None:
        self._config, self._device = config, device
        self._known: dict[str, Judge | NotAvailable] = {}

    def get(self, name: str) -> Judge | NotAvailable:
        """One judge; every rank has to ask for it."""
        if name not in self._known:
            try:
                self._known[name] = load_judge(name, self._config, self._device)
            except NotAvailable as error:
                self._known[name] = error
        return self._known[name]


def measure(
    names: Iterable[str],
    judges: Judges,
    generated: Sized,
    real: Reference | UserError,
    train: Reference | UserError,
    others: Mapping[str, Other] | None = None,
    num_halves: int = 0,
    cache: Path | None = None,
) -> Measurement:
    """Measure; all ranks together, with the same figures on any number of them.

    Args:
        names: of metrics that have a judge, or are among ``others``.
        judges: who judge.
        generated: the pictures measured.
        real: those they are compared with, of the same side; or why there are none.
        train: those that were learnt from; or why there are none.
        others: metrics that need pictures and no judge.
        num_halves: of the generated pictures, for spreads; no spread below 2.
        cache: folder of reference statistics.
    """
    others = others or {}
    plan = _Plan(judges, real, train, num_halves)
    wanted = {name: plan.why_not(JUDGED[name]) for name in names if name in JUDGED}
    chosen = {name: JUDGED[name] for name, reason in wanted.items() if reason is None}
    looked_at = {name: others[name] for name in names if name in others}
    if not chosen and not looked_at:
        return Measurement(_missing(wanted))
    num_pictures = max((other.num_pictures for other in looked_at.values()), default=0)
    made, real_seen, train_seen = plan.collect(chosen, generated, num_pictures, cache)
    figures: dict[str, Figure] = _missing(wanted)
    fingerprints: dict[str, Facts] = {}
    found = None
    with dist.main_section() as mine:
        if mine:
            for judge in {metric.judge for metric in chosen.values()}:
                sets = Sets(
                    made.seen[judge], real_seen.get(judge), train_seen.get(judge), num_halves, _SEED
                )
                for name, metric in chosen.items():
                    if metric.judge == judge:
                        facts = plan.facts(metric, made.seen[judge], generated)
                        figures[name] = _figure(name, metric, sets, facts)
                        fingerprints[fingerprint_id(facts)] = facts
            for name, other in looked_at.items():
                assert made.pictures is not None
                figures[name] = other.figure(made.pictures[: other.num_pictures])
            found = [{k: v.to_dict() for k, v in figures.items()}, fingerprints]
    stored, fingerprints = dist.broadcast_object(found)
    return Measurement({k: Figure.from_dict(stored[k]) for k in names if k in stored}, fingerprints)


class _Plan:
    """What has to be read, by whom, and what has to be kept of it."""

    def __init__(
        self,
        judges: Judges,
        real: Reference | UserError,
        train: Reference | UserError,
        num_halves: int,
    ) -> None:
        self.judges, self.real, self.train, self.num_halves = judges, real, train, num_halves

    def why_not(self, metric: Metric) -> str | None:
        """Why a metric cannot be had; None if it can."""
        judge = self.judges.get(metric.judge)
        if isinstance(judge, NotAvailable):
            return str(judge)
        if metric.real and isinstance(self.real, UserError):
            return str(self.real)
        if metric.train and isinstance(self.train, UserError):
            return str(self.train)
        return None

    def collect(
        self, chosen: dict[str, Metric], generated: Sized, num_pictures: int, cache: Path | None
    ) -> tuple[Collected, dict[str, Seen], dict[str, Seen]]:
        """What the judges see of generated, real and training pictures."""
        metrics = list(chosen.values())
        real = self._seen(self.real, [m for m in metrics if m.real], _kept_of_real(metrics), cache)
        learnt = [m for m in metrics if m.train]
        train = self._seen(self.train, learnt, {m.judge for m in learnt}, cache)
        keep = {m.judge for m in metrics if m.rows or self.num_halves > 1}
        source: Source = generated if metrics else _First(generated, num_pictures)
        found = collect(source, self._judges(metrics), keep, BATCH, num_pictures)
        return found, real, train

    def facts(self, metric: Metric, seen: Seen, generated: Sized) -> Facts:
        """The fingerprint of a metric's figure."""
        reference, num = None, None
        if metric.real and isinstance(self.real, Reference):
            reference, num = self.real.facts(), self.real.num
            if metric.train and isinstance(self.train, Reference):
                learnt = self.train.facts()
                split = f"{reference['split']} beside {learnt['split']} of {learnt['data'][:12]}"
                reference, num = reference | {"split": split}, num + self.train.num
        return fingerprint(seen.info, generated.resolution, generated.num, reference, num)

    def _seen(
        self,
        source: Reference | UserError,
        metrics: list[Metric],
        keep: set[str],
        cache: Path | None,
    ) -> dict[str, Seen]:
        if not metrics or isinstance(source, UserError):
            return {}
        return seen_of_reference(source, self._judges(metrics), keep, BATCH, cache)

    def _judges(self, metrics: list[Metric]) -> list[Judge]:
        names = dict.fromkeys(metric.judge for metric in metrics)
        found = (self.judges.get(name) for name in names)
        return [judge for judge in found if not isinstance(judge, NotAvailable)]


class _First:
    """The first pictures of a source alone, where nothing needs the others."""

    def __init__(self, source: Source, num: int) -> None:
        self.num = min(num, source.num)
        self.read = source.read


def _kept_of_real(metrics: list[Metric]) -> set[str]:
    return {metric.judge for metric in metrics if metric.real == "rows"}


def _missing(reasons: Mapping[str, str | None]) -> dict[str, Figure]:
    """Figures of those metrics that have a reason not to be there."""
    return {
        name: Figure.missing(name, better(name), reason)
        for name, reason in reasons.items()
        if reason
    }


def _figure(name: str, metric: Metric, sets: Sets, facts: Facts) -> Figure:
    """One figure; too few pictures are a reason why there is none."""
    try:
        found: Estimate = metric.estimate(sets)
    except ValueError as error:
        return Figure.missing(name, metric.better, str(error))
    return Figure(
        name=name,
        value=found.value,
        spread=found.spread,
        better=metric.better,
        num_samples=facts["num_samples"],
        num_reference=facts["num_reference"],
        fingerprint=fingerprint_id(facts),
    )
