"""Comparisons: hand-made runs whose numbers are found again, and what must be said loudly."""

import base64
import json
import re
import statistics
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from dinogen.config import ConfigError, parse_config
from dinogen.errors import UserError
from dinogen.report.compare import write_comparison
from dinogen.report.compare_read import find_runs
from launch.cli import app

from .compare_runs import ALIKE, VERSIONS, figure, make_run, write


class Page(HTMLParser):
    """What a browser would load and show, and the cells of the table of figures."""

    def __init__(self, text):
        super().__init__()
        self.raw = text
        self.sources, self.tags, self.words, self.open, self.ids = [], [], [], [], []
        self.rows = []
        self.feed(text)
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        given = dict(attrs)
        if tag not in ("meta", "img", "br", "wbr"):
            self.open.append(tag)
        self.sources += [given[key] for key in ("src", "srcset", "data", "poster") if key in given]
        self.sources += [given["href"]] if tag in ("link", "image") else []
        if "id" in given:
            self.ids.append(given["id"])
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append([given.get("class", "").split(), ""])

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in ("meta", "img", "br", "wbr"):
            self.handle_endtag(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] == ["style"]:
            return
        self.words.append(data)
        if {"td", "th"} & set(self.open) and "svg" not in self.open:
            self.rows[-1][-1][1] += data

    def figures(self):
        """{run: {heading: (value and spread, marks)}} of the first table."""
        heads = [text for _, text in self.rows[1]]
        table = {}
        for row in self.rows[2:]:
            if len(row) != len(heads):
                break
            name = row[0][1]
            table[name] = {h: (text, marks) for h, (marks, text) in zip(heads, row, strict=True)}
        return table


def compare(out, *runs, title="Five runs"):
    page = write_comparison(runs, out, title)
    data = json.loads((out / "comparison.json").read_text())
    return Page(page.read_text()), data, (out / "comparison.md").read_text()


def cell(page, run, heading):
    """The cell of a run under a heading, by the beginnings of both."""
    (row,) = [cells for name, cells in page.figures().items() if name.startswith(run)]
    (found,) = [value for head, value in row.items() if head.startswith(heading)]
    return found


def test_every_number_stands_in_page_json_and_markdown(tmp_path):
    run = make_run(tmp_path / "a", 1.2345678901)
    page, data, text = compare(tmp_path / "out", run, make_run(tmp_path / "b", 2.5))
    numbers = data["runs"][0]["numbers"]
    wanted = {
        "fid768": 1.2345678901,
        "num_parameters": 370_624,
        "nimg": 20016,
        "seconds": 3725.0,
        "gpu_hours": 2 * 3725 / 3600,
        "peak_memory_mb": 812.5,
        "training_images_per_s": 31.5,
        "sampling_images_per_s": 1234.5,
        "held_out/mse": 0.0625,
    }
    assert {name: numbers[name]["value"] for name in wanted} == pytest.approx(wanted, rel=1e-12)
    for name in wanted:
        digits = f"{numbers[name]['value']:.12g}"[:10]
        assert digits in page.text, name
        assert digits in text, name
    shown = {"FID-768": "1.23", "parameters": "0.37", "images seen": "20.0", "GPU hours": "2.07"}
    shown |= {"training, h:m:s": "1:02:05", "peak memory": "812", "sampling": "1,234"}
    for heading, value in shown.items():
        assert cell(page, "a", heading)[0].startswith(value), heading
    assert "± 0.02" in cell(page, "a", "FID-768")[0]
    assert "n 500 / 158" in page.text and "(n 500 / 158)" in text


def test_every_number_says_where_it_comes_from(tmp_path):
    run = make_run(tmp_path / "a")
    page, data, text = compare(tmp_path / "out", run)
    one = data["runs"][0]["numbers"]["fid768"]
    assert one["command"] == f"dinogen evaluate {run} --metrics fid768"
    assert one["file"] == "32x32/evaluation.json"
    assert (one["fingerprint"], one["nimg"], one["versions"]) == ("aaaaaaaaaaaa", 20016, VERSIONS)
    assert one["data_sha256"] == "f" * 64
    assert data["fingerprints"]["aaaaaaaaaaaa"] == ALIKE
    earlier = f"dinogen evaluate {run} --metrics kid768 metrics.num_samples=9"
    kept = {"fid768": figure(1.25), "kid768": figure(0.5, command=earlier)}
    _, more, _ = compare(tmp_path / "out2", make_run(tmp_path / "b", measured=kept))
    commands = {name: more["runs"][0]["numbers"][name]["command"] for name in kept}
    assert commands["kid768"] == earlier and commands["fid768"].endswith("--metrics fid768")
    config = (run / "config.yaml").read_text()
    assert config.strip() in page.raw.replace("&#39;", "'")
    for said in (one["command"], one["config_sha256"], "f" * 64, "torch 2.13.0", "aaaaaaaaaaaa"):
        assert said in page.text and said in text, said
    targets = set(re.findall(r'href="#([^"]*)"', page.raw)) - {"figures"}
    assert {"n-0-fid768", "n-0-seconds", "f-aaaaaaaaaaaa"} <= targets
    assert targets <= set(page.ids)
    assert len(set(page.ids)) == len(page.ids)


@pytest.mark.parametrize(("better", "order"), [("lower", "abc"), ("higher", "cba")])
def test_the_best_is_marked_and_comes_first(tmp_path, better, order):
    for name, value in (("b", 2.0), ("c", 9.0), ("a", 1.99)):
        one = figure(value, 0.01, better)
        make_run(tmp_path / name, measured={"fid768": one})
    page, data, text = compare(tmp_path / "out", *(tmp_path / name for name in "bca"))
    assert "".join(run["name"] for run in data["runs"]) == order
    marks = {name: cell(page, name, "FID-768")[1] for name in "abc"}
    best = order[0]
    assert [name for name in "abc" if "best" in marks[name]] == [best]
    # 0.01 apart at spreads of 0.01 each is no difference; 7 is
    assert [name for name in "abc" if "near" in marks[name]] == (["b"] if best == "a" else [])
    assert f"**{'1.99' if best == 'a' else '9.00'} ± 0.01**" in text


def test_different_fingerprints_are_said_loudly_and_none_is_best(tmp_path):
    make_run(tmp_path / "a", 1.0)
    small = {"bbbbbbbbbbbb": ALIKE | {"resolution": 16}}
    make_run(
        tmp_path / "b",
        measured={"fid768": figure(0.5, fingerprint="bbbbbbbbbbbb")},
        fingerprints=small,
        family="guided",
    )
    page, data, text = compare(tmp_path / "out", tmp_path / "a", tmp_path / "b")
    (warning,) = data["warnings"]
    assert warning.startswith("FID-768: measured in different ways, so none is marked as best.")
    assert "resolution: 32 (a); 16 (b)." in warning and "split" not in warning
    assert warning in page.text and warning in text
    assert all("best" not in cell(page, name, "FID-768")[1] for name in "ab")
    assert "aaaaaa" in cell(page, "a", "FID-768")[0] and "bbbbbb" in cell(page, "b", "FID-768")[0]
    (column,) = [one for one in data["columns"] if one["name"] == "fid768"]
    assert column["comparable"] is False and column["best"] == []
    # nothing is sorted by what does not compare
    assert [run["name"] for run in data["runs"]] == ["a", "b"]


def test_different_counts_are_said_even_without_a_fingerprint(tmp_path):
    for name, num in (("a", 100), ("b", 50)):
        one = figure(0.3, 0.1, "higher", num_samples=num, num_reference=None, fingerprint=None)
        make_run(tmp_path / name, measured={"lpips_diversity": one})
    page, data, _ = compare(tmp_path / "out", tmp_path / "a", tmp_path / "b")
    assert "num_samples: 100 (a); 50 (b)." in data["warnings"][0]
    assert "n 50" in cell(page, "b", "LPIPS diversity")[0]


def test_speeds_of_different_devices_do_not_compare(tmp_path):
    make_run(tmp_path / "a")
    make_run(tmp_path / "b", device="cpu", sampling={"images_per_s": 7.0, "num": 9})
    page, data, _ = compare(tmp_path / "out", tmp_path / "a", tmp_path / "b")
    assert any("sampling" in one and "cpu (b)" in one for one in data["warnings"])
    assert "best" not in cell(page, "a", "sampling")[1]


def test_random_judges_and_guides_are_said_loudly(tmp_path):
    run = make_run(tmp_path / "a", fingerprints={"aaaaaaaaaaaa": ALIKE | {"random": True}})
    result = run / "32x32" / "result.json"
    write(result, json.loads(result.read_text()) | {"random_guide": True})
    _, data, _ = compare(tmp_path / "out", run)
    assert [one.split(":")[0] for one in data["warnings"]] == ["RANDOM JUDGE", "RANDOM GUIDE"]


def test_what_is_not_available_is_listed_with_its_reason(tmp_path):
    reason = "no weights: set metrics.inception to their file"
    gone = {"fid": figure(None, reason=reason), "is": figure(None, reason=reason)}
    page, data, text = compare(tmp_path / "out", make_run(tmp_path / "a", measured=gone))
    (one,) = data["not_available"]
    assert one == {"metrics": "FID, IS", "reason": reason, "runs": ["a"]}
    assert reason in page.text and reason in text
    assert "FID" not in "".join(page.figures()["a" + "dcgan, 32×32"])


def test_failed_runs_are_listed_with_what_is_known(tmp_path):
    good = make_run(tmp_path / "good")
    stopped = make_run(tmp_path / "stopped")
    (stopped / "32x32" / "result.json").unlink()
    with (stopped / "32x32" / "stats.jsonl").open("w") as file:
        file.write('{"nimg": 1000, "loss": 2.0}\n{"nimg": 2000, "loss": null}\n')
    collapsed = make_run(tmp_path / "collapsed")
    result = collapsed / "32x32" / "result.json"
    change = {"verdict": "COLLAPSED", "warnings": ["COLLAPSED: samples differ 3 %"]}
    write(result, json.loads(result.read_text()) | change)
    broken = make_run(tmp_path / "broken")
    (broken / "32x32" / "evaluation.json").write_text("{")
    (broken / "32x32" / "stats.jsonl").write_text("cut off by a ki")
    stale = make_run(tmp_path / "stale", nimg=10_000)
    unknown = make_run(tmp_path / "unknown")
    (unknown / "32x32" / "evaluation.json").unlink()
    runs = (good, stopped, collapsed, broken, stale, unknown, tmp_path / "never")
    page, data, text = compare(tmp_path / "out", *runs)
    failures = data["failures"]
    assert set(failures) == {"stopped", "collapsed", "broken", "stale", "unknown", "never"}
    assert failures["unknown"]["what"] == [f"never measured: dinogen evaluate {unknown}"]
    assert "stage 32x32: 2 of 20 thousand images" in failures["stopped"]["what"][0]
    assert "last 1 log lines hold no finite loss" in failures["stopped"]["what"][1]
    assert failures["stopped"]["status"] == "unfinished"
    assert failures["collapsed"]["what"] == ["COLLAPSED: samples differ 3 %"]
    assert "holds no line of statistics" in failures["broken"]["what"][0]
    assert "evaluation.json cannot be read" in failures["broken"]["what"][1]
    assert "measured at 10,000 images, but trained to 20,016" in failures["stale"]["what"][0]
    assert failures["never"]["what"] == ["never begun: there is no such folder"]
    for one in failures.values():
        for what in one["what"]:
            assert what in page.text and what.replace("<", "&lt;") in text


def test_a_run_of_a_study_says_what_its_last_attempt_ended_with(tmp_path):
    study = tmp_path / "study"
    good = make_run(study / "gan" / "dcgan-seed0")
    tried = [{"step": "train", "what": "exit code 1: lr must be above 0", "log": "logs/bad.log"}]
    write(study / "study.json", {"runs": {"gan/bad-seed0": tried, "gan/dcgan-seed0": []}})
    copy = study / "configs" / "gan" / "bad-seed0.yaml"
    copy.parent.mkdir(parents=True)
    copy.write_text("family: {name: wgan_gp}\nnotes: {change: two critic updates}\n")
    runs = find_runs([study])
    assert runs == [study / "gan" / "bad-seed0", good]
    _, data, _ = compare(tmp_path / "out", *runs)
    what = data["failures"]["bad-seed0"]["what"]
    assert what[0] == "train: exit code 1: lr must be above 0 (log: logs/bad.log)"
    assert [chapter["family"] for chapter in data["story"]] == ["wgan_gp", "dcgan"]


def test_folders_that_hold_no_run_are_refused(tmp_path):
    with pytest.raises(UserError, match="no run here or below"):
        find_runs([tmp_path])
    with pytest.raises(UserError, match="no such folder"):
        find_runs([tmp_path / "nowhere"])
    with pytest.raises(UserError, match="no run to compare"):
        write_comparison([], tmp_path / "out", "none")


def test_the_page_needs_nothing_but_itself(tmp_path):
    runs = [make_run(tmp_path / name, seed=n) for n, name in enumerate("abc")]
    page, _, _ = compare(tmp_path / "out", *runs)
    assert not re.search(r"https?://|//[a-z]+\.", page.raw)
    assert not {"script", "link", "iframe", "object", "embed"} & set(page.tags)
    assert "@import" not in page.raw and not re.search(r"url\((?!#)", page.raw)
    assert all(source.startswith("data:image/png;base64,") for source in page.sources)
    inside = [base64.b64decode(source.partition(",")[2]) for source in page.sources]
    for run in runs:
        for file in ("looks/grid16.png", "looks/i.png"):
            assert inside.count((run / "32x32" / file).read_bytes()) == 1
    # one picture of real ones is enough
    assert sum((run / "32x32" / "real_32x32.png").read_bytes() in inside for run in runs) == 1
    assert "it does not truncate" in page.text
    assert page.open == []


def test_without_looks_the_last_grid_of_training_is_shown(tmp_path):
    run = make_run(tmp_path / "a")
    (run / "32x32" / "looks" / "looks.json").unlink()
    page, _, _ = compare(tmp_path / "out", run)
    final = base64.b64encode((run / "32x32" / "final_32x32.png").read_bytes()).decode()
    assert final in page.raw


def test_text_cannot_become_markup(tmp_path):
    evil = "<script>alert(1)</script> | ${x}$"
    run = make_run(tmp_path / "a", notes={"step": "1", "change": evil, "failed": evil})
    page, data, text = compare(tmp_path / "out", run, title=evil)
    assert "script" not in page.tags
    assert page.text.count(evil) >= 4
    assert "<script" not in text and "\\|" in text
    assert data["story"][0]["rows"][0]["change"] == evil


def test_the_story_is_told_in_the_order_of_its_steps(tmp_path):
    values = {"10": 3.0, "2": 1.0, "1": 2.0}
    for step, value in values.items():
        notes = {"step": step, "change": f"change {step}", "next": f"after {step}"}
        make_run(tmp_path / f"run{step}", value, notes=notes | {"failed": f"flaw {step}"})
    make_run(tmp_path / "other", 0.5, family="vae")
    page, data, text = compare(tmp_path / "out", *sorted(tmp_path.iterdir()))
    chapters = {one["family"]: one["rows"] for one in data["story"]}
    assert [row["step"] for row in chapters["dcgan"]] == ["1", "2", "10"]
    assert [row["metric"] for row in chapters["dcgan"]] == [
        "2.00 ± 0.02",
        "1.00 ± 0.02",
        "3.00 ± 0.02",
    ]
    assert [row["best"] for row in chapters["dcgan"]] == [False, True, False]
    for step in values:
        for said in (f"change {step}", f"flaw {step}", f"after {step}"):
            assert said in page.text and said in text


def test_runs_under_several_seeds_are_taken_together(tmp_path):
    values = [1.0, 1.5, 2.75]
    for seed, value in enumerate(values):
        make_run(tmp_path / f"dcgan-seed{seed}", value, seed=seed)
    make_run(tmp_path / "vae", 9.0, family="vae")
    page, data, text = compare(tmp_path / "out", *sorted(tmp_path.iterdir()))
    (one,) = data["seeds"]
    assert one["name"] == "dcgan" and len(one["runs"]) == 3
    wanted = [statistics.mean(values), statistics.stdev(values)]
    assert one["values"]["fid768"] == pytest.approx(wanted)
    assert "1.75 ± 0.90" in text and "Over seeds" in page.text


def test_curves_are_where_their_numbers_are(tmp_path):
    """Points of the SVG are an affine picture of (kimg, value)."""
    curves = {"a": [4.0, 3.0, 1.5, 1.0], "b": [5.0, 2.5, 2.0, 3.5]}
    for name, values in curves.items():
        run = make_run(tmp_path / name, values[-1])
        lines = [
            {"nimg": 5000 * (n + 1), "stage": 32, "metrics": {"fid768": figure(value)}}
            for n, value in enumerate(values)
        ]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (run / "32x32" / "metrics.jsonl").write_text(text)
    page, _, _ = compare(tmp_path / "out", tmp_path / "a", tmp_path / "b")
    assert "FID-768 over training" in page.text
    wide = page.raw[page.raw.index('class="wide"') : page.raw.index('class="narrow"')]
    for number, values in enumerate(curves.values()):
        paths = re.findall(rf'<path d="([^"]*)"[^>]*stroke: var\(--s{number}\)[^>]*>', wide)
        (points,) = [
            np.array([float(x) for x in re.findall(r"-?[\d.]+", path)]).reshape(-1, 2)
            for path in paths
            if path.count("L") == 3
        ]
        for drawn, wanted in ((points[:, 0], [5, 10, 15, 20]), (-points[:, 1], values)):
            slope, offset = np.polyfit(wanted, drawn, 1)
            assert slope > 0
            assert np.allclose(drawn, slope * np.array(wanted) + offset, atol=0.01)


def test_figures_of_training_stand_in_where_nothing_else_was_measured(tmp_path):
    run = make_run(tmp_path / "a", measured={})
    line = {"nimg": 20016, "metrics": {"fid768": figure(3.5)}}
    (run / "32x32" / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    _, data, _ = compare(tmp_path / "out", run)
    one = data["runs"][0]["numbers"]["fid768"]
    assert (one["value"], one["file"]) == (3.5, "32x32/metrics.jsonl")


def test_costs_of_stages_add_up(tmp_path):
    run = make_run(tmp_path / "a")
    first = json.loads((run / "32x32" / "result.json").read_text())
    more = {"seconds": 75.0, "world_size": 1, "peak_memory_mb": 2000.0, "num_parameters": 1}
    write(run / "16x16" / "result.json", first | more)
    _, data, _ = compare(tmp_path / "out", run)
    numbers = {name: one["value"] for name, one in data["runs"][0]["numbers"].items()}
    assert numbers["seconds"] == 3800
    assert numbers["gpu_hours"] == pytest.approx((2 * 3725 + 75) / 3600)
    assert numbers["peak_memory_mb"] == 2000
    assert numbers["num_parameters"] == 370_624


def test_notes_of_a_config():
    config = parse_config({"notes": {"step": 2, "change": "wider"}})
    assert (config.notes.step, config.notes.change, config.notes.next) == ("2", "wider", None)
    with pytest.raises(ConfigError, match=r"notes\.stop"):
        parse_config({"notes": {"stop": "x"}})


def test_the_command_makes_what_is_missing(tmp_path, monkeypatch):
    whole = make_run(tmp_path / "runs" / "whole")
    bare = make_run(tmp_path / "runs" / "bare")
    (bare / "32x32" / "evaluation.json").unlink()
    (bare / "32x32" / "looks" / "looks.json").unlink()
    calls = []

    class Done:
        returncode = 1

    def call(command, **_):
        calls.append(command[3:])
        return Done

    monkeypatch.setattr("launch.missing.subprocess.run", call)
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
        one = figure(nimg / 1000, command=f"dinogen evaluate {place} --nimg {nimg}")
        found = {"measured": {"fid768": one}, "fingerprints": {"aaaaaaaaaaaa": ALIKE}}
        write(place / "32x32" / "evaluation.json", found)
        return Done

    monkeypatch.setattr("launch.over_training.subprocess.run", call)
    out = tmp_path / "out"
    words = ["compare", str(run), "--out", str(out), "--metrics", "fid768", "--over-training"]
    for wanted in ([5_000, 10_000, 20_016], []):  # what is measured is not measured again
        calls.clear()
        done = CliRunner().invoke(app, words)
        assert done.exit_code == 0, done.output
        assert calls == wanted
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
