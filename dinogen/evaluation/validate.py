"""Measures the moving averages while a run trains, on held-out and on generated images.

It also decides when to end the run because the values no longer improve.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from dinogen.config import ConfigError, due
from dinogen.distributed import process_group
from dinogen.evaluation.health import SampleDiversity
from dinogen.evaluation.subject import (
    chosen_samples,
    guide_diversity,
    held_out_means,
    real_images,
    subject_of,
)
from dinogen.families.abilities import MeasuresHeldOut, Probes, facts_of
from dinogen.families.base import Family, Health
from dinogen.metrics.registry import GUIDE_DIVERSITY, better, chosen_names
from dinogen.metrics.suite import Extractors, Subject, measure, why_not
from dinogen.metrics.value import MetricValue
from dinogen.training.data import class_shares
from dinogen.training.logging.logger import append_line, cut_lines
from dinogen.training.state import StageState
from shards.read.dataset import Dataset

log = logging.getLogger(__name__)


class Measurable:
    """What ``eval:`` asks for while a stage trains, and what of it is not available.

    Args:
        family: of the stage.
        networks: whose samples are measured.
        data: of the run.
        device: where feature extractors are loaded.

    Attributes:
        numbers: of the held-out samples; none where the family measures nothing on them.
        names: of the metrics of generated images.
        missing: reasons why some of these are not available.

    Raises:
        ConfigError: as :class:`Validator`.
    """

    def __init__(
        self,
        family: Family,
        networks: Mapping[str, nn.Module],
        data: Dataset,
        device: torch.device,
    ) -> None:
        config = family.config.eval
        self.numbers: list[int] = []
        if isinstance(family, MeasuresHeldOut):
            self.numbers = chosen_samples(data, config.split, config.num_samples, "eval.split")
        self.names: tuple[str, ...] = ()
        self.missing: dict[str, str] = {}
        if not config.generated:
            return
        self.names = chosen_names(config.generated, "eval.generated")
        self.extractors = Extractors(family.config.metrics, device)
        self.subject = _subject(family, networks, data)
        for name in self.names:
            reason = why_not(name, self.extractors, self.subject)
            if reason is not None and name == config.metric:
                raise ConfigError(f"eval.metric: {name} is not available: {reason}")
            if reason is not None:
                self.missing[name] = reason
        metric = config.metric
        if metric is not None and metric in self.names and better(metric) == "none":
            raise ConfigError(f"eval.metric: neither lower nor higher is better for {metric}")


def _subject(family: Family, networks: Mapping[str, nn.Module], data: Dataset) -> Subject:
    settings, resolution = family.config.metrics, family.stage.resolution
    key = "metrics.reference_split"
    real = real_images(data, settings.reference_split, settings.num_reference, resolution, key)
    train = real_images(data, family.config.data.split, None, resolution, "data.split")
    num, facts = family.config.eval.num_generated, facts_of(family)
    shares = class_shares(family, data) if family.inputs.labels else None
    return subject_of(family, networks, num, real, train, settings, facts, shares)


class Validator:
    """Measures where the clock says so, and keeps the best metric value in the run's progress.

    Args:
        state: of the stage.

    Raises:
        ConfigError: the data hold nothing back, a metric is not known, or what ``eval.metric``
            names is not available.
    """

    def __init__(self, state: StageState) -> None:
        self.state = state
        self.config = state.config.eval
        self.told: set[str] = set()
        data, settings = state.data, state.config
        self.diversity = SampleDiversity(state.family, data, settings.data.split, settings.metrics)
        if process_group.is_main():
            cut_lines(state.place.metrics_file, state.progress.nimg)
        if self.config.every_kimg is None:
            return
        family, networks = state.family, state.ema.networks
        self.measurable = Measurable(family, networks, state.data, state.device)
        for name, reason in self.measurable.missing.items():
            self._tell(name, reason)

    def due(self, before: int, now: int) -> bool:
        """Whether to measure after the step from ``before`` to ``now`` images."""
        if self.config.every_kimg is None:
            return False
        return due(before, now, self.config.every_kimg) or now >= self.state.plan.end

    def probe(self, images: Tensor | None) -> Health | None:
        """The health of the samples; on rank 0 alone.

        Args:
            images: the stage's newest samples, (N, 3, R, R) in [-1, 1]; a family that has a probe
                draws its own.

        Returns:
            None if the family has no probe and there are fewer than two images.
        """
        if isinstance(self.state.family, Probes):
            return self.state.probe()
        if images is None or len(images) < 2:
            return None
        return self.diversity.health(images, self.state.progress.loss)

    def measure(self) -> dict[str, float]:
        """Measure, and take the best into the progress; every rank has to call it.

        What is measured of generated images is written to ``metrics.jsonl`` as well.

        Returns:
            Metric values by ``val/NAME``, those of generated images by ``metrics/NAME``.

        Raises:
            ConfigError: ``eval.metric`` is not measured, or is not available.
        """
        state = self.state
        means: dict[str, float] = {}
        if self.measurable.numbers:
            means, _ = held_out_means(
                state.family,
                state.ema.networks,
                state.data,
                self.config.split,
                self.measurable.numbers,
            )
        metric_values = self._generated() if self.measurable.names else {}
        metric = self.config.metric or next(iter([*means, *metric_values]), "")
        if metric in means:
            self._take(metric, means[metric])
        elif metric in metric_values:
            metric_value = metric_values[metric]
            if metric_value.value is not None:
                self._take(metric, metric_value.value)
            elif self.config.metric is not None:
                raise ConfigError(f"eval.metric: {metric} is not available: {metric_value.reason}")
        else:
            measured = ", ".join([*means, *metric_values])
            raise ConfigError(
                f"eval.metric: family {state.config.family.name} measures "
                f"{measured or 'nothing held out'}: name one of them, or leave out eval"
            )
        there = {name: one.value for name, one in metric_values.items() if one.value is not None}
        return {f"val/{name}": mean for name, mean in means.items()} | {
            f"metrics/{name}": value for name, value in there.items()
        }

    def _tell(self, name: str, reason: str) -> None:
        """Warn, once, that a metric is not measured."""
        if name not in self.told and process_group.is_main():
            log.warning("NOT MEASURED: %s: %s", name, reason)
        self.told.add(name)

    def _generated(self) -> dict[str, MetricValue]:
        """Measure generated images, on all ranks, and add a line to ``metrics.jsonl``."""
        state, measurable = self.state, self.measurable
        asked = [name for name in measurable.names if name != GUIDE_DIVERSITY]
        found = measure(
            asked, measurable.extractors, measurable.subject, cache=state.config.metrics.cache
        )
        if GUIDE_DIVERSITY in measurable.names:
            scalars = None
            with process_group.rank_zero_section() as mine:
                if mine:
                    scalars = state.probe().scalars
            found.add(guide_diversity(state.family, process_group.broadcast_object(scalars)), None)
        for name, metric_value in found.metric_values.items():
            if metric_value.reason is not None:
                self._tell(name, metric_value.reason)
        if process_group.is_main():
            line = {
                "nimg": state.progress.nimg,
                "stage": state.stage.resolution,
                "metrics": {name: one.to_dict() for name, one in found.metric_values.items()},
                "fingerprints": found.fingerprints,
            }
            append_line(state.place.metrics_file, line)
        return found.metric_values

    def _take(self, metric: str, value: float) -> None:
        """Compare with the best so far; the same metric values decide the same on every rank."""
        state, progress = self.state, self.state.progress
        sign = -1 if metric in self.measurable.names and better(metric) == "higher" else 1
        best = progress.best
        if math.isfinite(value) and (best is None or sign * value < sign * best):
            progress.best, progress.best_nimg, progress.num_worse = value, progress.nimg, 0
            return
        progress.num_worse += 1
        if state.ended_early and process_group.is_main():
            log.warning(
                "at %d images: ended early: %s was no better than %.4g (at %d images) %d times",
                progress.nimg,
                metric,
                best if best is not None else math.nan,
                progress.best_nimg,
                progress.num_worse,
            )
