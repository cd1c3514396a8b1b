"""TPE and pruning against Optuna itself; trials in a storage that two machines share."""

from __future__ import annotations

import math
import random
import re
from dataclasses import replace

import pytest

from dinogen.config.search import PruneConfig, SearchConfig
from dinogen.errors import UserError
from launch.study.prune import why_pruned
from launch.study.trials import FolderTrials, Report, Trial, points

optuna = pytest.importorskip("optuna")
optuna.logging.set_verbosity(optuna.logging.ERROR)
pytestmark = pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")

from launch.study.stored import StoredTrials, importances, seed_of, suggest  # noqa: E402

PARAMETERS = {
    "stages.0.lr": {"low": 1e-5, "high": 1e-1, "log": True},
    "stages.0.batch": [8, 16, 32],
    "family.depth": {"low": 1, "high": 6, "int": True},
}


def search(**more):
    facts = {"over": "a", "parameters": PARAMETERS, "method": "tpe", "num_trials": 30, "seed": 3}
    return SearchConfig.model_validate(facts | more)


def objective(values):
    """Least at lr 1e-3, batch 16, depth 4."""
    lr, batch, depth = values.values()
    return (math.log10(lr) + 3) ** 2 + abs(batch - 16) / 16 + 0.1 * (depth - 4) ** 2


def finish(trials, trial, value):
    trial.state, trial.value = "done", value
    trial.fingerprint, trial.alike = "f", "g"
    trials.end(trial)


def by_optuna_itself(settings, num, direction="minimize"):
    study = optuna.create_study(direction=direction)
    for number in range(num):
        study.sampler = optuna.samplers.TPESampler(
            seed=seed_of(settings, number), constant_liar=True
        )
        trial = study.ask()
        values = {
            "stages.0.lr": trial.suggest_float("stages.0.lr", 1e-5, 1e-1, log=True),
            "stages.0.batch": trial.suggest_categorical("stages.0.batch", [8, 16, 32]),
            "family.depth": trial.suggest_int("family.depth", 1, 6),
        }
        study.tell(trial, objective(values))
    return [one.params for one in study.trials]


def test_tpe_suggests_what_optuna_suggests_also_after_a_restart(tmp_path):
    settings = search()
    for number in range(30):
        # opened again for each trial, as after a kill
        trials = FolderTrials(settings, "fid", "lower", tmp_path / "trials.json", suggest)
        trial = trials.ask()
        assert trial.number == number
        finish(trials, trial, objective(trial.values))
    trials = FolderTrials(settings, "fid", "lower", tmp_path / "trials.json", suggest)
    assert trials.ask() is None
    expected = by_optuna_itself(settings, 30)
    assert [one.values for one in trials.all()] == expected
    # it has learnt: the later half is better
    values = [one.value for one in trials.all()]
    assert sum(values[20:]) < 0.6 * sum(values[:10])


@pytest.mark.parametrize("kind", ["sqlite:///{}/sweep.db", "{}/journal.log"])
def test_in_a_storage_they_are_the_same(tmp_path, kind):
    settings = search(storage=kind.format(tmp_path), num_trials=14)
    for number in range(14):
        trials = StoredTrials("gan/a", settings, "fid", "lower", tmp_path / "mark.json", "plan")
        trial = trials.ask()
        assert trial.number == number and not trial.elsewhere
        trials.report(trial, Report(1, 500, 7.0), None)
        finish(trials, trial, objective(trial.values))
    assert trials.ask() is None
    assert [one.values for one in trials.all()] == by_optuna_itself(settings, 14)
    assert trials.all()[3].reports == [Report(1, 500, 7.0)]
    assert (trials.all()[3].fingerprint, trials.all()[3].alike) == ("f", "g")


@pytest.mark.parametrize("method", ["random", "grid"])
def test_two_machines_share_the_trials_of_a_storage(tmp_path, method):
    storage = f"sqlite:///{tmp_path}/sweep.db"
    parameters = {"a": [1, 2, 3], "b": ["x", "y"]}
    given = {"storage": storage, "method": method, "parameters": parameters, "num_trials": None}
    settings = search(**given | ({"num_trials": 6} if method == "random" else {}))
    first, second = (
        StoredTrials("gan/a", settings, "fid", "lower", tmp_path / mark, "plan")
        for mark in ("one.json", "two.json")
    )
    asked = [trials.ask() for trials in (first, second, second, first, second, first)]
    assert [one.values for one in asked] == list(points(settings))
    assert first.ask() is None and second.ask() is None and first.num_left == 0
    first.report(asked[0], Report(1, 100, 2.0), "worse than the others")
    finish(second, asked[1], 1.5)
    asked[3].state, asked[3].why = "failed", "no memory"
    first.end(asked[3])
    seen = first.all()
    assert [one.elsewhere for one in seen] == [False, True, True, False, True, False]
    assert [one.state for one in seen] == ["pruned", "done", "begun", "failed", "begun", "begun"]
    assert [seen[0].why, seen[1].value, seen[3].why] == ["worse than the others", 1.5, "no memory"]


def test_a_storage_that_is_not_there_or_of_another_search(tmp_path):
    def opened(address, **more):
        given = search(storage=address, **more)
        return StoredTrials("gan/a", given, "fid", "lower", tmp_path / "m", "plan: search.storage")

    with pytest.raises(UserError, match=r"search.storage: .*not reachable.*unable to open"):
        opened(f"sqlite:///{tmp_path}/no/such/folder/x.db")
    with pytest.raises(UserError, match="not reachable") as error:
        opened("nosuchdatabase://me:secret@host/x")
    assert "secret" not in str(error.value) and "\n" not in str(error.value)
    address = f"sqlite:///{tmp_path}/sweep.db"
    opened(address).ask()
    with pytest.raises(UserError, match=r"search.seed: .* another search \(seed: 3 there, 4 in"):
        opened(address, seed=4)
    assert opened(address, num_trials=40).all()[0].number == 0


def test_trials_of_another_search_in_the_folder(tmp_path):
    path = tmp_path / "trials.json"
    trials = FolderTrials(search(), "fid", "lower", path, suggest)
    finish(trials, trials.ask(), 1.0)
    with pytest.raises(
        UserError, match=re.escape(f"metric: {path} holds trials of another search")
    ):
        FolderTrials(search(), "kid", "lower", path)
    path.write_text("{")
    with pytest.raises(UserError, match=r"cannot be read.*move it away"):
        FolderTrials(search(), "fid", "lower", path)


@pytest.mark.parametrize("kind", ["folder", "storage"])
def test_pruning_may_begin_later_and_then_its_values_stay(tmp_path, kind):
    settings = search(storage=f"{tmp_path}/journal.log")

    def opened(**pruned_by):
        if kind == "folder":
            path = tmp_path / "trials.json"
            return FolderTrials(settings, "fid", "lower", path, suggest, pruned_by)
        where = "plan: search.storage"
        return StoredTrials("gan/a", settings, "fid", "lower", tmp_path / "m", where, pruned_by)

    trials = opened()
    finish(trials, trials.ask(), 1.0)
    trials = opened(**{"eval.every_kimg": 1.0})
    trials.report(trials.ask(), Report(1, 1000, 2.0), None)
    with pytest.raises(UserError, match=r"^eval.every_kimg: .*1.0 there, 0.5 in the plan"):
        opened(**{"eval.every_kimg": 0.5})
    opened()


def in_optuna(pruner, direction, curves):
    """Which trials Optuna prunes, and after which step; one trial after the other."""
    study = optuna.create_study(direction=direction, pruner=pruner)
    pruned = []
    for curve in curves:
        trial = study.ask()
        for step, value in enumerate(curve, start=1):
            trial.report(value, step)
            if trial.should_prune():
                pruned.append(step)
                study.tell(trial, state=optuna.trial.TrialState.PRUNED)
                break
        else:
            pruned.append(None)
            study.tell(trial, curve[-1])
    return pruned


def by_us(prune, better, curves):
    trials, pruned = [], []
    for number, curve in enumerate(curves):
        trial = Trial(number, {})
        for step, value in enumerate(curve, start=1):
            told = replace(trial, reports=[*trial.reports, Report(step, 1000 * step, value)])
            why = why_pruned(prune, "fid", better, told, trials)
            trial = told
            if why is not None:
                trial.state, trial.why = "pruned", why
                pruned.append(step)
                break
        else:
            trial.state, trial.value = "done", curve[-1]
            pruned.append(None)
        trials.append(trial)
    return pruned


def curves(seed, num=40, steps=9):
    """Falling, each towards an end of its own, with noise."""
    draw = random.Random(seed)
    ends = [draw.random() for _ in range(num)]
    return [[end + 1 / step + 0.2 * draw.random() for step in range(1, steps + 1)] for end in ends]


@pytest.mark.parametrize("better", ["lower", "higher"])
@pytest.mark.parametrize("min_trials", [1, 5])
@pytest.mark.parametrize("seed", range(3))
def test_the_median_prunes_as_in_optuna(better, min_trials, seed):
    given = curves(seed)
    if better == "higher":
        given = [[-value for value in curve] for curve in given]
    pruner = optuna.pruners.MedianPruner(n_startup_trials=min_trials, n_warmup_steps=0)
    expected = in_optuna(pruner, "maximize" if better == "higher" else "minimize", given)
    assert by_us(PruneConfig(min_trials=min_trials), better, given) == expected
    assert 5 < sum(one is not None for one in expected) < 40


@pytest.mark.parametrize("better", ["lower", "higher"])
@pytest.mark.parametrize("factor", [2, 3, 4])
@pytest.mark.parametrize("seed", range(3))
def test_successive_halving_prunes_as_in_optuna(better, factor, seed):
    given = curves(seed)
    if better == "higher":
        given = [[-value for value in curve] for curve in given]
    pruner = optuna.pruners.SuccessiveHalvingPruner(min_resource=1, reduction_factor=factor)
    expected = in_optuna(pruner, "maximize" if better == "higher" else "minimize", given)
    prune = PruneConfig(method="successive_halving", factor=factor, min_trials=0)
    assert by_us(prune, better, given) == expected
    assert set(expected) > {None, 1}


def test_the_reason_says_what_was_compared():
    prune = PruneConfig(min_trials=1)
    done = Trial(0, {}, "done", 1.0, reports=[Report(1, 500, 2.0), Report(2, 1000, 1.0)])
    trial = Trial(1, {}, reports=[Report(1, 500, 2.0), Report(2, 1000, 1.5)])
    told = "after 1 kimg its best kid was 1.5, and the median of 1 trials 1"
    assert why_pruned(prune, "kid", "lower", trial, [done]) == told
    halving = PruneConfig(method="successive_halving", at_kimg=(0.5, 1), min_trials=1)
    told = "after 1 kimg its kid was 1.5, not among the best 1 of 2 trials"
    assert why_pruned(halving, "kid", "lower", trial, [done]) == told


def test_what_matters_is_said():
    settings = search()
    trials = [
        Trial(i, values, "done", (math.log10(values["stages.0.lr"]) + 3) ** 2)
        for i, values in enumerate(points(search(method="random")))
    ]
    shares = importances(settings, "lower", trials)
    assert next(iter(shares)) == "stages.0.lr" and shares["stages.0.lr"] > 0.8
    assert importances(settings, "lower", trials[:3]) == {}
