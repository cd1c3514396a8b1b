"""Trials by Optuna: values suggested from results, and a storage that several machines share."""

from __future__ import annotations

import hashlib
import json
import logging
import re
import secrets
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from dinogen.config.search import ParameterConfig, SearchConfig
from dinogen.errors import ConfigError, UserError
from dinogen.files import write_json
from dinogen.runs.files import read_object
from launch.study.trials import Report, StorageError, Trial, Trials, check_same, points

try:
    import optuna
    from optuna.distributions import (
        BaseDistribution,
        CategoricalDistribution,
        FloatDistribution,
        IntDistribution,
    )
    from optuna.samplers import BaseSampler, GPSampler, TPESampler
    from optuna.study import StudyDirection
    from optuna.trial import FrozenTrial, TrialState
except ImportError as error:
    raise UserError(
        f"search.method tpe and gp, and search.storage, need optuna ({error}): "
        "pip install 'dinogen[optuna]'"
    ) from None

optuna.logging.set_verbosity(optuna.logging.WARNING)
log = logging.getLogger(__name__)
T = TypeVar("T")

# Seconds that a study waits for its storage, and between two tries.
_PATIENCE, _PAUSE = 600.0, 1.0

_STATES = {
    "begun": TrialState.RUNNING,
    "done": TrialState.COMPLETE,
    "pruned": TrialState.PRUNED,
    "failed": TrialState.FAIL,
}


def seed_of(search: SearchConfig, number: int) -> int:
    """Seed of the sampler that suggests one trial.

    Each trial has a sampler of its own, so a search that was killed goes on with the same values.
    """
    digest = hashlib.sha256(f"{search.seed}/{number}".encode()).digest()
    return int.from_bytes(digest[:4], "big")


def distribution(parameter: ParameterConfig) -> BaseDistribution:
    """A parameter in Optuna's terms."""
    if parameter.choices is not None:
        return CategoricalDistribution([_category(one) for one in parameter.choices])
    low, high, step = parameter.low, parameter.high, parameter.step
    assert low is not None and high is not None
    if parameter.whole:
        return IntDistribution(int(low), int(high), log=parameter.log, step=int(step or 1))
    return FloatDistribution(low, high, log=parameter.log, step=step)


def _category(choice: Any) -> Any:
    plain = choice is None or isinstance(choice, (bool, int, float, str))
    return choice if plain else json.dumps(choice)


def _chosen(search: SearchConfig, params: Mapping[str, Any]) -> dict[str, Any]:
    """Optuna's values as those of the config, in the order of the plan."""
    values: dict[str, Any] = {}
    for key, one in search.parameters.items():
        if key in params:
            value = params[key]
            known = [choice for choice in one.choices or () if _category(choice) == value]
            values[key] = known[0] if known else value
    return values


class _Numbered(BaseSampler):
    """A sampler of its own for each trial, by its number."""

    def __init__(self, make: Callable[[int], BaseSampler]) -> None:
        self._make = make
        self._of: dict[int, BaseSampler] = {}

    def _sampler(self, number: int) -> BaseSampler:
        if number not in self._of:
            self._of = {number: self._make(number)}
        return self._of[number]

    def infer_relative_search_space(
        self, study: optuna.Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        return self._sampler(trial.number).infer_relative_search_space(study, trial)

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        return self._sampler(trial.number).sample_relative(study, trial, search_space)

    def sample_independent(
        self,
        study: optuna.Study,
        trial: FrozenTrial,
        param_name: str,
        param_distribution: BaseDistribution,
    ) -> Any:
        sampler = self._sampler(trial.number)
        return sampler.sample_independent(study, trial, param_name, param_distribution)


class _Point(BaseSampler):
    """The values of one trial of a grid, or of random ones."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self._values = values

    def infer_relative_search_space(
        self, study: optuna.Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        return {}

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        return {}

    def sample_independent(
        self,
        study: optuna.Study,
        trial: FrozenTrial,
        param_name: str,
        param_distribution: BaseDistribution,
    ) -> Any:
        return _category(self._values[param_name])


def sampler(search: SearchConfig) -> BaseSampler:
    """What suggests the values of each trial."""
    if not search.learns:
        known = list(points(search))
        return _Numbered(lambda number: _Point(known[min(number, len(known) - 1)]))

    def make(number: int) -> BaseSampler:
        seed = seed_of(search, number)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            if search.method == "gp":
                return GPSampler(seed=seed)
            return TPESampler(seed=seed, constant_liar=True)

    return _Numbered(make)


def _direction(better: str) -> StudyDirection:
    return StudyDirection.MAXIMIZE if better == "higher" else StudyDirection.MINIMIZE


def in_memory(search: SearchConfig, better: str, trials: Sequence[Trial]) -> optuna.Study:
    """A study of Optuna with these trials; failed and running ones keep their numbers."""
    study = optuna.create_study(direction=_direction(better), sampler=sampler(search))
    space = {key: distribution(one) for key, one in search.parameters.items()}
    for trial in trials:
        study.add_trial(
            optuna.trial.create_trial(
                state=_STATES[trial.state],
                params={key: _category(value) for key, value in trial.values.items()},
                distributions=space,
                value=trial.value if trial.state == "done" else None,
                intermediate_values={one.step: one.value for one in trial.reports},
            )
        )
    return study


def suggest(search: SearchConfig, better: str, trials: Sequence[Trial]) -> dict[str, Any]:
    """The values of the next trial, from the results of those before."""
    study = in_memory(search, better, trials)
    asked = study.ask({key: distribution(one) for key, one in search.parameters.items()})
    return _chosen(search, asked.params)


def importances(search: SearchConfig, better: str, trials: Sequence[Trial]) -> dict[str, float]:
    """How much of the differences between good and bad trials each parameter explains.

    PED-ANOVA (Watanabe et al. 2023); shares that add up to 1, largest first. None with fewer than
    four trials that are done.
    """
    done = [one for one in trials if one.state == "done"]
    if len(done) < 4:
        return {}
    from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return get_param_importances(
                in_memory(search, better, done), evaluator=PedAnovaImportanceEvaluator()
            )
        except (ValueError, RuntimeError) as error:
            log.info("no importance of parameters: %s", error)
            return {}


class StoredTrials(Trials):
    """Trials in a storage of Optuna; machines that share it make the trials together.

    Args:
        name: of the study in the storage.
        search, metric, better: as :class:`Trials`.
        mark: file that tells the trials of this study's folder from those of others.
        where: the plan and key, named in errors.
        pruned_by: as :class:`Trials`.

    Raises:
        UserError: the storage is not reachable, or is of another search.
    """

    retries = False  # Optuna changes no trial that has ended

    def __init__(
        self,
        name: str,
        search: SearchConfig,
        metric: str,
        better: str,
        mark: Path,
        where: str,
        pruned_by: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(search, metric, better, pruned_by)
        assert search.storage is not None
        self._mark = mark
        shown = re.sub(r"//[^/@]*@", "//...@", search.storage)  # no password in a message
        self._where = f"{where}: {shown}"
        try:
            self._reach(lambda: self._open(name))
        except StorageError as error:
            raise ConfigError(
                f"{error}: is the address right, and its folder or server there?"
            ) from None

    def _open(self, name: str) -> None:
        assert self.search.storage is not None
        self._study = optuna.create_study(
            storage=_storage(self.search.storage),
            study_name=name,
            direction=_direction(self.better),
            sampler=sampler(self.search),
            load_if_exists=True,
        )
        attributes = self._study.user_attrs
        if not attributes and not self._study.get_trials(deepcopy=False):
            self._study.set_user_attr("search", self.what)
            attributes = {"search": self.what}
        kept = check_same(self.what, attributes.get("search"), self._where)
        if kept != attributes["search"]:
            self._study.set_user_attr("search", kept)

    def _reach(self, access: Callable[[], T], once: bool = False) -> T:
        """The result of an access, which is tried again while a study waits for the storage.

        Raises:
            StorageError: it does not answer; in one line, as each kind has errors of its own.
        """
        end = time.monotonic() + _PATIENCE
        told = False
        while True:
            try:
                return access()
            except UserError:
                raise
            except Exception as error:
                words = str(error).strip().splitlines() or [type(error).__name__]
                why = f"{self._where} is not reachable: {words[0]}"
            if once or time.monotonic() > end or not self.keep_trying():
                raise StorageError(why)
            if not told:
                log.warning("%s: waiting for it up to %.0f s", why, _PATIENCE)
            told = True
            time.sleep(_PAUSE)

    def all(self) -> list[Trial]:
        """See :class:`Trials`."""
        found = self._reach(lambda: self._study.get_trials(deepcopy=False))
        # one that was killed while it was made belongs to none
        owned = [one for one in found if one.user_attrs.get("folder") is not None]
        return [self._trial(one) for one in owned if one.number < self.search.num]

    @property
    def num_left(self) -> int:
        """See :class:`Trials`."""
        found = self._reach(lambda: self._study.get_trials(deepcopy=False))
        return max(0, self.search.num - len(found))

    def ask(self) -> Trial | None:
        """See :class:`Trials`."""
        if not self.num_left:
            return None
        if self._folder is None:
            write_json(self._mark, {"folder": secrets.token_hex(8)})
        space = {key: distribution(one) for key, one in self.search.parameters.items()}
        # a second try could make a second trial
        asked = self._reach(lambda: self._study.ask(space), once=True)
        if asked.number >= self.search.num:  # another machine was faster
            self._reach(
                lambda: self._study.tell(asked, state=TrialState.FAIL, skip_if_finished=True)
            )
            return None
        self._reach(lambda: asked.set_user_attr("folder", self._folder))
        return Trial(asked.number, _chosen(self.search, asked.params))

    def report(self, trial: Trial, report: Report, why: str | None) -> None:
        """See :class:`Trials`."""
        trial.reports.append(report)

        def write() -> None:
            known = self._known(trial)
            known.set_user_attr(f"nimg-{report.step}", report.nimg)
            known.report(report.value, report.step)

        self._reach(write)
        if why is not None:
            trial.state, trial.why = "pruned", why
            self.end(trial)

    def end(self, trial: Trial) -> None:
        """See :class:`Trials`; what has ended in a storage stays as it is."""
        value = trial.value if trial.state == "done" else None
        state = _STATES[trial.state]

        def write() -> None:
            known = self._known(trial)
            known.set_user_attr("why", trial.why)
            known.set_user_attr("fingerprint", trial.fingerprint)
            known.set_user_attr("alike", trial.alike)
            self._study.tell(trial.number, value, state=state, skip_if_finished=True)

        self._reach(write)

    @property
    def _folder(self) -> str | None:
        """Names the study's folder, wherever it is mounted; None before its first trial."""
        folder = (read_object(self._mark).value or {}).get("folder")
        return None if folder is None else str(folder)

    def _known(self, trial: Trial) -> optuna.Trial:
        frozen = self._study.get_trials(deepcopy=False)[trial.number]
        return optuna.Trial(self._study, frozen._trial_id)

    def _trial(self, frozen: FrozenTrial) -> Trial:
        names = {state: name for name, state in _STATES.items()}
        attributes, here = frozen.user_attrs, self._folder
        reports = [
            Report(step, attributes.get(f"nimg-{step}", 0), value)
            for step, value in sorted(frozen.intermediate_values.items())
        ]
        return Trial(
            frozen.number,
            _chosen(self.search, frozen.params),
            names.get(frozen.state, "begun"),  # type: ignore[arg-type]
            frozen.value if frozen.state == TrialState.COMPLETE else None,
            attributes.get("fingerprint"),
            attributes.get("alike"),
            attributes.get("why", ""),
            reports,
            elsewhere=here is None or attributes.get("folder") != here,
        )


def _storage(address: str) -> optuna.storages.BaseStorage | str:
    """A database by its URL, or a journal in a file."""
    if "://" in address:
        return address
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    return JournalStorage(JournalFileBackend(address))
