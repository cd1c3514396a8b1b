"""A study is run to its end, whatever becomes of single runs; killed, it goes on where it was."""

from __future__ import annotations

import fcntl
import json
import signal
import sys
import threading
import time

import pytest
import yaml
from typer.testing import CliRunner

from dinogen.config import ConfigError
from dinogen.errors import UserError
from launch import study_local, study_slurm
from launch.cli import app
from launch.jobs import read_jobs
from launch.study_plan import open_study
from launch.study_record import is_locked, study_lock
from tests.launch.played_slurm import set_state, submitted
from tests.launch.studies import Player, kill_all, start_study, tiny_study, write_study

TRACKS = ["gan/a-seed0", "gan/a-seed1", "gan/b-seed0", "gan/b-seed1", "vae/c-seed0", "vae/dd-seed0"]
ALL = [f"{run} {step}" for run in TRACKS for step in ("train", "evaluate", "look")]


@pytest.fixture(autouse=True)
def calm(monkeypatch):
    """Wide tables, and the signal handlers of the tests back at the end."""
    monkeypatch.setenv("COLUMNS", "240")
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
    before = {number: signal.getsignal(number) for number in numbers}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def played_study(tmp_path, monkeypatch):
    """Makes a study whose commands are played."""

    def make(**more):
        path = write_study(tmp_path, **more)
        player = Player(path)
        monkeypatch.setattr(study_local, "start", player.start)
        monkeypatch.setattr("launch.study_report.write_comparison", compared)
        return path, player

    return make


def compared(runs, out, title):
    """In the place of the comparison: notes what it was asked for."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "runs").write_text("\n".join(map(str, runs)))
    return out / "runs"


def study(command, path, *words):
    return CliRunner().invoke(app, ["study", command, str(path), *words])


def rows(result):
    """Cells of a printed table by the first of them."""
    lines = [line.split("│")[1:-1] for line in result.output.splitlines() if line.startswith("│")]
    return {cells[0].strip(): [cell.strip() for cell in cells[1:]] for cells in lines}


def test_every_run_is_trained_measured_and_looked_at_once(played_study, tmp_path):
    path, player = played_study()
    result = study("run", path)
    assert result.exit_code == 0, result.output
    assert player.done == ALL
    compared = (tmp_path / "study" / "report" / "runs").read_text().splitlines()
    assert compared == [str(tmp_path / "study" / run) for run in TRACKS]
    player.done.clear()
    assert study("run", path).exit_code == 0
    assert player.done == []
    table = rows(study("status", path))
    assert [table[run][0] for run in TRACKS] == ["done"] * 6


def test_the_best_by_the_mean_of_its_seeds_goes_into_the_final(played_study, tmp_path):
    path, player = played_study(final={"seeds": [5], "overrides": ["stages.0.kimg=4"]})
    player.figures = {"gan/a-seed0": 1, "gan/a-seed1": 9, "gan/b-seed0": 4, "vae/c-seed0": 0.5}
    player.figures["gan/b-seed1"] = 4.5
    assert study("run", path).exit_code == 0
    assert player.done[len(ALL) :: 3] == ["final/gan-b-seed5 train", "final/vae-c-seed5 train"]
    final = open_study(path).final_runs({"gan": "b"})[0]
    result = json.loads((final.folder / "16x16" / "result.json").read_text())
    assert result["nimg"] == 4000
    summary = (tmp_path / "study" / "report" / "study.md").read_text()
    assert "- gan: b: fid 4.25, mean of 2 seeds" in summary
    assert "| final/gan-b-seed5 | done | 1 |" in summary


def test_a_failed_run_is_recorded_and_stops_no_other(played_study):
    path, player = played_study(final={})
    player.codes["gan/a-seed1", "train"] = 3
    player.codes["vae/c-seed0", "evaluate"] = 4
    player.figures["vae/dd-seed0"] = 0.5
    result = study("run", path)
    assert result.exit_code == 1
    # not trained, it is not measured; not measured, it is still looked at
    assert [one for one in player.done if "a-seed1" in one] == ["gan/a-seed1 train"]
    assert "vae/c-seed0 look" in player.done
    assert player.done[-6::3] == ["final/gan-a-seed0 train", "final/vae-dd-seed0 train"]
    table = rows(study("status", path))
    log = open_study(path).folder / "logs" / "gan" / "a-seed1.log"
    failed = f"train failed (exit code 3): what train says (log: {log})"
    assert table["gan/a-seed1"] == ["failed", "", "", failed]
    assert table["vae/c-seed0"][0] == "failed" and "evaluate" in table["vae/c-seed0"][3]
    player.done.clear()
    player.codes.clear()
    assert study("run", path).exit_code == 0
    again = [f"gan/a-seed1 {step}" for step in ("train", "evaluate", "look")]
    assert player.done == [*again, "vae/c-seed0 evaluate"]
    assert study("status", path).exit_code == 0


def test_what_failed_before_comes_after_what_was_never_tried(played_study):
    path, player = played_study()
    player.codes["gan/a-seed0", "train"] = 3
    player.codes["gan/b-seed0", "train"] = 75  # asked to stop
    assert study("run", path).exit_code == 75
    assert not (open_study(path).folder / "report").exists()
    player.done.clear()
    player.codes.pop(("gan/b-seed0", "train"))
    study("run", path)
    assert player.done[0] == "gan/b-seed0 train" and player.done[-1] == "gan/a-seed0 train"


def test_no_best_where_figures_cannot_be_compared(played_study):
    path, player = played_study(final={})
    player.fingerprints["gan/b-seed1"] = "other"
    player.figures["vae/c-seed0"] = player.figures["vae/dd-seed0"] = "no weights: give a path"
    result = study("run", path)
    assert result.exit_code == 1  # fid is not there
    assert not [one for one in player.done if one.startswith("final")]
    told = study("status", path).output
    assert "gan: no best (fid was measured in different ways" in told and "(other)" in told
    assert "vae: no best (no run has fid: no weights: give a path)" in told
    assert "fid is not available: no weights" in rows(study("status", path))["vae/c-seed0"][3]


def test_runs_without_data_wait_for_them_and_so_does_the_final(played_study, tmp_path):
    path, player = played_study(final={"tracks": ["vae"]})
    config = yaml.safe_load((tmp_path / "c.yaml").read_text())
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config | {"data": {"path": "gone"}}))
    result = study("run", path)
    assert result.exit_code == 1 and "gone holds no packed data" in result.output
    assert len(player.done) == 15 and not [one for one in player.done if "c-seed0" in one]


def test_a_config_that_changed_since_is_refused(played_study, tmp_path):
    path, player = played_study()
    study("run", path)
    text = (tmp_path / "d.yaml").read_text()
    (tmp_path / "d.yaml").write_text(text.replace("batch: 8", "batch: 4"))
    result = study("run", path)
    assert isinstance(result.exception, ConfigError)
    assert f"{tmp_path}/d.yaml: stages.0.batch: " in str(result.exception)
    assert "was trained with 8, the study says 4 now" in str(result.exception)
    assert rows(study("status", path))["vae/dd-seed0"][0] == "changed"
    # what a result does not hang on may change
    (tmp_path / "d.yaml").write_text(f"log: {{every_kimg: 2}}\n{text}")
    assert study("run", path).exit_code == 0
    assert player.done == ALL


def test_one_study_at_a_time(played_study):
    path, player = played_study()
    folder = open_study(path).folder
    assert not is_locked(folder)
    with study_lock(folder):
        assert is_locked(folder)
        result = study("run", path)
    assert isinstance(result.exception, UserError)
    assert "another dinogen study run is at work" in str(result.exception)
    assert player.done == [] and not is_locked(folder)


def test_it_waits_for_a_training_that_outlived_a_killed_study(played_study):
    path, player = played_study()
    folder = open_study(path).folder / "gan" / "a-seed0"
    folder.mkdir(parents=True)
    with (folder / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)

        def finish():
            assert player.done == []
            player.play("gan/a-seed0", "train")
            player.done.clear()
            fcntl.flock(file, fcntl.LOCK_UN)

        timer = threading.Timer(0.7, finish)
        timer.start()
        assert study("run", path).exit_code == 0
        timer.join()
    assert player.done == ALL[1:]


def test_several_processes_share_training_and_measuring(played_study):
    path, _ = played_study(overrides=["metrics.names=[fid]", "metrics.num_samples=9"])
    local = study_local.LocalStudy(open_study(path), 2)
    run = open_study(path).tracks["gan"][0]
    train, evaluate, look = (local._command(run, step)[1] for step in ("train", "evaluate", "look"))
    for command in (train, evaluate):
        assert command[1:4] == ["-m", "launch.torchrun", "--standalone"]
        assert command[command.index("--nproc-per-node") + 1] == "2"
    assert train[-2:] == ["train", str(local.study.copy_of(run))]
    assert evaluate[-4:] == [
        "evaluate",
        str(run.folder),
        'metrics.names=["fid"]',
        "metrics.num_samples=9",
    ]
    assert look[1:] == ["-m", "launch.cli", "look", str(run.folder)]


def test_a_command_adds_to_its_log_in_a_session_of_its_own(tmp_path):
    log = tmp_path / "logs" / "a.log"
    code = "import os, sys; print(os.getsid(0) == os.getpid(), os.environ['X']); sys.exit(3)"
    for _ in range(2):
        process = study_local.start([sys.executable, "-c", code], {"X": "given"}, log)
        assert process.wait(20) == 3
    lines = [line for line in log.read_text().splitlines() if line]
    assert lines[1::2] == ["True given"] * 2
    assert all(line.startswith("# 2") and "-c" in line for line in lines[::2])


# --- on a played SLURM


@pytest.fixture
def on_slurm(played, tmp_path, monkeypatch):
    """A study on a played SLURM, whose jobs end soon after they are submitted."""
    monkeypatch.setattr(study_slurm, "_FIRST_PAUSE", 0.02)
    monkeypatch.setattr(study_slurm, "_LAST_PAUSE", 0.05)
    monkeypatch.setattr("launch.study_report.write_comparison", compared)
    place = tmp_path / "place"
    path = write_study(place, final={"tracks": ["vae"]})
    player = Player(path)
    ended = threading.Event()

    def work():
        while not ended.wait(0.01):
            for line in (played / "jobs").read_text().splitlines():
                number, state = line.split()[:2]
                if state == "PENDING":
                    end(number)

    def end(number):
        """End a job, if those before it have ended well and it is known to its run."""
        for file in (place / "study").glob("*/*/launch/jobs.json"):
            run = str(file.parents[1].relative_to(place / "study"))
            for job in read_jobs(file.parents[1]).jobs:
                if job.id != number:
                    continue
                states = dict(one.split()[:2] for one in (played / "jobs").read_text().splitlines())
                if job.after and states[job.after] == "FAILED":
                    set_state(played, number, "CANCELLED")
                elif not job.after or states[job.after] == "COMPLETED":
                    steps = ["train"] if job.step.startswith("train") else ["evaluate", "look"]
                    code = max(player.play(run, step) for step in steps)
                    set_state(played, number, "FAILED" if code else "COMPLETED", code=code)

    thread = threading.Thread(target=work)
    thread.start()
    yield path, player
    ended.set()
    thread.join()


def test_on_slurm_the_final_follows_the_tracks(on_slurm, played):
    path, player = on_slurm
    player.figures["vae/c-seed0"] = 2.0
    player.codes["gan/b-seed1", "train"] = 9
    result = study("run", path, "--on", "slurm")
    assert result.exit_code == 1, result.output
    assert "train-16 (job" in rows(result)["gan/b-seed1"][0]
    assert "ended as FAILED: exit code 9" in rows(result)["gan/b-seed1"][0]
    assert player.done[-3:] == [
        f"final/vae-dd-seed0 {step}" for step in ("train", "evaluate", "look")
    ]
    lines = submitted(played)
    assert len(lines) == 14
    assert sum("results.sbatch" in line and "metrics." not in line for line in lines) == 7
    player.done.clear()
    player.codes.clear()
    assert study("run", path, "--on", "slurm").exit_code == 0
    assert player.done == [f"gan/b-seed1 {step}" for step in ("train", "evaluate", "look")]
    assert len(submitted(played)) == 16


def test_a_metric_that_was_missing_is_measured_again(on_slurm, played):
    path, player = on_slurm
    player.figures["vae/c-seed0"] = "no weights"
    result = study("run", path, "--on", "slurm")
    assert "fid is not available: no weights" in rows(result)["vae/c-seed0"][0]
    player.figures["vae/c-seed0"] = 2.0  # worse than the other
    player.done.clear()
    assert study("run", path, "--on", "slurm").exit_code == 0
    assert player.done == ["vae/c-seed0 evaluate", "vae/c-seed0 look"]


# --- real runs


@pytest.fixture
def started():
    """Processes of a test; none of them stays, nor one that they have started."""
    processes = []
    yield processes
    for process in processes:
        if process.is_alive():
            kill_all(process.pid)


@pytest.mark.timeout(900)
def test_killed_twice_it_finishes_and_nothing_is_done_again(tmp_path, started):
    path = tiny_study(tmp_path)
    folder = tmp_path / "study"

    said = tmp_path / "said"

    def begin():
        process = start_study(path, said)
        started.append(process)
        return process

    def until_saved(process, run):
        """Until a run has a checkpoint, and is not done."""
        deadline = time.monotonic() + 300
        while not any((folder / run / "16x16" / "checkpoints").glob("0*")):
            assert process.is_alive(), said.read_text()[-3000:]
            assert time.monotonic() < deadline
            time.sleep(0.01)

    def kept(run):
        """Identity of what a finished run has left."""
        stage = folder / run / "16x16"
        files = [stage / name for name in ("result.json", "evaluation.json", "looks/looks.json")]
        return [(file.stat().st_ino, file.stat().st_mtime_ns) for file in files]

    process = begin()
    until_saved(process, "gan/wgan_gp-seed0")
    kill_all(process.pid)
    process.join()
    first = kept("gan/dcgan-seed0")
    assert not (folder / "gan/wgan_gp-seed0/16x16/result.json").exists()

    process = begin()
    until_saved(process, "vae/vae-seed0")
    process.terminate()
    process.join(200)
    assert process.exitcode == 75, said.read_text()[-3000:]
    second = kept("gan/wgan_gp-seed0")
    assert not (folder / "vae/vae-seed0/16x16/result.json").exists()

    process = begin()
    process.join(400)
    assert process.exitcode == 0, said.read_text()[-3000:]
    assert kept("gan/dcgan-seed0") == first and kept("gan/wgan_gp-seed0") == second

    record = json.loads((folder / "study.json").read_text())
    codes = {
        run: [(one["step"], one["code"]) for one in attempts]
        for run, attempts in record["runs"].items()
    }
    once = [("train", 0), ("evaluate", 0), ("look", 0)]
    finals = [run for run in codes if run.startswith("final")]
    assert [run.split("-")[0] for run in finals] == ["final/gan"]
    assert codes.pop("gan/wgan_gp-seed0") == [("train", None), *once]
    assert codes.pop("vae/vae-seed0") == [("train", 75), *once]
    assert list(codes.values()) == [once] * 3
    for run in ("gan/wgan_gp-seed0", "vae/vae-seed0"):
        assert (folder / "logs" / f"{run}.log").read_text().count("resumed from") == 1
        result = json.loads((folder / run / "16x16" / "result.json").read_text())
        assert result["nimg"] == 960

    page = (folder / "report" / "index.html").read_text()
    told = (folder / "report" / "comparison.json").read_text()
    for run in record["runs"]:
        assert run in page or run.split("/")[1] in page
        assert run.split("/")[1] in told
        figures = json.loads((folder / run / "16x16" / "evaluation.json").read_text())["measured"]
        assert str(figures["fd_dinov2"]["value"])[:8] in told
    summary = (folder / "report" / "study.md").read_text()
    assert summary.count("| done |") == 5 and "What failed" not in summary
