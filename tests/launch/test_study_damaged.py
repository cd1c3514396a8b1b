"""What a study has noted may be damaged: it goes on, keeps the file, and says so."""

from __future__ import annotations

import json

import pytest

from dinogen.config import Config
from dinogen.errors import UserError
from launch.slurm.jobs import read_jobs
from launch.slurm.plan import _holds_back
from launch.study.plan import open_study
from launch.study.state import read_record
from tests.launch.studies import write_study

ATTEMPT = {"step": "train", "command": ["a"], "log": "x.log", "began": "now", "code": -9}
DAMAGES = {
    "bytes that are no text": b"\xff\xfe",
    "half": b'{"format": 1, "runs": {"gan/a',
    "a list": b"[]",
    "runs of another kind": json.dumps({"format": 1, "best": [], "runs": [1]}).encode(),
    "attempts of another kind": json.dumps({"format": 1, "runs": {"gan/a": [3, {}]}}).encode(),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_record_is_kept_and_the_study_goes_on(tmp_path, damage):
    study = open_study(write_study(tmp_path))
    study.folder.mkdir(parents=True, exist_ok=True)
    record = read_record(study)
    record.path.write_bytes(DAMAGES[damage])
    found = read_record(study)
    assert found.damaged
    found.write()
    assert (record.path.parent / "study.json.damaged").read_bytes() == DAMAGES[damage]
    assert not read_record(study).damaged


def test_what_is_sound_of_a_record_stays(tmp_path):
    study = open_study(write_study(tmp_path))
    study.folder.mkdir(parents=True, exist_ok=True)
    runs = {"gan/a": [ATTEMPT | {"of a later version": 1}, 3], "gan/b": [ATTEMPT | {"what": "x"}]}
    path = read_record(study).path
    path.write_text(json.dumps({"format": 1, "best": {"gan": "a"}, "runs": runs}))
    found = read_record(study)
    assert found.best == {"gan": "a"}
    assert [one.code for one in found.attempts["gan/a"]] == [-9]
    assert found.attempts["gan/b"][0].what == "x"


def test_a_record_of_a_later_version_is_left_alone(tmp_path):
    study = open_study(write_study(tmp_path))
    study.folder.mkdir(parents=True, exist_ok=True)
    read_record(study).path.write_text('{"format": 2, "runs": {}}')
    with pytest.raises(UserError, match="format 2, this version knows 1"):
        read_record(study)


JOB = {"step": "pack", "id": "7", "after": None, "submitted": "now", "command": ["sbatch"]}
JOB |= {"config": "c.yaml", "log": "l.txt"}


@pytest.mark.parametrize(
    "change", [{"id": 7}, {"id": "x"}, {"step": "train"}, {"step": 3}, {"log": None}, {"state": ""}]
)
def test_what_is_no_job_is_named(tmp_path, change):
    path = tmp_path / "launch" / "jobs.json"
    path.parent.mkdir()
    path.write_text(json.dumps({"format": 1, "jobs": [JOB]}))
    assert [job.id for job in read_jobs(tmp_path).jobs] == ["7"]
    path.write_text(json.dumps({"format": 1, "jobs": [JOB | change]}))
    with pytest.raises(UserError, match=r"jobs\.json: cannot be read"):
        read_jobs(tmp_path)


@pytest.mark.parametrize("text", ["[" * 100_000, "[1]", "3", '{"splits": 3}'])
def test_a_manifest_of_another_kind_stops_no_plan(tmp_path, text):
    (tmp_path / "manifest.json").write_text(text)
    assert _holds_back(Config(), str(tmp_path))
