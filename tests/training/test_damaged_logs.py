"""A run whose logs were damaged goes on, and what is appended to them stays whole."""

from __future__ import annotations

import json

import pytest

from dinogen.errors import UserError
from dinogen.training.logging.logger import append_line, cut_lines
from dinogen.training.run import train
from tests.families.conftest import disc_data  # noqa: F401 - a fixture
from tests.families.tiny import tiny_config

DAMAGES = {
    "a byte that is no text": lambda text: text.replace(b'"nimg"', b'"nim\xff"', 1),
    "zeros of a power cut": lambda text: text + bytes(100),
    "half a line": lambda text: text[:-20],
    "another kind of line": lambda text: b'["a"]\n{"nimg": "many"}\n' + text,
    "empty": lambda text: b"",
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_run_with_a_damaged_log_is_resumed(damage, disc_data, tmp_path):  # noqa: F811
    config = tiny_config("dcgan", disc_data, tmp_path / "run", "stages.0.kimg=0.016")
    train(config)
    folder = config.run / "16x16"
    stats = folder / "stats.jsonl"
    stats.write_bytes(DAMAGES[damage](stats.read_bytes()))
    (folder / "metrics.jsonl").write_bytes(b'{"nimg": 16, "metr')
    (folder / "result.json").write_text('{"nimg": "many"}')
    (result,) = train(tiny_config("dcgan", disc_data, tmp_path / "run", "stages.0.kimg=0.032"))
    assert result["nimg"] == 32
    lines = [json.loads(line) for line in stats.read_text().splitlines()]
    assert [line["nimg"] for line in lines][-1] == 32
    assert json.loads((folder / "result.json").read_text())["nimg"] == 32
    # the same call again is no work, though the result was lost
    (folder / "result.json").write_text("[")
    (again,) = train(tiny_config("dcgan", disc_data, tmp_path / "run", "stages.0.kimg=0.032"))
    assert again["nimg"] == 32


def test_a_log_that_was_lost_costs_the_stage_its_curve_alone(disc_data, tmp_path):  # noqa: F811
    config = tiny_config("dcgan", disc_data, tmp_path / "run", "stages.0.kimg=0.016")
    train(config)
    folder = config.run / "16x16"
    (folder / "stats.jsonl").unlink()
    (folder / "result.json").unlink()
    (result,) = train(config)
    assert result["status"] == "finished" and "loss_curve" not in result["files"]
    assert (config.run / "index.html").is_file()


def test_what_is_appended_behind_a_cut_line_is_a_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"nimg": 1}\n{"nimg": 2, "a')
    append_line(path, {"nimg": 3})
    assert path.read_bytes() == b'{"nimg": 1}\n{"nimg": 2, "a\n{"nimg": 3}\n'
    cut_lines(path, 3)
    assert path.read_bytes() == b'{"nimg": 1}\n{"nimg": 3}\n'
    path.write_bytes(b'{"nimg": 1}')
    cut_lines(path, 3)
    assert path.read_bytes() == b'{"nimg": 1}\n'


def test_a_folder_in_the_place_of_a_log_is_named(tmp_path):
    (tmp_path / "stats.jsonl").mkdir()
    with pytest.raises(UserError, match="it is a folder: move it away"):
        cut_lines(tmp_path / "stats.jsonl", 3)
