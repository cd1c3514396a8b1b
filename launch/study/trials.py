"""The trials of a search: their values and what became of them, in a file of the study."""

from __future__ import annotations

import itertools
import random
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from dinogen.config.search import SearchConfig
from dinogen.errors import EXIT_STOPPED, UserError
from dinogen.files import write_json
from dinogen.runs.files import read_object

State = Literal["begun", "done", "pruned", "failed"]
FORMAT = 1
_OF_PRUNING = ("search.prune.", "eval.")
_MOST = 60  # characters of a trial's values in the name of its folder


@dataclass(frozen=True)
class Report:
    """A metric value that was measured while a trial trained.

    Attributes:
        step: number of the measurement, or of the point in ``at_kimg``, from 1 on.
        nimg: images shown by then.
        value: of the metric.
    """

    step: int
    nimg: int
    value: float


@dataclass
class Trial:
    """One choice of values.

    Attributes:
        number: from 0 on.
        values: by key of the config.
        state: what became of it.
        value: of the study's metric at its end; None if it was not measured.
        fingerprint: of that value.
        alike: what it has in common with the values that it can be compared with
            (:func:`dinogen.runs.fingerprint.alike_id`); None of trials of earlier versions.
        why: why it was pruned, or failed.
        reports: values that decided about pruning, oldest first.
        elsewhere: whether its run is in the folder of another machine.
    """

    number: int
    values: dict[str, Any]
    state: State = "begun"
    value: float | None = None
    fingerprint: str | None = None
    alike: str | None = None
    why: str = ""
    reports: list[Report] = field(default_factory=list)
    elsewhere: bool = False

    @property
    def ended(self) -> bool:
        """Whether nothing is left of it; one that has failed may be tried again."""
        return self.state in ("done", "pruned")

    @property
    def overrides(self) -> list[str]:
        """Its values as changes to the config."""
        return [f"{key}={as_yaml(value)}" for key, value in self.values.items()]

    @property
    def words(self) -> str:
        """Its values: ``lr 0.0003, batch 32``."""
        return ", ".join(f"{key} {_word(value)}" for key, value in self._short().items())

    def name(self, label: str) -> str:
        """Name of its run, by number and values.

        Args:
            label: of the config.
        """
        parts = (f"{key}{_word(value)}" for key, value in self._short().items())
        words = re.sub(r"[^A-Za-z0-9._-]+", "_", "-".join(parts))[:_MOST].strip("-_")
        return f"{label}-{self.number:03d}-{words}"

    def _short(self) -> dict[str, Any]:
        """Values by the last word of their keys, of two if that would be ambiguous."""
        last = [key.rpartition(".")[2] for key in self.values]
        return {
            word if last.count(word) == 1 else "_".join(key.split(".")[-2:]): value
            for word, (key, value) in zip(last, self.values.items(), strict=True)
        }


def as_yaml(value: Any) -> str:
    """A value as YAML on one line."""
    text: str = yaml.safe_dump(value, default_flow_style=True, width=float("inf"))
    return text.removesuffix("\n").removesuffix("\n...")


def _word(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else as_yaml(value)


def points(search: SearchConfig) -> Iterator[dict[str, Any]]:
    """The values of the trials of ``grid`` or ``random``, in order.

    The last parameter of a grid changes fastest. Random values of a trial depend on the seed, its
    number and the key alone; what would be an earlier trial again is drawn once more.
    """
    keys = list(search.parameters)
    if search.method == "grid":
        every = (
            [one.value(i) for i in range(one.num_values or 0)] for one in search.parameters.values()
        )
        for combination in itertools.product(*every):
            yield dict(zip(keys, combination, strict=True))
        return
    seen: list[dict[str, Any]] = []
    for number in range(search.num):
        for again in itertools.count():
            values = {
                key: one.at(random.Random(f"{search.seed}/{number}/{again}/{key}").random())
                for key, one in search.parameters.items()
            }
            if values not in seen:
                break
        seen.append(values)
        yield values


Suggest = Callable[[SearchConfig, str, Sequence[Trial]], dict[str, Any]]


class StorageError(UserError):
    """The storage of the trials does not answer; the same command goes on when it does."""

    exit_code = EXIT_STOPPED


def _never() -> bool:
    return False


class Trials(ABC):
    """The trials of one config.

    Args:
        search: the section of the plan.
        metric: the study's.
        better: which way it is better.
        pruned_by: what the values that decide about pruning depend on, by key.

    Attributes:
        retries: whether a trial that has failed can be tried again.
        keep_trying: asked whether to wait for a storage that does not answer.
    """

    retries = True

    def __init__(
        self,
        search: SearchConfig,
        metric: str,
        better: str,
        pruned_by: Mapping[str, Any] | None = None,
    ) -> None:
        self.search, self.metric, self.better = search, metric, better
        self._pruned_by = dict(pruned_by or {})
        self.keep_trying: Callable[[], bool] = _never

    @property
    def what(self) -> dict[str, Any]:
        """What may not change once there are trials."""
        dumped = self.search.model_dump(mode="json", include={"parameters", "method", "seed"})
        named = {f"search.{key}": value for key, value in dumped.items()}
        return named | {"metric": self.metric} | self._pruned_by

    @abstractmethod
    def all(self) -> list[Trial]:
        """The trials that are known, by number."""

    @property
    @abstractmethod
    def num_left(self) -> int:
        """Number of trials that are not known yet."""

    @abstractmethod
    def ask(self) -> Trial | None:
        """A further trial; None if there are enough."""

    @abstractmethod
    def report(self, trial: Trial, report: Report, why: str | None) -> None:
        """Record a value, and why it prunes the trial if it does."""

    @abstractmethod
    def end(self, trial: Trial) -> None:
        """Record how a trial ended."""


class FolderTrials(Trials):
    """Trials in a JSON file; one process at a time changes it, under the lock of the study.

    Args:
        search, metric, better: as :class:`Trials`.
        path: the file.
        suggest: values of the next trial, where they depend on those before.
        pruned_by: as :class:`Trials`.

    Raises:
        UserError: the file cannot be read, or is of another search.
    """

    def __init__(
        self,
        search: SearchConfig,
        metric: str,
        better: str,
        path: Path,
        suggest: Suggest | None = None,
        pruned_by: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(search, metric, better, pruned_by)
        self.path = path
        self._kept = self.what
        self._suggest = suggest
        self._trials = self._read()
        if not search.learns:
            known = {trial.number for trial in self._trials}
            planned = (Trial(i, values) for i, values in enumerate(points(search)))
            self._trials += [trial for trial in planned if trial.number not in known]
            self._trials.sort(key=lambda trial: trial.number)

    def all(self) -> list[Trial]:
        """See :class:`Trials`."""
        return self._trials

    @property
    def num_left(self) -> int:
        """See :class:`Trials`."""
        return max(0, self.search.num - len(self._trials))

    def ask(self) -> Trial | None:
        """See :class:`Trials`."""
        if not self.num_left or self._suggest is None:
            return None
        values = self._suggest(self.search, self.better, self._trials)
        trial = Trial(len(self._trials), values)
        self._trials.append(trial)
        self._write()
        return trial

    def report(self, trial: Trial, report: Report, why: str | None) -> None:
        """See :class:`Trials`."""
        trial.reports.append(report)
        if why is not None:
            trial.state, trial.why = "pruned", why
        self._write()

    def end(self, trial: Trial) -> None:
        """See :class:`Trials`."""
        self._write()

    def _read(self) -> list[Trial]:
        found = read_object(self.path)
        if not found.there:
            return []
        data = found.value or {}
        remedy = (
            "move it away; trials of grid and random are the same again, and their runs are kept"
        )
        if found.problems or data.get("format") != FORMAT:
            why = found.problems[0] if found.problems else f": format {data.get('format')!r}"
            raise UserError(f"{self.path}: cannot be read{why}: {remedy}")
        self._kept = check_same(self.what, data.get("search"), str(self.path))
        try:
            return [
                Trial(**one | {"reports": [Report(**report) for report in one["reports"]]})
                for one in data["trials"]
            ]
        except (KeyError, TypeError) as error:
            raise UserError(f"{self.path}: trials: cannot be read ({error}): {remedy}") from None

    def _write(self) -> None:
        trials = [asdict(one) for one in self._trials if one.reports or one.state != "begun"]
        if self.search.learns:
            trials = [asdict(one) for one in self._trials]
        facts = {"format": FORMAT, "search": self._kept, "trials": trials}
        write_json(self.path, facts)


def check_same(now: dict[str, Any], then: Any, where: str) -> dict[str, Any]:
    """Refuse trials of another search.

    Returns:
        All that may not change: what held then, and what the plan adds. Pruning may begin and end
        later, but may not compare other values than before.

    Raises:
        UserError: naming what differs.
    """
    before = then if isinstance(then, dict) else {}
    for key, value in now.items():
        if key not in before and key.startswith(_OF_PRUNING):
            continue
        if before.get(key) != value:
            name = key.removeprefix("search.")
            raise UserError(
                f"{key}: {where} holds trials of another search ({name}: {before.get(key)!r} "
                f"there, {value!r} in the plan): restore {name}, or use another folder: and "
                "storage:"
            )
    return before | now
