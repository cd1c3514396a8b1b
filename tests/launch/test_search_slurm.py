"""A search whose jobs run on a played SLURM: how many at once, and which are cancelled."""

from __future__ import annotations

import json
import threading

import pytest

from dinogen.runs.layout import METRICS
from launch.slurm.jobs import read_jobs
from launch.study.plan import open_study
from tests.launch.played_slurm import set_state, submitted
from tests.launch.studies import METRIC, Player, write_study
from tests.launch.study_words import compared, rows, study

pytestmark = pytest.mark.usefixtures("calm")

SEARCH = {"over": "a", "method": "grid", "parameters": {"stages.0.lr": [1e-4, 2e-4, 3e-4]}}
TRIALS = [f"gan/a-00{i}-lr0.000{i + 1}" for i in range(3)]


class Cluster:
    """Ends jobs soon after they are submitted.

    Attributes:
        player: does what they do.
        long: values by run of a training that never ends.
        most: largest number of trials that were in the queue at once.
    """

    def __init__(self, played, path):
        self.played, self.player = played, Player(path)
        self.long = {}
        self.most = 0

    def states(self):
        return dict(one.split()[:2] for one in (self.played / "jobs").read_text().splitlines())

    def work(self):
        queued = set()
        for file in self.player.folder.glob("*/*/launch/jobs.json"):
            run = str(file.parents[1].relative_to(self.player.folder))
            for job in read_jobs(file.parents[1]).jobs:
                state = self.states().get(job.id)
                if state in ("PENDING", "RUNNING"):
                    queued.add(run)
                if state == "PENDING":
                    self._begin(run, job)
        self.most = max(self.most, len(queued))

    def _begin(self, run, job):
        before = self.states()[job.after] if job.after else "COMPLETED"
        if before == "FAILED":
            set_state(self.played, job.id, "CANCELLED")
        if before != "COMPLETED":
            return
        if job.step.startswith("train") and run in self.long:
            lines = [
                {"nimg": 500 * i, "metrics": {METRIC: {"value": value, "better": "lower"}}}
                for i, value in enumerate(self.long[run], start=1)
            ]
            path = self.player.folder / run / "16x16" / METRICS
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
            set_state(self.played, job.id, "RUNNING")
            return
        steps = ["train"] if job.step.startswith("train") else ["evaluate", "look"]
        code = max(self.player.play(run, step) for step in steps)
        set_state(self.played, job.id, "FAILED" if code else "COMPLETED", code=code)


@pytest.fixture
def on_slurm(played, tmp_path, monkeypatch):
    """Makes a study on a played SLURM."""
    monkeypatch.setattr("launch.study.slurm._FIRST_PAUSE", 0.02)
    monkeypatch.setattr("launch.study.slurm._LAST_PAUSE", 0.05)
    monkeypatch.setattr("launch.study.status.write_comparison", compared)
    monkeypatch.setattr("launch.study.search.Search.check_metric", lambda self: None)
    ended = threading.Event()
    threads = []

    def make(search, **more):
        tracks = {"gan": {"configs": ["a.yaml"]}}
        path = write_study(tmp_path / "place", tracks=tracks, search=search, **more)
        cluster = Cluster(played, path)

        def work():
            while not ended.wait(0.01):
                cluster.work()

        threads.append(threading.Thread(target=work))
        threads[-1].start()
        return path, cluster

    yield make
    ended.set()
    for thread in threads:
        thread.join()


def test_the_jobs_of_a_pruned_trial_are_cancelled(on_slurm, played):
    prune = {"method": "successive_halving", "min_trials": 1, "at_kimg": [0.5]}
    path, cluster = on_slurm(
        SEARCH | {"prune": prune, "num_parallel": 1},
        overrides=["eval.every_kimg=0.5", f"eval.generated=[{METRIC}]"],
    )
    first, second = open_study(path).tracks["gan"][:2]
    cluster.long = {second.id: [2.0]}
    # as a training of before has left it
    search = open_study(path).searches[0]
    stage = first.stages[-1]
    stage.folder.mkdir(parents=True)
    line = {"nimg": 500, "metrics": {METRIC: {"value": 1.0, "better": "lower"}}}
    stage.metrics_file.write_text(json.dumps(line) + "\n")
    assert search.watch(first) is None
    result = study("run", path, "--on", "slurm")
    assert result.exit_code == 0, result.output
    told = f"pruned: after 0.5 kimg its {METRIC} was 2, not among the best 1 of 2 trials"
    assert rows(result)[second.id] == [told]
    jobs = [job.id for job in read_jobs(second.folder).jobs]
    assert sorted((played / "cancelled").read_text().split()) == jobs
    assert cluster.most == 1
    assert "gan/a: 3 trials, 2 done, 1 pruned" in study("status", path).output
    num = len(submitted(played))
    assert study("run", path, "--on", "slurm").exit_code == 0
    assert len(submitted(played)) == num


def test_a_failed_trial_is_submitted_again_by_the_next_call(on_slurm, played):
    path, cluster = on_slurm(SEARCH)
    cluster.player.codes[TRIALS[1], "train"] = 9
    result = study("run", path, "--on", "slurm")
    assert result.exit_code == 0, result.output
    assert "ended as FAILED: exit code 9" in rows(result)[TRIALS[1]][0]
    assert "gan/a: 3 trials, 2 done, 1 failed" in study("status", path).output
    cluster.player.codes.clear()
    assert study("run", path, "--on", "slurm").exit_code == 0
    assert "gan/a: 3 trials, 3 done" in study("status", path).output
    assert len(submitted(played)) == 8


def test_what_failed_in_a_storage_is_not_submitted_again(on_slurm, played, tmp_path):
    pytest.importorskip("optuna")
    path, cluster = on_slurm(SEARCH | {"storage": str(tmp_path / "journal.log")})
    cluster.player.codes[TRIALS[1], "train"] = 9
    assert study("run", path, "--on", "slurm").exit_code == 0
    num = len(submitted(played))
    result = study("run", path, "--on", "slurm")
    assert result.exit_code == 0 and len(submitted(played)) == num
    assert rows(result)[TRIALS[1]][0].startswith("failed before: ")
    assert rows(result)[TRIALS[0]] == ["done before"]


def test_trials_that_learn_follow_as_others_end(on_slurm):
    pytest.importorskip("optuna")
    search = {
        "over": "a",
        "method": "tpe",
        "num_trials": 5,
        "num_parallel": 2,
        "parameters": {"stages.0.lr": {"low": 1e-4, "high": 1e-2, "log": True}},
    }
    path, cluster = on_slurm(search)
    result = study("run", path, "--on", "slurm", "--no-wait")
    assert result.exit_code == 0 and result.output.count("submitted") == 2
    result = study("run", path, "--on", "slurm")
    assert result.exit_code == 0, result.output
    assert cluster.most <= 2
    assert "gan/a: 5 trials, 5 done; best: trial 0" in study("status", path).output
