"""dinogen compare: what is missing is measured first, and a folder of configs stands for runs."""

import json
from pathlib import Path

from typer.testing import CliRunner

from dinogen.errors import UserError
from launch.cli.main import app

from .compare_runs import ALIKE, make_run, metric_value, write


def test_the_command_makes_what_is_missing(tmp_path, monkeypatch):
    whole = make_run(tmp_path / "runs" / "whole")
    bare = make_run(tmp_path / "runs" / "bare")
    (bare / "32x32" / "evaluation.json").unlink()
    (bare / "32x32" / "visualizations" / "visualizations.json").unlink()
    calls = []

    class Done:
        returncode = 1

    def call(command, **_):
        calls.append(command[3:])
        return Done

    monkeypatch.setattr("launch.compare.subprocess.run", call)
    out = tmp_path / "out"

    def command(*words):
        calls.clear()
        done = CliRunner().invoke(app, ["compare", *map(str, words), "--out", str(out)])
        assert done.exit_code == 0, done.output
        return calls, done

    place = ["--stage", "32"]
    found, done = command(tmp_path / "runs", "metrics.num_samples=9", "--title", "Mine")
    assert found == [
        ["evaluate", str(bare), *place, "metrics.num_samples=9"],
        ["look", str(bare), *place],
    ]
    assert "exit code 1" in done.output  # and the comparison is written all the same
    assert "Mine" in (out / "index.html").read_text()
    found, _ = command(whole, "--metrics", "fid768,kid768")
    assert found == [["evaluate", str(whole), *place, "--metrics", "fid768,kid768"]]
    assert command(whole, "--metrics", "fid768")[0] == []
    assert command(bare, "--as-is")[0] == []


def test_kept_checkpoints_are_measured_for_curves(tmp_path, monkeypatch):
    """evaluate is given a folder in which it finds config and checkpoints, and may write."""
    run = make_run(tmp_path / "a")
    before = (run / "32x32" / "evaluation.json").read_text()
    for nimg in (10_000, 5_000):
        write(run / "32x32" / "checkpoints" / f"{nimg:09d}" / "state.json", {})
    calls = []

    class Done:
        returncode = 0

    def call(command, **_):
        place, words = Path(command[4]), command[5:]
        nimg = int(words[words.index("--nimg") + 1])
        assert (place / "config.yaml").read_text() == (run / "config.yaml").read_text()
        assert (place / "32x32" / "checkpoints" / f"{nimg:09d}" / "state.json").is_file()
        calls.append(nimg)
        one = metric_value(nimg / 1000, command=f"dinogen evaluate {place} --nimg {nimg}")
        found = {"measured": {"fid768": one}, "fingerprints": {"aaaaaaaaaaaa": ALIKE}}
        write(place / "32x32" / "evaluation.json", found)
        return Done

    monkeypatch.setattr("launch.compare.subprocess.run", call)
    out = tmp_path / "out"
    words = ["evaluate", str(run), "--metrics", "fid768", "--all-checkpoints"]
    earlier = ["compare", str(run), "--out", str(out), "--metrics", "fid768", "--over-training"]
    # what is measured is not measured again
    for given, wanted in ((words, [5_000, 10_000, 20_016]), (words, []), (earlier, [])):
        calls.clear()
        done = CliRunner().invoke(app, given)
        assert done.exit_code == 0, done.output
        assert calls == wanted
    assert "--over-training" not in CliRunner().invoke(app, ["compare", "--help"]).output
    (run / "32x32" / "checkpoints.jsonl").rename(tmp_path / "kept")
    calls.clear()
    assert CliRunner().invoke(app, earlier).exit_code == 0 and len(calls) == 3
    for wrong in (["--nimg", "5000"], ["--out", str(out)]):
        assert isinstance(CliRunner().invoke(app, [*words, *wrong]).exception, UserError)
    assert "name what is measured" in str(
        CliRunner().invoke(app, ["evaluate", str(run), "--all-checkpoints"]).exception
    )
    assert (run / "32x32" / "evaluation.json").read_text() == before
    data = json.loads((out / "comparison.json").read_text())
    points = data["runs"][0]["curves"]["measured"]
    assert [line["nimg"] for line in points] == [5_000, 10_000, 20_016]
    assert [line["metrics"]["fid768"]["value"] for line in points] == [5.0, 10.0, 20.016]
    assert points[0]["metrics"]["fid768"]["command"] == f"dinogen evaluate {run} --nimg 5000"
    assert "FID-768 over training" in (out / "index.html").read_text()


def test_a_folder_of_configs_stands_for_their_runs(tmp_path):
    run = make_run(tmp_path / "runs" / "a")
    config = tmp_path / "configs" / "a.yaml"
    config.parent.mkdir()
    config.write_text((run / "config.yaml").read_text())
    (tmp_path / "configs" / "b.yaml").write_text(f"run: {tmp_path / 'runs' / 'b'}\n")
    out = tmp_path / "out"
    words = ["compare", str(tmp_path / "configs"), "--as-is", "--out", str(out)]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    data = json.loads((out / "comparison.json").read_text())
    assert [run["status"] for run in data["runs"]] == ["finished", "missing"]
