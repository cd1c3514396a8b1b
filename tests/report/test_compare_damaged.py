"""Thirty damaged runs in one comparison: each is listed with its reason, and all sound ones."""

import json
import os
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from launch.cli.main import app

from .compare_runs import make_run
from .compared_page import Page, cell

SOUND = {"sound-1": 1.25, "sound-2": 2.5, "lr=2e-4": 3.75}


def put(name, content):
    """Give a file of the run other content."""

    def damage(run):
        path = run / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())

    return damage


def edit(name, **changes):
    """Change keys of a JSON file of the run."""

    def damage(run):
        path = run / name
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return damage


def cut(name):
    """Leave half of a file."""

    def damage(run):
        path = run / name
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])

    return damage


def replace(name, make):
    """Something else in the place of a file or folder."""

    def damage(run):
        path = run / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        make(path)

    return damage


def line(name, content, place=5):
    """Another line in the midst of a file."""

    def damage(run):
        path = run / name
        rows = path.read_bytes().splitlines(keepends=True)
        path.write_bytes(b"".join([*rows[:place], content + b"\n", *rows[place:]]))

    return damage


RESULT, STATS = "32x32/result.json", "32x32/stats.jsonl"
EVALUATION, LOOKS = "32x32/evaluation.json", "32x32/visualizations/visualizations.json"
STATE = "32x32/checkpoints/000020016/state.json"
# name: (what is done to a copy of a run, what has to be said of it)
DAMAGES = {
    "notes": (put("config.yaml", "run: x\nnotes: some text\n"), "notes: 'some text' is not a map"),
    "family": (put("config.yaml", "run: x\nfamily: dcgan\n"), "family: 'dcgan' is not a mapping"),
    "config-ff": (put("config.yaml", b"run: x\n\xff\xfe\n"), "config.yaml cannot be read"),
    "config-list": (put("config.yaml", "- a\n- b\n"), "not a list"),
    "config-empty": (put("config.yaml", ""), "config.yaml is empty"),
    "config-yaml": (put("config.yaml", "run: [x\nseed: {"), "not valid YAML"),
    "config-twice": (put("config.yaml", "seed: 1\nseed: 2\n"), "occurs twice"),
    "config-stages": (put("config.yaml", "stages: [4, 8]\n"), "stages: 0: 4 is not a mapping"),
    "config-gone": (lambda run: (run / "config.yaml").unlink(), "config.yaml is missing"),
    "config-folder": (replace("config.yaml", Path.mkdir), "it is a folder"),
    "config-pipe": (replace("config.yaml", os.mkfifo), "not a regular file"),
    "config-link": (replace("config.yaml", lambda p: p.symlink_to(p)), "config.yaml cannot be"),
    "stats-ff": (line(STATS, b"\xff\xff"), "line 6 is left out: not UTF-8 text"),
    "stats-half": (cut(STATS), "is left out: not JSON"),
    "stats-list": (line(STATS, b"[1, 2]"), "line 6 is left out: [1, 2] is not a mapping"),
    "stats-zeros": (put(STATS, bytes(4096)), "holds no line of statistics"),
    "stats-folder": (replace(STATS, Path.mkdir), "stats.jsonl cannot be read: it is a folder"),
    "nimg": (put(RESULT, '{"nimg": "many"}'), "nimg: 'many' is not a whole number"),
    "result-list": (put(RESULT, "[]"), "[] is not a mapping"),
    "result-empty": (put(RESULT, ""), "result.json cannot be read: it is empty"),
    "result-half": (cut(RESULT), "result.json cannot be read: not JSON"),
    "result-nan": (edit(RESULT, nimg=float("nan"), seconds=10**400), "result.json: nimg"),
    "result-files": (edit(RESULT, files="final.png", warnings=3), "files: 'final.png' is not a"),
    "result-deep": (put(RESULT, b'{"a":' * 50_000), "nested too deep"),
    "measured": (edit(EVALUATION, measured=[1], metrics="x"), "measured: [1] is not a mapping"),
    "figures": (
        edit(EVALUATION, measured={"fid768": {"value": "12"}, "kid768": 3}),
        "measured: fid768: value: '12' is not a finite number",
    ),
    "fingerprints": (edit(EVALUATION, fingerprints={"a": None}, sampling=3), "fingerprints: a: "),
    "surrogate": (
        put(EVALUATION, b'{"command": "\\ud800", "nimg": -3}'),
        "nimg: -3 is not a whole",
    ),
    "metrics-cut": (put("32x32/metrics.jsonl", b'{"nimg": 16, "metr'), "metrics.jsonl: line 1"),
    "visualizations": (
        put(LOOKS, '{"grid16": "grid16.png", "a": {"file": "/etc/passwd"}}'),
        "grid16: ",
    ),
    "looks-half": (cut(LOOKS), "visualizations.json cannot be read"),
    "state": (put(STATE, "{"), "state.json cannot be read"),
    "empty": (lambda run: [shutil.rmtree(run), run.mkdir()], "config.yaml is missing"),
    "a-file": (replace("", Path.touch), "not a folder"),
    "stage-file": (replace("32x32", Path.touch), "no stage has a folder"),
}


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """Copies of one run, each damaged in one way, among sound ones, in one call."""
    place = tmp_path_factory.mktemp("damaged")
    for name, value in SOUND.items():
        make_run(place / "runs" / name, value)
    for name, (damage, _) in DAMAGES.items():
        run = place / "runs" / name
        shutil.copytree(place / "runs" / "sound-1", run)
        damage(run)
    paths = [str(path) for path in sorted((place / "runs").iterdir())]
    words = ["compare", *paths, "--out", str(place / "out"), "--as-is"]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, (done.output, done.exception)
    page = Page((place / "out" / "index.html").read_text())
    data = json.loads((place / "out" / "comparison.json").read_text())
    return done, page, data, (place / "out" / "comparison.md").read_text()


def test_there_are_thirty_of_them(compared):
    _, _, data, _ = compared
    assert len(DAMAGES) >= 30
    assert {run["name"] for run in data["runs"]} == {*SOUND, *DAMAGES}


@pytest.mark.parametrize("name", DAMAGES)
def test_each_is_listed_with_its_reason(compared, name):
    done, page, data, text = compared
    said = "; ".join(data["failures"][name]["what"])
    assert DAMAGES[name][1] in said
    assert " ".join(said.split()) in page.text
    assert f"**{name}**" in text and DAMAGES[name][1] in text.replace("&lt;", "<")
    if name != "stage-file":  # such a run has never begun, as far as anybody can see
        assert data["damaged"][name] and f"DAMAGED {name}: " in done.output


def test_all_sound_runs_are_compared(compared):
    done, page, data, _ = compared
    runs = {run["name"]: run for run in data["runs"]}
    for name, value in SOUND.items():
        assert runs[name]["numbers"]["fid768"]["value"] == value
        assert cell(page, name, "FID-768")[0].startswith(f"{value:.2f}")
        assert name not in data["damaged"] and f"DAMAGED {name}" not in done.output
    assert "DAMAGED FILES in" in page.text
    # and what is sound of a damaged one
    assert runs["stats-ff"]["numbers"]["fid768"]["value"] == SOUND["sound-1"]
    assert len(runs["stats-ff"]["curves"]["loss"]["values"]) == 20


def test_if_no_run_is_sound_the_command_fails_but_says_so_on_a_page(tmp_path):
    run = make_run(tmp_path / "a")
    (run / RESULT).write_text("{")
    done = CliRunner().invoke(app, ["compare", str(run), "--out", str(tmp_path / "o"), "--as-is"])
    assert done.exit_code == 1
    assert "no run is sound" in done.output
    assert "result.json cannot be read" in (tmp_path / "o" / "index.html").read_text()


@pytest.mark.parametrize(
    "typed", ["runs/lr=2e-4 typo", "lr=3", "./a=b", "runs/none", "dataa.path=x"]
)
def test_a_mistyped_path_is_an_error_that_names_it(tmp_path, monkeypatch, typed):
    monkeypatch.chdir(tmp_path)
    make_run(tmp_path / "runs" / "a")
    done = CliRunner().invoke(app, ["compare", typed, "runs/a", "--out", "o", "--as-is"])
    assert f"{typed}: no such folder" in str(done.exception)
    assert not Path("o").exists()


def test_a_path_that_is_there_wins_over_a_change(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_run(tmp_path / "seed=1", 1.0)
    make_run(tmp_path / "b", 2.0)
    words = ["compare", "seed=1", "b", "metrics.num_samples=9", "--out", "o", "--as-is"]
    assert CliRunner().invoke(app, words).exit_code == 0
    data = json.loads(Path("o/comparison.json").read_text())
    assert [run["name"] for run in data["runs"]] == ["seed=1", "b"]


def test_one_rotten_config_of_a_folder_costs_its_own_run(tmp_path):
    run = make_run(tmp_path / "runs" / "a")
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "a.yaml").write_text((run / "config.yaml").read_text())
    (tmp_path / "configs" / "b.yaml").write_text("family: dcgan\n")
    words = ["compare", str(tmp_path / "configs"), "--out", str(tmp_path / "o"), "--as-is"]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0 and "b.yaml: its run is left out" in done.output
    assert len(json.loads((tmp_path / "o" / "comparison.json").read_text())["runs"]) == 1
