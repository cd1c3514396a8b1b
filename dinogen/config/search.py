"""The section ``search:`` of a study: parameters, how values are chosen, which trials end early."""

from __future__ import annotations

import itertools
import math
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Field, model_validator

from dinogen.config.base import Section

# The study decides where each run is, and with which seeds it is repeated.
OF_THE_STUDY = ("run", "seed")
_NUM_PARALLEL = 4  # of a method that learns from the trials before
_MOST_TRIALS = 10_000  # every command of a study makes the list of them


class ParameterConfig(Section):
    """The values that one key of a config may take: a list, or a range."""

    model_config = ConfigDict(extra="forbid", validate_default=True, populate_by_name=True)

    choices: tuple[Any, ...] | None = Field(
        None, description="the values; a list in the place of the mapping is short for it"
    )
    low: float | None = Field(None, description="smallest value of a range")
    high: float | None = Field(None, description="largest value of a range")
    log: bool = Field(False, description="equal factors are equally likely, as for learning rates")
    step: float | None = Field(
        None, gt=0, description="only low, low + step, low + 2 step, ... up to high"
    )
    whole: bool = Field(False, alias="int", description="whole numbers only")

    @model_validator(mode="after")
    def _check(self) -> ParameterConfig:
        if self.choices is not None:
            if self.model_fields_set - {"choices"}:
                raise ValueError("give a list of choices or a range, not both")
            if not self.choices:
                raise ValueError("the list of choices is empty: give it a value")
            # 8 and 8.0 are one choice, also for Optuna
            if any(one == other for one, other in itertools.combinations(self.choices, 2)):
                raise ValueError(f"{list(self.choices)}: list each choice once")
            return self
        if self.low is None or self.high is None:
            raise ValueError("give a list of choices, or low and high")
        if not (math.isfinite(self.low) and math.isfinite(self.high)):
            raise ValueError("low and high must be finite")
        if self.low >= self.high:
            raise ValueError(
                f"the range is empty: low is {self.low:g} and high {self.high:g}: low must be "
                "below high"
            )
        if self.log and self.low <= 0:
            raise ValueError(f"low is {self.low:g}, but log needs low > 0: raise low, or drop log")
        if self.log and self.step is not None:
            raise ValueError("log and step exclude each other: list the values instead")
        if self.whole and any(
            one is not None and one != int(one) for one in (self.low, self.high, self.step)
        ):
            raise ValueError("int: true needs whole numbers for low, high and step")
        return self

    @property
    def num_values(self) -> int | None:
        """Number of values; None if the range is continuous."""
        if self.choices is not None:
            return len(self.choices)
        step = self._step
        if step is None:
            return None
        assert self.low is not None and self.high is not None
        return math.floor((self.high - self.low) / step + 1e-9) + 1

    @property
    def _step(self) -> float | None:
        return self.step or (1.0 if self.whole else None)

    def value(self, number: int) -> Any:
        """One of the values, in order and from 0 on; the range is not continuous."""
        if self.choices is not None:
            return self.choices[number]
        assert self.low is not None and self._step is not None
        return self._number(self.low + number * self._step)

    def at(self, share: float) -> Any:
        """The value that this share of the distribution lies below.

        Args:
            share: from 0 (inclusive) to 1 (exclusive); uniform shares give the distribution.
        """
        num = None if self.log else self.num_values
        if num is not None:
            return self.value(min(int(share * num), num - 1))
        assert self.low is not None and self.high is not None
        half = 0.5 if self.whole else 0.0  # each whole number gets its share of the range
        low, high = self.low - half, self.high + half
        if not self.log:
            return self._number(low + share * (high - low))
        value = math.exp(math.log(low) + share * (math.log(high) - math.log(low)))
        return self._number(min(max(value, self.low), self.high))

    def _number(self, value: float) -> float | int:
        # 12 digits: 0.1 + 2 * 0.1 is 0.3
        return round(value) if self.whole else float(f"{value:.12g}")


def _as_parameter(value: Any) -> Any:
    return {"choices": value} if isinstance(value, list) else value


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


class PruneConfig(Section):
    """When a trial is stopped because others were better at the same point."""

    method: Literal["median", "successive_halving", "none"] = Field(
        "median",
        description="median: its best value so far is worse than the median of the trials that "
        "are done; successive_halving: it is not among the best 1 in factor of all trials that "
        "came this far",
    )
    metric: str | None = Field(
        None, description="metric of eval.generated that is compared; default: the study's"
    )
    at_kimg: tuple[Annotated[float, Field(gt=0)], ...] = Field(
        (),
        description="compare at the first measurement at or after each of these; default: at every "
        "measurement, of successive_halving at the first, then after factor times as many",
    )
    min_trials: int = Field(
        5, ge=0, description="fewest trials to compare with; with fewer none is pruned"
    )
    factor: int = Field(3, ge=2, description="of successive_halving")

    @model_validator(mode="after")
    def _rising(self) -> PruneConfig:
        if any(b <= a for a, b in itertools.pairwise(self.at_kimg)):
            raise ValueError(f"at_kimg: {list(self.at_kimg)} must rise")
        return self


class SearchConfig(Section):
    """Trials of a config in its place: the same run with other values of some keys."""

    over: Annotated[tuple[str, ...], BeforeValidator(_as_list)] = Field(
        ..., min_length=1, description="configs of the tracks, by name or as TRACK/NAME"
    )
    parameters: dict[str, Annotated[ParameterConfig, BeforeValidator(_as_parameter)]] = Field(
        ..., min_length=1, description="by key of the config: a list, or low, high, log, step, int"
    )
    method: Literal["grid", "random", "tpe", "gp"] = Field(
        "random",
        description="grid: every combination; random; tpe and gp learn from the trials before "
        "(of the package optuna)",
    )
    num_trials: int | None = Field(
        None, ge=1, description="trials of each config, pruned and failed ones too; grid: all"
    )
    seed: int = Field(0, ge=0, lt=2**63, description="the same seed gives the same trials")
    num_parallel: int | None = Field(
        None,
        ge=1,
        description="trials that are queued at once on SLURM; default: all, of tpe and gp "
        f"{_NUM_PARALLEL}",
    )
    prune: PruneConfig | None = Field(None, description="none is stopped early if left out")
    storage: str | None = Field(
        None,
        description="database of optuna that several machines share (sqlite:///FILE, ...), or a "
        "file for its journal; default: files in the study's folder",
    )

    @model_validator(mode="after")
    def _check(self) -> SearchConfig:
        for key in self.parameters:
            if key in OF_THE_STUDY:
                raise ValueError(
                    f"parameters.{key}: the study sets the folder and the seed of each run"
                )
        size = self.num_points
        if self.method == "grid":
            for key, one in self.parameters.items():
                if one.num_values is None or one.log:
                    raise ValueError(
                        f"parameters.{key}: a grid needs single values: give a list"
                        + ("" if one.log else ", or a step")
                    )
            if self.num_trials is not None:
                raise ValueError(
                    f"num_trials: leave it out: the grid has {size} points, and all are tried"
                )
        elif self.num_trials is None:
            raise ValueError(f"num_trials is missing: how many trials does {self.method} make?")
        elif self.method == "random" and size is not None and size < self.num_trials:
            raise ValueError(
                f"num_trials is {self.num_trials}, but there are only {size} combinations: use "
                "method: grid"
            )
        if self.num > _MOST_TRIALS:
            raise ValueError(
                f"{self.num} trials are too many: at most {_MOST_TRIALS}: "
                + ("give fewer values" if self.method == "grid" else "lower num_trials")
            )
        return self

    @property
    def num_points(self) -> int | None:
        """Number of combinations of values; None if a range is continuous."""
        nums = [one.num_values for one in self.parameters.values()]
        known = [one for one in nums if one is not None]
        return math.prod(known) if len(known) == len(nums) else None

    @property
    def num(self) -> int:
        """Number of trials."""
        found = self.num_points if self.num_trials is None else self.num_trials
        assert found is not None
        return found

    @property
    def learns(self) -> bool:
        """Whether a trial depends on the results of those before."""
        return self.method in ("tpe", "gp")

    @property
    def most_at_once(self) -> int:
        """Largest number of trials that are queued at once on SLURM."""
        return self.num_parallel or (_NUM_PARALLEL if self.learns else self.num)
