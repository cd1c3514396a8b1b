"""A study whose jobs run on a played SLURM: what follows what, and what is measured again."""

from __future__ import annotations

import threading

import pytest

from launch.slurm.jobs import read_jobs
from tests.launch.played_slurm import set_state, submitted
from tests.launch.studies import Player, write_study
from tests.launch.study_words import compared, rows, study

pytestmark = pytest.mark.usefixtures("calm")


@pytest.fixture
def on_slurm(played, tmp_path, monkeypatch):
    """A study on a played SLURM, whose jobs end soon after they are submitted."""
    monkeypatch.setattr("launch.study.slurm._FIRST_PAUSE", 0.02)
    monkeypatch.setattr("launch.study.slurm._LAST_PAUSE", 0.05)
    monkeypatch.setattr("launch.study.status.write_comparison", compared)
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
    player.metric_values["vae/c-seed0"] = 2.0
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
    player.metric_values["vae/c-seed0"] = "no weights"
    result = study("run", path, "--on", "slurm")
    assert "fid is not available: no weights" in rows(result)["vae/c-seed0"][0]
    player.metric_values["vae/c-seed0"] = 2.0  # worse than the other
    player.done.clear()
    assert study("run", path, "--on", "slurm").exit_code == 0
    assert player.done == ["vae/c-seed0 evaluate", "vae/c-seed0 look"]
