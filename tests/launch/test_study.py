"""A folder of configs as one study: each run of its own, whatever becomes of the others."""

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
from tests.launch.played_slurm import set_state, submitted

ROOT = Path(__file__).parents[2]
# What stands for a training: it notes that it ran, and does what its config is called after.
TRAIN = """
import signal, sys, time
from pathlib import Path
path = Path(sys.argv[-1])
def stop(number, frame):
    (path.parent / "order").open("a").write("saved\\n")
    sys.exit(75)
signal.signal(signal.SIGTERM, stop); signal.signal(signal.SIGUSR1, stop)
(path.parent / "order").open("a").write(path.stem + "\\n")
if path.stem == "b_fails":
    sys.exit(3)
if path.stem == "c_waits":
    time.sleep(600)
"""
# The study's own code, with that in the place of torchrun.
STUDY = """
import sys
from pathlib import Path
from launch.study import folder as study
study.build_command = lambda request, count: (
    {}, [sys.executable, str(request.path.parent / "train.py"), *request.overrides,
         str(request.path)])
from launch.cli.main import main
sys.argv[0] = "dinogen"
main()
"""


@pytest.fixture
def folder(tmp_path):
    def make(*names, **more):
        place = tmp_path / "study"
        place.mkdir(exist_ok=True)
        for name in names:
            config = {
                "run": str(tmp_path / "runs" / name),
                "stages": [{"resolution": 4, "kimg": 1}],
            }
            (place / f"{name}.yaml").write_text(yaml.safe_dump(config | more))
        (place / "train.py").write_text(TRAIN)
        (place / "notes.txt").write_text("no config")
        return place

    return make


def start(folder, *words):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "200"}
    command = [sys.executable, "-c", STUDY, "launch", str(folder), *words]
    return subprocess.Popen(
        command,
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


def test_one_that_fails_does_not_stop_the_others(folder):
    place = folder("d", "b_fails", "a")
    process = start(place, "seed=5")
    said, _ = process.communicate(timeout=240)
    assert process.returncode == 1, said
    assert ran(place) == ["a", "b_fails", "d"]
    table = {line.split("│")[1].strip(): line for line in said.splitlines() if "│" in line}
    assert "done after" in table["a"] and "done after" in table["d"]
    assert "failed (exit code 3)" in table["b_fails"]
    assert "seed=5" in said


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP, signal.SIGQUIT]
)
def test_asked_to_stop_the_present_one_saves_and_no_other_begins(folder, number):
    place = folder("a", "c_waits", "d")
    process = start(place)
    deadline = time.monotonic() + 240
    while ran(place) != ["a", "c_waits"]:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(number)
    said, _ = process.communicate(timeout=240)
    assert process.returncode == 75, said
    assert ran(place) == ["a", "c_waits", "saved"]
    assert "stopped and saved" in said and "not begun" in said


def test_a_dry_run_prints_each_command(folder):
    place = folder("a", "b")
    result = launch(place, "--dry-run", "--gpus", "1", "seed=5")
    assert result.exit_code == 0, result.output
    for name in ("a", "b"):
        (line,) = (line for line in result.output.splitlines() if f"train {place}/{name}" in line)
        assert line.endswith("seed=5") and "launch.local.torchrun" in line
    assert ran(place) == []


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("run=elsewhere",), r"run=elsewhere: .* is a folder of configs"),
        (("sede=1",), r"a\.yaml: unknown key 'sede'"),
        (("--photos", "x"), "--photos is for --on slurm"),
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
    place = folder("a", "b", data={"path": str(played / "data")})
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


def test_the_status_of_a_study_shows_all_of_them(folder, played, tmp_path):
    place = folder("a", "b", "c", data={"path": str(played / "data")})
    (place / "c.yaml").rename(tmp_path / "c.yaml")
    on_slurm(place)
    (tmp_path / "c.yaml").rename(place / "c.yaml")
    stage = tmp_path / "runs" / "c" / "4x4"
    stage.mkdir(parents=True)
    (stage / "stats.jsonl").write_text('{"nimg": 500}\n')
    result = launch("status", place)
    assert result.exit_code == 0, result.output
    rows = [
        [cell.strip() for cell in line.split("│")[1:-1]]
        for line in result.output.splitlines()
        if line.startswith("│")
    ]
    assert [row[:2] for row in rows] == [
        ["a", "train-4"],
        ["a", "evaluate"],
        ["b", "train-4"],
        ["b", "evaluate"],
        ["c", "train-4"],
    ]
    assert rows[4][3:5] == ["begun", "0.5 of 1 kimg"]
    (stage / "result.json").write_text(json.dumps({"nimg": 1000, "health": "ok"}))
    assert "1 kimg, ok" in launch("status", place).output
    set_state(played, 101, "FAILED", "NonZeroExitCode", 1)
    assert launch("status", place).exit_code == 1
    (tmp_path / "runs" / "b" / "launch" / "jobs.json").write_text("{")
    told = launch("status", place).output
    assert "jobs.json: cannot be read" in told and "1 kimg, ok" in told and "FAILED" in told
    # a run's own folder is no study, though it holds its config
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
        assert list(jobs) == ["faces", "pyramids", "pack", "train-4"]
        assert jobs["pack"].command[-1] == str(tmp_path / "made" / name)
    shared = folder("e", "f", data={"path": str(tmp_path / "made" / "both")})
    for name in ("a", "b"):
        (shared / f"{name}.yaml").unlink()
    result = on_slurm(shared, "--photos", photos)
    assert f"would both make {tmp_path}/made/both at once" in str(result.exception)
    assert len(submitted(played)) == 8


def test_the_ablations_are_a_study(tmp_path, monkeypatch, played):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    place = ROOT / "configs" / "ablations"
    result = on_slurm(place, "--photos", "photos")
    outcomes = {
        cells[1].strip(): cells[3].strip()
        for cells in (line.split("│") for line in result.output.splitlines())
        if len(cells) > 3 and cells[1].strip()
    }
    assert len(outcomes) == 8
    # the mix waits for the data of two others
    assert outcomes.pop("1d_mixed").startswith("data.mix: data/ablations/1d_aligned holds no")
    assert set(outcomes.values()) == {"submitted"}
    steps = [job.step for job in read_jobs(Path("runs/ablations/1a_128")).jobs]
    assert steps == ["faces", "pack", "train-128", "evaluate"]
    for name in ("1d_aligned", "1b_whole"):
        data = Path("data/ablations") / name
        data.mkdir(parents=True)
        (data / "manifest.json").write_text('{"splits": {"train": {}, "val": {}}}')
    result = on_slurm(place, "--photos", "photos")
    assert result.exit_code == 0, result.output
    mixed = read_jobs(Path("runs/ablations/1d_mixed")).jobs
    assert [job.step for job in mixed] == ["train-64", "evaluate"]
