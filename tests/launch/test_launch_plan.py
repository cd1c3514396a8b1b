"""A chain of SLURM jobs, and what of it is submitted again: a played SLURM, no real one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from dinogen.errors import UserError
from launch.cli.main import app
from launch.slurm.jobs import read_jobs
from tests.families.tiny import pack_discs
from tests.launch.played_slurm import set_state, submitted
from tests.launch.study_words import rows


def launch(folder, *words):
    arguments = ["launch", str(folder / "my.yaml"), "--on", "slurm", *words]
    return CliRunner().invoke(app, arguments)


def status(folder):
    result = CliRunner().invoke(app, ["launch", "status", str(folder / "run")])
    return result, {step: " ".join(cells) for step, cells in rows(result).items()}


def record(folder):
    return {job.step: job for job in read_jobs(folder / "run").jobs}


def finish(folder, size, nimg):
    place = folder / "run" / f"{size}x{size}"
    place.mkdir(parents=True, exist_ok=True)
    (place / "result.json").write_text(json.dumps({"nimg": nimg, "health": "ok"}))


def test_each_job_waits_for_the_one_before(played):
    result = launch(played)
    assert result.exit_code == 0, result.output
    jobs = record(played)
    assert list(jobs) == ["train-4", "train-8", "train-16", "evaluate"]
    assert [job.after for job in jobs.values()] == [None, "101", "102", "103"]
    for line, before in zip(submitted(played), [None, "101", "102", "103"], strict=True):
        depends = "--kill-on-invalid-dep=yes" in line and f"--dependency=afterok:{before} " in line
        assert depends == (before is not None)
    assert "--signal=B:USR1@180" in submitted(played)[0]


def test_jobs_read_a_copy_that_later_edits_do_not_reach(played):
    launch(played)
    copy = Path(record(played)["train-4"].config)
    before = copy.read_text()
    text = (played / "my.yaml").read_text().replace("kimg: 1", "kimg: 2")
    (played / "my.yaml").write_text(text)
    launch(played)
    assert copy.read_text() == before
    assert str(copy) in submitted(played)[0]
    assert yaml.safe_load(before)["stages"][0]["kimg"] == 1


def commands(folder):
    return (folder / "run-launch.sh").read_text().splitlines()


def test_a_dry_run_prints_the_chain_and_touches_nothing(played, monkeypatch):
    monkeypatch.chdir(played)
    result = launch(played, "--dry-run", "--time", "12:00:00", "--sbatch=--exclusive")
    assert result.exit_code == 0, result.output
    assert submitted(played) == []
    assert not (played / "run").exists()
    lines = [line for line in commands(played) if "sbatch " in line]
    assert len(lines) == 4
    assert "--dependency=afterok:$train_8 " in lines[2]
    assert all("--time=12:00:00" in line and "--exclusive" in line for line in lines)


def test_asked_again_it_submits_nothing_twice(played):
    launch(played)
    assert "is queued or running" in launch(played).output
    assert len(submitted(played)) == 4


def test_what_is_done_is_left_out_and_the_next_waits_for_nothing(played):
    finish(played, 4, 1000)
    launch(played)
    jobs = record(played)
    assert list(jobs) == ["train-8", "train-16", "evaluate"]
    assert jobs["train-8"].after is None
    finish(played, 8, 2000)
    finish(played, 16, 2999)  # the config asks for 3000 by now
    for job in jobs.values():
        set_state(played, job.id, "COMPLETED")
    launch(played)
    assert len(submitted(played)) == 5
    assert [record(played)[step].id for step in ("train-8", "train-16")] == ["101", "104"]
    assert record(played)["evaluate"].after == "104"


def test_after_a_failure_it_goes_on_from_there(played):
    launch(played)
    finish(played, 4, 1000)
    set_state(played, 101, "COMPLETED")
    set_state(played, 102, "FAILED", "NonZeroExitCode", 1)
    set_state(played, 103, "CANCELLED")
    set_state(played, 104, "PENDING", "DependencyNeverSatisfied")
    result, lines = status(played)
    assert result.exit_code == 1
    assert "exit code 1, see" in lines["train-8"]
    assert "needs train-8 (job 102), which ended as FAILED" in lines["train-16"]
    assert "1 kimg, ok" in lines["train-4"]
    launch(played)
    jobs = record(played)
    assert [jobs[step].id for step in ("train-8", "train-16", "evaluate")] == ["105", "106", "107"]
    assert jobs["train-8"].after is None and jobs["train-16"].after == "105"
    assert (played / "cancelled").read_text().split() == ["104"]


def test_a_refusal_is_shown_and_a_half_submitted_chain_goes_on(played):
    (played / "refuse").write_text("train-16")
    result = launch(played)
    assert isinstance(result.exception, UserError)
    words = str(result.exception)
    assert words.startswith("train-16: sbatch refuses (exit code 1): invalid partition specified")
    assert list(record(played)) == ["train-4", "train-8"]
    (played / "refuse").unlink()
    assert launch(played).exit_code == 0
    jobs = record(played)
    assert jobs["train-16"].after == jobs["train-8"].id == "102"
    assert len([line for line in submitted(played) if "job-name=run-train-4" in line]) == 1


def test_jobs_that_slurm_has_forgotten(played):
    launch(played)
    (played / "jobs").write_text("")
    finish(played, 4, 1000)
    result, lines = status(played)
    assert "forgotten" in lines["train-4"] and "see" not in lines["train-4"]
    assert "see" in lines["train-8"] and "see" in lines["evaluate"]
    assert result.exit_code == 1
    for size, nimg in ((8, 2000), (16, 3000)):
        finish(played, size, nimg)
    (played / "run" / "16x16" / "evaluation.json").write_text('{"nimg": 3000}')
    result, lines = status(played)
    assert result.exit_code == 0, result.output


def test_the_last_word_of_slurm_is_kept(played):
    launch(played)
    set_state(played, 101, "FAILED", "NonZeroExitCode", 3)
    launch(played)  # notes it
    assert read_jobs(played / "run").jobs[0].state == "FAILED"
    assert read_jobs(played / "run").jobs[0].exit_code == 3


def test_some_stages_only(played):
    launch(played, "--stages", "4..8")
    assert list(record(played)) == ["train-4", "train-8", "evaluate"]
    launch(played, "--stages", "16")
    jobs = record(played)
    assert jobs["train-16"].after == jobs["train-8"].id
    assert jobs["evaluate"].after == jobs["train-16"].id
    assert (played / "cancelled").read_text().split() == ["103"]  # it would have come too early


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--stages", "8"), "launch both (--stages 4..16)"),
        (("--stages", "5"), "stage 5 is not in the config: stages are [4, 8, 16]"),
        (("--stages", "8..4"), "as 4..8"),
        (("--gpus", "2"), "--gpus is for --on local"),
        (("data.path=nothing",), "add --photos PHOTOS"),
        (("data.path=nothing", "--photos", "none"), "--photos none: no such folder"),
        (("run=a,b",), "cannot pass a path with a comma"),
        (("--nodes", "2", "cluster.nodse=1"), "did you mean 'nodes'"),
        (("--engine", "horovod"), "engine.name"),
    ],
)
def test_what_cannot_be_launched_is_one_error(played, monkeypatch, words, told):
    monkeypatch.chdir(played)
    result = launch(played, *words)
    assert isinstance(result.exception, UserError), result.output
    assert told in str(result.exception)
    assert submitted(played) == []


def test_no_slurm_here(played, monkeypatch):
    monkeypatch.chdir(played)
    monkeypatch.setenv("PATH", "/nowhere")
    result = launch(played)
    assert "sbatch is not on the PATH" in str(result.exception)
    assert launch(played, "--dry-run").exit_code == 0
    result = CliRunner().invoke(app, ["launch", "status", str(played / "run")])
    assert "no jobs were submitted" in str(result.exception)


def test_a_record_that_cannot_be_read_is_no_reason_to_submit_again(played):
    launch(played)
    (played / "run" / "launch" / "jobs.json").write_text("{")
    result = launch(played)
    assert "jobs.json: cannot be read" in str(result.exception)
    assert len(submitted(played)) == 4


def test_photos_are_made_into_data_first(played):
    (played / "photos").mkdir()
    words = (f"data.path={played / 'new'}", "--photos", str(played / "photos"))
    words += ("prepare.pyramids.make=always", "guide.name=pixels")
    launch(played, *words, "prepare.pack.val_fraction=0.1")
    jobs = record(played)
    assert list(jobs) == ["faces", "pyramids", "pack", "train-4", "train-8", "train-16", "evaluate"]
    assert jobs["pack"].command[-3:] == [
        f"{played / 'new'}-faces",
        f"{played / 'new'}-pyramids",
        str(played / "new"),
    ]
    # what was made is not made again, though only SLURM knows of it
    for step in ("faces", "pyramids"):
        set_state(played, jobs[step].id, "COMPLETED")
    set_state(played, jobs["pack"].id, "FAILED", "NonZeroExitCode", 1)
    launch(played, *words)
    again = record(played)
    assert again["faces"].id == jobs["faces"].id
    assert again["pack"].id != jobs["pack"].id and again["pack"].after is None


def test_a_family_that_reads_no_pyramids_has_none_made(played):
    (played / "photos").mkdir()
    config = yaml.safe_load((played / "my.yaml").read_text())
    config |= {"family": {"name": "dcgan"}, "stages": [{"resolution": 32, "epochs": 2}]}
    (played / "my.yaml").write_text(yaml.safe_dump(config))
    launch(played, f"data.path={played / 'new'}", "--photos", str(played / "photos"))
    jobs = record(played)
    assert list(jobs) == ["faces", "pack", "train-32"]
    assert jobs["pack"].after == jobs["faces"].id
    assert jobs["pack"].command[-2:] == [f"{played / 'new'}-faces", str(played / "new")]


def test_a_mix_has_to_be_there(played):
    (played / "photos").mkdir()
    config = yaml.safe_load((played / "my.yaml").read_text())
    paths = [str(played / "data"), str(played / "other")]
    config["data"] = {"mix": [{"path": path, "weight": 1} for path in paths]}
    (played / "my.yaml").write_text(yaml.safe_dump(config))
    for words in ((), ("--photos", str(played / "photos"))):
        told = str(launch(played, *words).exception)
        assert f"data.mix: {played / 'other'} holds no packed data" in told
    pack_discs(played / "other")
    launch(played)
    assert list(record(played)) == ["train-4", "train-8", "train-16", "evaluate"]


def test_without_held_out_samples_there_is_no_evaluation(played):
    pack_discs(played / "whole", val_fraction=0)
    launch(played, f"data.path={played / 'whole'}")
    assert list(record(played)) == ["train-4", "train-8", "train-16"]


def test_deepspeed_is_a_key_of_the_config_that_the_jobs_read(played):
    launch(played, "--engine", "deepspeed")
    copy = yaml.safe_load(Path(record(played)["train-4"].config).read_text())
    assert copy["engine"]["name"] == "deepspeed"


def test_jobs_that_wait_for_each_other_in_a_circle_are_shown(played):
    """A damaged jobs.json: every walk along it ends."""
    launch(played)
    path = played / "run" / "launch" / "jobs.json"
    data = json.loads(path.read_text())
    for job, before in zip(data["jobs"], data["jobs"][1:] + data["jobs"][:1], strict=True):
        job["after"] = before["id"]
        set_state(played, job["id"], "CANCELLED")
    path.write_text(json.dumps(data))
    result, rows = status(played)
    assert result.exception is None or isinstance(result.exception, SystemExit)
    assert rows and all("cancelled" in row for step, row in rows.items() if "train" in step)
