"""Files of runs that earlier versions wrote, with keys that have other names today."""

from __future__ import annotations

import json

import pytest

from dinogen.runs.files import read_evaluation, read_result, read_state
from dinogen.runs.values import RENAMED, with_new_keys


def test_no_name_of_today_is_renamed_again():
    assert not set(RENAMED) & set(RENAMED.values())


@pytest.mark.parametrize(
    ("read", "stored", "today"),
    [
        (read_result, {"nimg": 8, "verdict": "COLLAPSED"}, {"nimg": 8, "health": "COLLAPSED"}),
        (read_evaluation, {"pictures": "/x", "verdict": "ok"}, {"images": "/x", "health": "ok"}),
        (read_state, {"progress": {"verdict": "ok"}}, {"progress": {"health": "ok"}}),
    ],
)
def test_each_file_is_read_under_the_names_of_today(tmp_path, read, stored, today):
    path = tmp_path / "file.json"
    path.write_text(json.dumps(stored))
    assert read(path).value == today
    path.write_text(json.dumps(today))
    assert read(path).value == today


def test_of_both_names_the_one_of_today_stands():
    assert with_new_keys({"verdict": "old", "a": 1, "health": "new"}) == {
        "a": 1,
        "health": "new",
    }
