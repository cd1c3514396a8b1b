"""A search is run to its end, whatever becomes of single trials; what it does is played."""

from __future__ import annotations

import json
import sys

import pytest
import yaml

from dinogen.runs.fingerprint import fingerprint_id
from dinogen.runs.layout import METRICS
from launch.study import run as study_run
from launch.study.plan import open_study
from tests.launch.studies import METRIC, Player, write_study
from tests.launch.study_words import compared, rows, study

pytestmark = pytest.mark.usefixtures("calm")

LRS = [1e-4, 2e-4, 3e-4, 4e-4]
GRID = {"over": "a", "method": "grid", "parameters": {"stages.0.lr": LRS}}
TRACKS = {"gan": {"configs": ["a.yaml", "b.yaml"]}}
TRIALS = [f"gan/a-00{i}-lr000{i + 1}".replace("lr000", "lr0.000") for i in range(4)]
MEASURED = ["eval.every_kimg=0.5", f"eval.generated=[{METRIC}]"]


class Measured(Player):
    """A training also measures every 0.5 kimg.

    Attributes:
        curves: values by run, until its end.
        stopped: runs that were asked to stop.
    """

    def __init__(self, path):
        super().__init__(path)
        self.curves = {}
        self.stopped = []

    def _train(self, run, config):
        super()._train(run, config)
        lines = [
            {"nimg": 500 * i, "metrics": {METRIC: {"value": value, "better": "lower"}}}
            for i, value in enumerate(self.curves.get(run, ()), start=1)
        ]
        path = self._stage(run, 16) / METRICS
        path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))


@pytest.fixture
def played_study(tmp_path, monkeypatch):
    """Makes a study whose commands are played."""

    def make(search=GRID, **more):
        path = write_study(tmp_path, **{"tracks": TRACKS, "search": search} | more)
        player = Measured(path)
        monkeypatch.setattr(study_run, "start", player.start)
        monkeypatch.setattr("launch.study.status.write_comparison", compared)
        monkeypatch.setattr("launch.study.search.Search.check_metric", lambda self: None)
        return path, player

    return make


def test_trials_take_the_place_of_their_config_and_the_best_goes_into_the_final(
    played_study, tmp_path
):
    path, player = played_study(final={"seeds": [5]})
    player.metric_values = {TRIALS[2]: 0.25, "gan/b-seed0": 0.5}
    result = study("run", path)
    assert result.exit_code == 0, result.output
    assert player.done[::3] == [
        f"{run} train" for run in [*TRIALS, "gan/b-seed0", "final/gan-a-002-lr0.0003-seed5"]
    ]
    final = open_study(path).final_runs({"gan": "a-002-lr0.0003"})[0]
    assert final.config.stages[0].lr == 3e-4 and final.config.seed == 5
    told = f"gan/a: 4 trials, 4 done; best: trial 2, {METRIC} 0.25 with lr 0.0003"
    assert told in study("status", path).output
    summary = (tmp_path / "study" / "report" / "study.md").read_text()
    table = summary[summary.index("## Trials of gan/a") :]
    assert "| 2 | 0.0003 | 0.25 | done |  |" in table.splitlines()[6]
    player.done.clear()
    assert study("run", path).exit_code == 0 and player.done == []


def test_a_trial_is_the_config_with_its_values(played_study, tmp_path):
    path, _ = played_study()
    run = open_study(path).tracks["gan"][3]
    assert (run.id, run.trial, run.config.stages[0].lr) == (TRIALS[3], 3, 4e-4)
    source = yaml.safe_load((tmp_path / "a.yaml").read_text())
    source["stages"][0]["lr"] = 4e-4
    (tmp_path / "e.yaml").write_text(yaml.safe_dump(source | {"run": str(run.folder)}))
    from dinogen.config import load_config

    assert load_config(tmp_path / "e.yaml") == run.config


def test_a_failed_trial_stops_nothing_and_is_tried_again(played_study):
    path, player = played_study()
    player.codes[TRIALS[1], "train"] = 3
    result = study("run", path)
    assert result.exit_code == 0, result.output
    assert len([one for one in player.done if one.endswith("train")]) == 5
    assert "train failed (exit code 3): what train says" in rows(result)[TRIALS[1]][0]
    status = study("status", path)
    assert status.exit_code == 1 and rows(status)[TRIALS[1]][0] == "failed"
    assert "gan/a: 4 trials, 3 done, 1 failed" in status.output
    player.done.clear()
    player.codes.clear()
    assert study("run", path).exit_code == 0
    assert player.done == [f"{TRIALS[1]} {step}" for step in ("train", "evaluate", "look")]
    assert "gan/a: 4 trials, 4 done" in study("status", path).output


def test_where_all_trials_fail_the_study_fails_and_further_ones_are_not_begun(played_study):
    search = GRID | {"parameters": {"stages.0.lr": [i * 1e-4 for i in range(1, 10)]}}
    path, player = played_study(search)
    for run in open_study(path).runs[:9]:
        player.codes[run.id, "train"] = 3
    result = study("run", path)
    assert result.exit_code == 1 and "report: " in result.output
    assert list(rows(result).values())[8] == ["not begun: the first 5 trials have failed"]
    assert len([one for one in player.done if one.startswith("gan/a")]) == 5
    assert player.done[-1] == "gan/b-seed0 look"
    player.codes.clear()
    assert study("run", path).exit_code == 0
    assert "gan/a: 9 trials, 9 done" in study("status", path).output


def test_a_trial_that_is_worse_than_the_median_is_pruned(played_study, tmp_path):
    prune = {"method": "median", "min_trials": 2}
    path, player = played_study(GRID | {"prune": prune}, overrides=MEASURED)
    player.curves = {
        TRIALS[0]: [4, 3, 2],
        TRIALS[1]: [5, 4, 3],
        TRIALS[2]: [4, 3.6, 0.1],
        TRIALS[3]: [4.4, 3.4, 0.1],
    }
    player.metric_values = {run: curve[-1] for run, curve in player.curves.items()}
    assert study("run", path).exit_code == 0
    # it had been trained to its end before anyone looked, which decides nothing
    assert [one for one in player.done if TRIALS[2] in one] == [f"{TRIALS[2]} train"]
    told = f"after 1 kimg its best {METRIC} was 3.6, and the median of 2 trials 3.5"
    status = study("status", path)
    assert status.exit_code == 0
    assert rows(status)[TRIALS[2]][0] == "pruned" and rows(status)[TRIALS[2]][3] == told
    assert rows(status)[TRIALS[3]][0] == "done"
    assert "gan: a-003-lr0.0004" in status.output
    summary = (tmp_path / "study" / "report" / "study.md").read_text()
    assert f"| 2 | 0.0003 |  | pruned | {told} |" in summary
    planned = study("plan", path)
    assert rows(planned)[TRIALS[2]][:2] == ["pruned", "0 k"]
    player.done.clear()
    assert study("run", path).exit_code == 0 and player.done == []


def test_a_running_trial_is_asked_to_stop_and_the_study_goes_on(played_study, monkeypatch):
    prune = {"method": "successive_halving", "min_trials": 1}
    path, player = played_study(GRID | {"prune": prune}, overrides=MEASURED)
    player.curves = {TRIALS[0]: [1, 1, 1], TRIALS[1]: [2, 2, 2]}
    stopped = []

    class Training(Player.Process):
        """Trial 1 trains until it is asked to stop."""

        def poll(self):
            return self.code

        def terminate(self):
            stopped.append(player.done[-1])
            (player.folder / TRIALS[1] / "16x16" / "result.json").unlink()
            self.code = 75

    def start(command, env, log):
        process = player.start(command, env, log)
        return Training(None) if player.done[-1] == f"{TRIALS[1]} train" else process

    monkeypatch.setattr(study_run, "start", start)
    monkeypatch.setattr(study_run, "_POLL", 0.01)
    result = study("run", path)
    assert result.exit_code == 0, result.output
    assert stopped == [f"{TRIALS[1]} train"]
    told = f"pruned: after 0.5 kimg its {METRIC} was 2, not among the best 1 of 2 trials"
    assert rows(result)[TRIALS[1]] == [told]
    assert f"{TRIALS[3]} look" in player.done
    assert rows(study("status", path))[TRIALS[1]][0] == "pruned"


def test_the_plan_says_what_the_trials_will_cost(played_study):
    pytest.importorskip("optuna")
    search = {
        "over": ["a", "gan/b"],
        "method": "tpe",
        "num_trials": 6,
        "parameters": {"stages.0.lr": {"low": 1e-4, "high": 1e-2, "log": True}},
    }
    path, player = played_study(search)
    before = study("plan", path)
    assert "gan/a: 6 more trials, unknown each" in before.output
    assert study("run", path).exit_code == 0
    assert [one for one in player.done if "train" in one] == [
        f"{run.id} train" for run in open_study(path).runs
    ]
    text = path.read_text().replace("num_trials: 6", "num_trials: 8")
    path.write_text(text)
    after = study("plan", path)
    assert "gan/b: 2 more trials, 40 s each" in after.output
    # 2 kimg at 50 images/s by 2 processes
    assert "left to train: 2.67 min, 0.09 hours of one process" in after.output


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"over": "aa"}, "search.over: no track has a config 'aa': did you mean 'a'?"),
        (
            {"parameters": {"stages.0.lrr": [1, 2]}},
            "search.parameters: {folder}/a.yaml: unknown key 'stages.0.lrr': did you mean 'lr'?",
        ),
        ({"parameters": {"family.nfg": [1, 2]}}, "did you mean 'ngf'?"),
        ({"parameters": {"stages.1.lr": [1, 2]}}, "stages has items 0 to 0"),
        ({"parameters": {"stages.0.lr": [1, -1]}}, "stages.0.lr: Input should be greater than 0"),
        (
            {"parameters": {"stages.0.lr": {"low": 1, "high": 1}}},
            "search.parameters.stages.0.lr: the range is empty",
        ),
        (
            {"parameters": {"stages.0.lr": {"low": 0, "high": 1, "log": True}}},
            "low is 0, but log needs low > 0",
        ),
        (
            {"parameters": {"stages.0.lr": {"low": 0.1, "high": 1}}},
            "search: parameters.stages.0.lr: a grid needs single values: give a list, or a step",
        ),
        ({"parameters": {"seed": [1, 2]}}, "the study sets the folder and the seed of each run"),
        ({"prune": {"metric": "memorisation"}}, "memorisation has no better or worse"),
        ({"prune": {"metric": "fdi"}}, "no metric 'fdi': did you mean fid?"),
        ({"prune": {}}, "does not measure fid while it trains: add eval.every_kimg=N and"),
        ({"metod": "grid"}, "unknown key 'search.metod': did you mean 'method'?"),
        ({"storage": "sqlite:////no/such/folder/x.db"}, "search.storage: sqlite:////no/such"),
    ],
)
def test_mistakes_are_one_line_before_anything_starts(played_study, tmp_path, change, told):
    path, player = played_study(GRID | change)
    for command in ("plan", "run"):
        result = study(command, path)
        assert result.exit_code == 1
        words = str(result.exception)
        assert told.replace("{folder}", str(tmp_path)) in words, words
        assert "\n" not in words
    assert player.done == [] and not (tmp_path / "study" / "gan").exists()


def test_a_metric_without_weights_is_said_before_anything_starts(
    played_study, tmp_path, monkeypatch
):
    path, player = played_study(overrides=["metrics.inception=/no/such/weights.pth"])
    monkeypatch.undo()
    monkeypatch.setenv("COLUMNS", "240")
    result = study("run", path)
    assert result.exit_code == 1 and f"{path}: fid is not available: " in str(result.exception)
    assert player.done == []


def test_a_search_that_has_changed_is_refused(played_study):
    path, _ = played_study()
    assert study("run", path).exit_code == 0
    plan = yaml.safe_load(path.read_text())
    plan["search"]["parameters"] = {"stages.0.lr": [1e-4, 9e-4]}
    path.write_text(yaml.safe_dump(plan))
    result = study("run", path)
    assert result.exit_code == 1
    assert "search.parameters: " in str(result.exception)
    assert "holds trials of another search" in str(result.exception)


@pytest.mark.parametrize("storage", [None, "journal.log"])
def test_what_trials_are_pruned_by_may_not_change(played_study, tmp_path, storage):
    if storage is not None:
        pytest.importorskip("optuna")
        storage = str(tmp_path / storage)
    metrics = f"eval.generated=[{METRIC}, kid]"
    path, _ = played_study(GRID | {"storage": storage}, overrides=["eval.every_kimg=1", metrics])
    plan = yaml.safe_load(path.read_text())

    def run(prune, every=1):
        plan["overrides"][0] = f"eval.every_kimg={every}"
        plan["search"]["prune"] = prune
        path.write_text(yaml.safe_dump(plan))
        result = study("run", path)
        return "" if result.exit_code == 0 else str(result.exception)

    assert run({"min_trials": 2}) == ""
    assert run({"method": "successive_halving", "min_trials": 4}) == ""
    for _ in range(2):
        told = run({"metric": "kid"})
        assert told.startswith("search.prune.metric: ")
        assert "(prune.metric: 'fid' there, 'kid' in the plan): restore prune.metric" in told
        assert run({"at_kimg": [1]}).startswith("search.prune.at_kimg: ")
        assert run({}, every=0.5).startswith("eval.every_kimg: ")
        assert run({"method": "none"}, every=0.5) == ""  # it ends
    assert run({}) == ""


def test_without_optuna_one_line_says_what_to_install(played_study, monkeypatch):
    search = GRID | {"method": "tpe", "num_trials": 3}
    path, player = played_study(search)
    monkeypatch.setitem(sys.modules, "optuna", None)
    monkeypatch.delitem(sys.modules, "launch.study.stored", raising=False)
    result = study("run", path)
    assert result.exit_code == 1 and player.done == []
    assert "need optuna" in str(result.exception)
    assert "pip install 'dinogen[optuna]'" in str(result.exception)
    # grid and random need no package, not even for the report
    path, player = played_study()
    assert study("run", path).exit_code == 0 and len(player.done) == 15


def test_two_folders_share_a_storage(played_study, tmp_path):
    pytest.importorskip("optuna")
    path, player = played_study(GRID | {"storage": f"sqlite:///{tmp_path}/sweep.db"}, final={})
    other = tmp_path / "other.yaml"
    plan = yaml.safe_load(path.read_text())
    other.write_text(yaml.safe_dump(plan | {"folder": str(tmp_path / "other")}))
    theirs = open_study(other).searches[0]
    run = theirs.ask()
    assert run.id == TRIALS[0]
    result = study("run", path)
    assert result.exit_code == 0, result.output
    # the final waits for the trial of the other machine
    assert player.done[::3] == [f"{one} train" for one in ("gan/b-seed0", *TRIALS[1:])]
    said = study("status", path).output
    assert "gan/a: 4 trials, 3 done, 1 on other machines" in said
    trial = theirs.trial_of(run)
    trial.state, trial.value, trial.fingerprint = "done", 0.125, fingerprint_id({"data": "abc"})
    theirs.trials.end(trial)
    player.done.clear()
    assert study("run", path).exit_code == 0
    assert player.done == [
        f"final/gan-a-000-lr0.0001-seed0 {step}" for step in ("train", "evaluate", "look")
    ]
    summary = (tmp_path / "study" / "report" / "study.md").read_text()
    assert "| 0 | 0.0001 | 0.125 | done on another machine |  |" in summary


def test_a_trial_that_failed_in_a_storage_is_not_tried_again_and_said_to_have_failed(
    played_study, tmp_path
):
    pytest.importorskip("optuna")
    path, player = played_study(GRID | {"storage": str(tmp_path / "journal.log")})
    for run in TRIALS:
        player.codes[run, "train"] = 3
    assert study("run", path).exit_code == 1
    player.done.clear()
    player.codes.clear()
    result = study("run", path)
    assert result.exit_code == 1 and player.done == []
    told = "failed before: train failed (exit code 3): what train says"
    assert rows(result)[TRIALS[0]][0].startswith(told)
    assert "report: " in result.output


@pytest.fixture
def flaky(played_study, tmp_path, monkeypatch):
    """A played study whose storage gives no answer to each ``every``-th question, 0 for none."""
    optuna = pytest.importorskip("optuna")
    monkeypatch.setattr("launch.study.stored._PAUSE", 0)
    storage = {"storage": str(tmp_path / "journal.log"), "prune": {"min_trials": 9}}
    path, player = played_study(GRID | storage, overrides=MEASURED)
    player.curves = {run: [3, 2, 1] for run in TRIALS}
    fails = {"every": 0, "num": 0}
    read = optuna.Study.get_trials

    def get_trials(self, *args, **kwargs):
        fails["num"] += 1
        if fails["every"] and fails["num"] % fails["every"] == 0:
            raise OSError("no answer")
        return read(self, *args, **kwargs)

    monkeypatch.setattr(optuna.Study, "get_trials", get_trials)
    return path, player, fails


def test_answers_that_a_storage_misses_fail_no_trial(flaky, monkeypatch):
    path, player, fails = flaky

    def start(*args):
        fails["every"] = 2
        return player.start(*args)

    monkeypatch.setattr(study_run, "start", start)
    player.codes[TRIALS[3], "train"] = 3
    result = study("run", path)
    fails["every"] = 0
    assert result.exit_code == 0, (result.output, result.exception)
    assert "gan/a: 4 trials, 3 done, 1 failed" in study("status", path).output
    assert fails["num"] > 20


@pytest.mark.parametrize("code", [0, 3])
def test_a_storage_that_stays_away_ends_the_study_and_the_next_call_goes_on(
    flaky, monkeypatch, code
):
    path, player, fails = flaky
    monkeypatch.setattr("launch.study.stored._PATIENCE", 0)
    player.codes[TRIALS[1], "train"] = code

    def start(*args):
        process = player.start(*args)
        fails["every"] = int(player.done[-1] == f"{TRIALS[1]} train")
        return process

    monkeypatch.setattr(study_run, "start", start)
    result = study("run", path)
    assert "is not reachable: no answer" in str(result.exception)
    assert result.exception.exit_code == 75
    assert player.done[-1] == f"{TRIALS[1]} train"
    fails["every"] = 0
    assert {one.state for one in open_study(path).searches[0].trials.all()} == {"done", "begun"}
    monkeypatch.setattr(study_run, "start", player.start)
    player.codes.clear()
    assert study("run", path).exit_code == 0
    assert "gan/a: 4 trials, 4 done" in study("status", path).output


def test_without_data_no_trial_is_used_up(played_study, tmp_path):
    pytest.importorskip("optuna")
    search = GRID | {"method": "tpe", "num_trials": 8, "storage": str(tmp_path / "journal.log")}
    path, player = played_study(search)
    (tmp_path / "data").rename(tmp_path / "away")
    result = study("run", path)
    assert result.exit_code == 1
    assert "holds no packed data: dinogen prepare" in result.output
    (trial,) = open_study(path).searches[0].trials.all()
    assert trial.state == "begun" and player.done == []
    (tmp_path / "away").rename(tmp_path / "data")
    assert study("run", path).exit_code == 0
    assert "gan/a: 8 trials, 8 done" in study("status", path).output
