"""Measures the moving averages on held-out samples while a run trains; says when to end it."""

from __future__ import annotations

import logging
import math

from dinogen import dist
from dinogen.config import ConfigError
from dinogen.training.heldout import chosen_samples, held_out_means
from dinogen.training.stages import due
from dinogen.training.state import StageState

log = logging.getLogger(__name__)


class Validator:
    """Measures where the clock says so, and keeps the best figure in the run's progress.

    Args:
        state: of the stage.

    Raises:
        ConfigError: the data hold nothing back.
    """

    def __init__(self, state: StageState) -> None:
        self.state = state
        self.config = state.config.eval
        self.numbers: list[int] = []
        if self.config.every_kimg is not None:
            num = self.config.num_samples
            self.numbers = chosen_samples(state.data, self.config.split, num, "eval.split")

    def due(self, before: int, now: int) -> bool:
        """Whether to measure after the step from ``before`` to ``now`` images."""
        if self.config.every_kimg is None:
            return False
        return due(before, now, self.config.every_kimg) or now >= self.state.plan.end

    def measure(self) -> dict[str, float]:
        """Measure, and take the best into the progress; every rank has to call it.

        Returns:
            Figures by ``val/NAME``.

        Raises:
            ConfigError: the family has no such figure as ``eval.metric``.
        """
        state, progress = self.state, self.state.progress
        means, _ = held_out_means(
            state.family, state.ema.networks, state.data, self.config.split, self.numbers
        )
        metric = self.config.metric or next(iter(means), "")
        if metric not in means:
            raise ConfigError(
                f"eval.metric: family {state.config.family.name} measures "
                f"{', '.join(means) or 'nothing held out'}: name one of them, or leave out eval"
            )
        value = means[metric]
        if math.isfinite(value) and (progress.best is None or value < progress.best):
            progress.best, progress.best_nimg, progress.num_worse = value, progress.nimg, 0
        else:
            progress.num_worse += 1
            if state.ended_early and dist.is_main():
                log.warning(
                    "at %d images: ended early: %s was no better than %.4g (at %d images) %d times",
                    progress.nimg,
                    metric,
                    progress.best if progress.best is not None else math.nan,
                    progress.best_nimg,
                    progress.num_worse,
                )
        return {f"val/{name}": mean for name, mean in means.items()}
