"""A folder of configs is a study whose runs are trained, each where its `run:` says."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from dinogen.errors import UserError
from launch.cli.main import app
from launch.slurm.jobs import read_jobs
from launch.study.plan import open_folder
from launch.study.run import LocalStudy
from tests.families.tiny import TINY, pack_discs
from tests.launch.played_slurm import set_state, submitted
from tests.launch.study_words import rows, study

ROOT = Path(__file__).parents[2]
# What stands for a training: it notes that it ran, and does what its config is called after.
TRAIN = """
import signal, sys, time
from pathlib import Path
copy, run, order = map(Path, sys.argv[1:])
def note(word):
    with order.open("a") as file:
        file.write(word + "\\n")
def stop(number, frame):
    note("saved")
    sys.exit(75)
signal.signal(signal.SIGTERM, stop); signal.signal(signal.SIGUSR1, stop)
note(copy.stem)
if copy.stem == "b_fails":
    sys.exit(3)
if copy.stem == "c_waits":
    time.sleep(600)
(run / "4x4").mkdir()
(run / "4x4" / "result.json").write_text('{"nimg": 1000}')
"""
# The study's own code, with that in the place of its commands.
STUDY = """
import sys
from launch.study import run as study
place = sys.argv.pop(1)
study.LocalStudy._command = lambda self, run, step: (
    {}, [sys.executable, f"{place}/train.py", str(self.study.copy_of(run)), str(run.folder),
         f"{place}/order"])
from launch.cli.main import main
sys.argv[0] = "dinogen"
main()
"""


@pytest.fixture
def folder(tmp_path):
    def make(*names, **more):
        place = tmp_path / "mine"
        place.mkdir(exist_ok=True)
        data = tmp_path / "data"
        if not data.exists():
            pack_discs(data)
        for name in names:
            config = {
                "run": str(tmp_path / "runs" / name),
                "data": {"path": str(data)},
                "family": {"name": "progressive_gan", **TINY["progressive_gan"]},
                "stages": [{"resolution": 4, "kimg": 1}],
            }
            (place / f"{name}.yaml").write_text(yaml.safe_dump(config | more))
        (place / "train.py").write_text(TRAIN)
        return place

    return make


def start(folder):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "200"}
    return subprocess.Popen(
        [sys.executable, "-c", STUDY, str(folder), "launch", str(folder)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=not_ignored,
    )


def not_ignored():
    """The tests themselves may run under nohup."""
    for number in (signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, signal.SIG_DFL)


def ran(folder):
    path = folder / "order"
    return path.read_text().split() if path.exists() else []


def launch(*words):
    return CliRunner().invoke(app, ["launch", *map(str, words)])


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP, signal.SIGQUIT]
)
def test_one_that_fails_stops_no_other_and_a_signal_stops_all(folder, tmp_path, number):
    place = folder("a", "b_fails", "c_waits", "d")
    process = start(place)
    deadline = time.monotonic() + 240
    while ran(place) != ["a", "b_fails", "c_waits"]:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(number)
    said, _ = process.communicate(timeout=240)
    assert process.returncode == 75, said
    assert ran(place) == ["a", "b_fails", "c_waits", "saved"]
    assert all(word in said for word in ("done after", "exit code 3", "stopped and saved"))
    assert "not begun" in said
    record = json.loads((tmp_path / "runs" / "study-mine" / "study.json").read_text())
    codes = {name: [one["code"] for one in tried] for name, tried in record["runs"].items()}
    assert codes == {"a": [0], "b_fails": [3], "c_waits": [75]}
    if number == signal.SIGTERM:
        compared = tmp_path / "compared"
        done = CliRunner().invoke(
            app, ["compare", str(tmp_path / "runs/study-mine"), "--as-is", "--out", str(compared)]
        )
        told = json.loads((compared / "comparison.json").read_text())["runs"]
        assert {Path(run["name"]).name for run in told} == {"a", "b_fails", "c_waits"}, done.output
        assert any("exit code 3" in line for run in told for line in run["problems"])


@pytest.mark.usefixtures("calm")
def test_the_doors_lead_to_the_same_study(folder):
    place = folder("a", "b")
    plan = study("plan", place)
    assert plan.exit_code == 0, plan.output
    assert rows(plan)["a"][:2] == ["to do", "1 k"]
    for result in (study("status", place), launch("status", place)):
        assert {name: cells[0] for name, cells in rows(result).items()} == dict.fromkeys(
            ("a", "b"), "to do"
        )


def test_a_dry_run_prints_each_command(folder):
    place = folder("a", "b")
    result = launch(place, "--dry-run", "--gpus", "1", "seed=5")
    assert result.exit_code == 0, result.output
    for name in ("a", "b"):
        (line,) = (line for line in result.output.splitlines() if f"train {place}/{name}" in line)
        assert line.endswith("seed=5") and "launch.local.torchrun" in line


def test_options_of_launch_reach_the_training(folder):
    place = folder("a", stages=[{"resolution": size, "kimg": 1} for size in (4, 8, 16)])
    opened = open_folder(place, ["seed=5"], "4..8")
    (run,) = opened.runs
    assert run.config.seed == 5 and [stage.resolution for stage in run.stages] == [4, 8]
    plain = LocalStudy(opened, 1)._command(run, "train")[1]
    assert plain[1:] == ["-m", "launch.cli", "train", str(opened.copy_of(run)), "--stage", "4..8"]
    restarted = LocalStudy(opened, 1, max_restarts=2)._command(run, "train")[1]
    assert restarted[restarted.index("--max-restarts") + 1] == "2"
    assert restarted[-2:] == ["--stage", "4..8"]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("run=elsewhere",), r"run=elsewhere: .* is a folder of configs"),
        (("sede=1",), r"a\.yaml: unknown key 'sede'"),
        (("--photos", "x"), "--photos is for --on slurm"),
        (("--stages", "9"), "stage 9 is not in the config"),
    ],
)
def test_what_cannot_be_launched_is_one_error(folder, words, told):
    result = launch(folder("a", "b"), *words)
    assert isinstance(result.exception, UserError), result.output
    assert re.search(told, str(result.exception))


def test_two_configs_of_one_run_are_refused(folder, tmp_path):
    place = folder("a", "b", run=str(tmp_path / "same"))
    result = launch(place)
    assert f"{place}/b.yaml: run: {tmp_path}/same is that of {place}/a.yaml too" in str(
        result.exception
    )
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "holds no *.yaml" in str(launch(empty).exception)


def on_slurm(place, *words):
    return launch(place, "--on", "slurm", *words)


def test_on_slurm_each_is_a_chain_of_its_own(folder, played, tmp_path):
    place = folder("a", "b")
    (place / "c.yaml").write_text(
        yaml.safe_dump({"run": str(tmp_path / "runs" / "c"), "data": {"path": "nowhere"}})
    )
    result = on_slurm(place, "--time", "1:00:00")
    assert result.exit_code == 1
    for name in ("a", "b"):
        jobs = read_jobs(tmp_path / "runs" / name).jobs
        assert [job.step for job in jobs] == ["train-4", "evaluate"]
        assert "--time=1:00:00" in jobs[0].command
    assert not read_jobs(tmp_path / "runs" / "c").jobs
    assert "nowhere holds no packed data" in result.output
    # again: only what is missing
    (place / "c.yaml").unlink()
    again = on_slurm(place)
    assert again.exit_code == 0 and len(submitted(played)) == 4
    # trained, but not measured: the evaluation is submitted again
    stage = tmp_path / "runs" / "a" / "4x4"
    stage.mkdir(parents=True)
    (stage / "result.json").write_text('{"nimg": 1000}')
    set_state(played, 101, "COMPLETED")
    set_state(played, 102, "FAILED", "NonZeroExitCode", 1)
    assert "evaluate (job 102) ended as FAILED" in launch("status", place).output
    assert rows(on_slurm(place))["a"] == ["submitted"]
    assert "evaluate" in submitted(played)[-1] and len(submitted(played)) == 5
    (stage / "evaluation.json").write_text('{"nimg": 1000, "measured": {}}')
    set_state(played, 105, "COMPLETED")
    assert rows(on_slurm(place))["a"] == ["done before"]


def test_the_status_on_slurm_shows_all_of_them(folder, played, tmp_path):
    place = folder("a", "b", "c")
    (place / "c.yaml").rename(tmp_path / "c.yaml")
    on_slurm(place, "seed=5")
    (tmp_path / "c.yaml").rename(place / "c.yaml")
    stage = tmp_path / "runs" / "c" / "4x4"
    stage.mkdir(parents=True)
    (stage / "stats.jsonl").write_text('{"nimg": 500}\n')
    result = launch("status", place)
    assert result.exit_code == 0, result.output
    table = rows(result)
    assert table["a"][0] == "queued" and table["a"][-1].startswith("train-4, job 101")
    assert table["c"][:2] == ["begun", "0.5 of 1 kimg"]
    (stage / "result.json").write_text(json.dumps({"nimg": 1000, "health": "ok"}))
    assert rows(launch("status", place))["c"][:2] == ["done", "1 kimg, ok"]
    set_state(played, 101, "FAILED", "NonZeroExitCode", 1)
    set_state(played, 102, "CANCELLED")
    result = launch("status", place)
    assert result.exit_code == 1
    assert rows(result)["a"][0] == "failed"
    assert "train-4 (job 101) ended as FAILED: exit code 1" in result.output
    (tmp_path / "runs" / "b" / "launch" / "jobs.json").write_text("{")
    table = rows(launch("status", place))
    assert table["b"][0] == "unknown" and "jobs.json: cannot be read" in table["b"][-1]
    assert table["c"][0] == "done" and table["a"][0] == "failed"
    # the folder of a run is no study, though it holds its config
    (tmp_path / "runs" / "a" / "config.yaml").write_text((place / "a.yaml").read_text())
    assert "evaluate" in launch("status", tmp_path / "runs" / "a").output


def test_photos_make_the_data_of_each(folder, played, tmp_path):
    photos = tmp_path / "photos"
    photos.mkdir()
    place = folder("a", "b")
    for name in ("a", "b"):
        config = yaml.safe_load((place / f"{name}.yaml").read_text())
        config["data"] = {"path": str(tmp_path / "made" / name)}
        (place / f"{name}.yaml").write_text(yaml.safe_dump(config))
    assert on_slurm(place, "--photos", photos).exit_code == 0
    for name in ("a", "b"):
        jobs = {job.step: job for job in read_jobs(tmp_path / "runs" / name).jobs}
        assert list(jobs) == ["faces", "pack", "train-4"]
        assert jobs["pack"].command[-1] == str(tmp_path / "made" / name)
    shared = folder("e", "f", data={"path": str(tmp_path / "made" / "both")})
    for name in ("a", "b"):
        (shared / f"{name}.yaml").unlink()
    result = on_slurm(shared, "--photos", photos)
    assert f"would both make {tmp_path}/made/both at once" in str(result.exception)
    assert len(submitted(played)) == 6


def test_the_ablations_are_a_study(tmp_path, monkeypatch, played):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    place = ROOT / "configs" / "ablations"
    outcomes = rows(on_slurm(place, "--photos", "photos"))
    assert len(outcomes) == 8
    # the mix waits for the data of two others
    assert outcomes.pop("1d_mixed")[0].startswith("data.mix: data/ablations/1d_aligned holds no")
    assert {what for (what,) in outcomes.values()} == {"submitted"}
    steps = [job.step for job in read_jobs(Path("runs/ablations/1a_128")).jobs]
    assert steps == ["faces", "pack", "train-128", "evaluate"]
    for name in ("1d_aligned", "1b_whole"):
        pack_discs(Path("data/ablations") / name, size=64)
    result = on_slurm(place, "--photos", "photos")
    assert result.exit_code == 0, result.output
    mixed = read_jobs(Path("runs/ablations/1d_mixed")).jobs
    assert [job.step for job in mixed] == ["train-64", "evaluate"]
