"""Every command of docs/project.md, on a tiny run, in their order."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from launch.cli.main import app

ROOT = Path(__file__).parents[2]
COMMANDS = [
    line
    for block in re.findall(
        r"^```sh\n(.*?)^```", (ROOT / "docs/project.md").read_text(), re.M | re.S
    )
    for line in block.splitlines()
]
# What would take minutes, made short.
SHORTER = {
    "project": ["--steps", "2", "--no-align", "--loss", "pixels"],
    "video": ["--fps", "3", "--seconds", "1"],
}


def test_the_page_has_commands():
    assert {shlex.split(line)[1] for line in COMMANDS} == {"project", "sample", "look", "video"}


def test_every_command_runs(runs, photos, tmp_path, monkeypatch):
    run = runs("stylegan2_ada")
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "first").symlink_to(run)
    (tmp_path / "photos").symlink_to(photos)
    monkeypatch.chdir(tmp_path)
    for line in COMMANDS:
        words = shlex.split(line)
        assert words[0] == "dinogen"
        done = CliRunner().invoke(app, [*words[1:], *SHORTER.get(words[1], [])])
        assert done.exit_code == 0, f"{line}\n{done.output}\n{done.exception!r}"
    assert (tmp_path / "photos.gif").stat().st_size and (tmp_path / "styles.mp4").stat().st_size
    assert list((run / "projections").glob("*/directions.png"))
    assert len(list((run / "videos").glob("*.mp4"))) == 1


@pytest.mark.parametrize("command", ["project", "video"])
def test_help_names_every_option_with_a_sentence(command):
    done = CliRunner().invoke(app, [command, "--help"], terminal_width=200)
    assert done.exit_code == 0
    assert "Examples" in done.output and f"dinogen {command} runs/" in done.output
