"""docs/today.md and the section of docs/study.md before it: their commands run, in their order."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from launch.cli.main import app
from launch.study import run as study_run
from tests.families.tiny import pack_discs
from tests.launch import studies
from tests.launch.studies import Player
from tests.launch.study_words import compared, rows
from tests.test_readme import photo

ROOT = Path(__file__).parents[2]


def text_of(page: str) -> str:
    return (ROOT / "docs" / page).read_text(encoding="utf-8")


def commands(text: str) -> list[list[str]]:
    blocks = re.findall(r"^```sh\n(.*?)^```", text, re.M | re.S)
    return [shlex.split(line)[1:] for block in blocks for line in block.splitlines()]


@pytest.mark.usefixtures("calm")
def test_the_fast_study_fits_the_data_that_its_page_prepares(tmp_path, monkeypatch):
    """From photos: every config finds its levels in the one preparation. Training is played."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "240")
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    (tmp_path / "photos").mkdir()
    for number in range(12):
        photo(number).save(tmp_path / "photos" / f"{number}.jpg", quality=90)
    monkeypatch.setattr(studies, "METRIC", "spectrum")
    monkeypatch.setattr("launch.study.status.write_comparison", compared)
    player = Player(ROOT / "configs" / "today_fast.yaml")
    monkeypatch.setattr(study_run, "start", player.start)
    told = {}
    for words in commands(text_of("today.md")):
        result = CliRunner().invoke(app, words)
        assert result.exit_code == 0, f"{words}\n{result.output}\n{result.exception}"
        told[words[1]] = result
    table = {key: cells for key, cells in rows(told["plan"]).items() if "-seed" in key}
    assert len(table) == 36 and {cells[0] for cells in table.values()} == {"to do"}
    assert not [cells for cells in table.values() if "cannot work" in cells[-1]]
    assert player.done[:9] == [f".speed/minutes/{name} train" for name in models()]
    assert sum(one.endswith(" train") for one in player.done) == 9 + 36
    notes = (tmp_path / "runs" / "today_fast" / "report" / "notes").read_text()
    assert "images: 16 k images each" in notes and "minutes: 3 minutes each: dcgan " in notes


def models() -> list[str]:
    """The models of the table in docs/today.md."""
    table = text_of("today.md").split("## Running it")[0]
    return re.findall(r"^\| `(\w+)` \| `", table, re.M)


def test_the_pages_table_is_the_plan():
    for name in ("today", "today_fast"):
        plan = yaml.safe_load((ROOT / "configs" / f"{name}.yaml").read_text(encoding="utf-8"))
        entries = plan["tracks"]["images"]["configs"]
        assert [one["name"] for one in entries] == models()
        shown = dict(re.findall(r"^\| `(\w+)` \| `(\w+)_64` ", text_of("today.md"), re.M))
        suffix = "_64.yaml" if name == "today" else "_fast.yaml"
        assert plan["tracks"]["minutes"]["configs"] == entries
        num_runs = sum(len(t["configs"]) * len(t["seeds"]) for t in plan["tracks"].values())
        said = "The fast study" if name == "today_fast" else "`configs/today.yaml`"
        assert f"{said} has {num_runs} runs" in text_of("today.md")
        assert [one["config"] for one in entries] == [shown[key] + suffix for key in models()]


@pytest.mark.usefixtures("calm")
def test_the_example_of_equal_images_and_equal_time(tmp_path, monkeypatch):
    section = text_of("study.md").split("## Equal images or equal time")[1].split("\n## ")[0]
    (plan,) = re.findall(r"```yaml\n(.*?)```", section, re.S)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text(plan)
    names = ("dcgan_fast", "flow_fast", "flow_dit_fast")
    for name in names:
        config = (ROOT / "configs" / f"{name}.yaml").read_text(encoding="utf-8")
        (tmp_path / f"{name}.yaml").write_text(config.replace("data/faces_32", "data/faces"))
    pack_discs(tmp_path / "data" / "faces")
    (tmp_path / "mine.yaml").write_text(f"folder: study\n{plan}")
    player = Player(tmp_path / "mine.yaml")
    monkeypatch.setattr(study_run, "start", player.start)
    shown = commands(section)
    assert [words[1] for words in shown] == ["measure", "plan"]
    for words in shown:
        result = CliRunner().invoke(app, words)
        assert result.exit_code == 0, f"{words}\n{result.output}\n{result.exception}"
    assert player.done == [f".speed/minutes/{name} train" for name in names]
    assert "minutes: 3 minutes each: dcgan_fast 9 k images" in result.output
