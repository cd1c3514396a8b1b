"""What a study has noted may be damaged: it goes on, keeps the file, and says so."""

from __future__ import annotations

import json

import pytest

from dinogen.errors import UserError
from launch.study_plan import open_study
from launch.study_record import read_record
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
