"""A study is run to its end, whatever becomes of single runs; what it does is played."""

from __future__ import annotations

import fcntl
import json
import sys
import threading

import pytest
import yaml

from dinogen.config import ConfigError
from dinogen.errors import UserError
from dinogen.runs.fingerprint import fingerprint_id
from launch.study import run as study_run
from launch.study.plan import open_study
from launch.study.state import is_locked, study_lock
from tests.launch.studies import Player, write_study
from tests.launch.study_words import compared, rows, study

pytestmark = pytest.mark.usefixtures("calm")

TRACKS = ["gan/a-seed0", "gan/a-seed1", "gan/b-seed0", "gan/b-seed1", "vae/c-seed0", "vae/dd-seed0"]
ALL = [f"{run} {step}" for run in TRACKS for step in ("train", "evaluate", "look")]


@pytest.fixture
def played_study(tmp_path, monkeypatch):
    """Makes a study whose commands are played."""

    def make(**more):
        path = write_study(tmp_path, **more)
        player = Player(path)
        monkeypatch.setattr(study_run, "start", player.start)
        monkeypatch.setattr("launch.study.status.write_comparison", compared)
        return path, player

    return make


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
    player.metric_values = {
        "gan/a-seed0": 1,
        "gan/a-seed1": 9,
        "gan/b-seed0": 4,
        "vae/c-seed0": 0.5,
    }
    player.metric_values["gan/b-seed1"] = 4.5
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
    player.metric_values["vae/dd-seed0"] = 0.5
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


def test_no_best_where_values_cannot_be_compared(played_study):
    path, player = played_study(final={})
    player.fingerprints["gan/b-seed1"] = other = {"data": "other"}
    player.metric_values["vae/c-seed0"] = player.metric_values["vae/dd-seed0"] = (
        "no weights: give a path"
    )
    result = study("run", path)
    assert result.exit_code == 1  # fid is not there
    assert not [one for one in player.done if one.startswith("final")]
    told = study("status", path).output
    assert (
        "gan: no best (fid was measured in different ways" in told and fingerprint_id(other) in told
    )
    assert "vae: no best (no run has fid: no weights: give a path)" in told
    assert "fid is not available: no weights" in rows(study("status", path))["vae/c-seed0"][3]


def test_noise_of_a_familys_own_does_not_keep_a_track_from_having_a_best(played_study):
    path, player = played_study(final={})
    for run in ("gan/b-seed0", "gan/b-seed1"):
        player.fingerprints[run] = {"data": "abc", "sampling": {"noise": "per image"}}
    assert study("run", path).exit_code == 0
    assert "no best" not in study("status", path).output


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
    assert "another dinogen study run is using" in str(result.exception)
    assert player.done == [] and not is_locked(folder)


def test_a_run_whose_folder_cannot_be_made_does_not_stop_the_others(played_study):
    path, player = played_study()
    folder = open_study(path).folder / "gan" / "a-seed0"
    folder.parent.mkdir(parents=True)
    folder.write_text("a file in its place")
    result = study("run", path)
    assert result.exit_code == 1 and "a-seed0 cannot be written (" in result.output
    assert player.done == [one for one in ALL if not one.startswith("gan/a-seed0")]


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
    local = study_run.LocalStudy(open_study(path), 2)
    run = open_study(path).tracks["gan"][0]
    train, evaluate, look = (local._command(run, step)[1] for step in ("train", "evaluate", "look"))
    for command in (train, evaluate):
        assert command[1:4] == ["-m", "launch.local.torchrun", "--standalone"]
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
        process = study_run.start([sys.executable, "-c", code], {"X": "given"}, log)
        assert process.wait(120) == 3
    lines = [line for line in log.read_text().splitlines() if line]
    assert lines[1::2] == ["True given"] * 2
    assert all(line.startswith("# 2") and "-c" in line for line in lines[::2])
