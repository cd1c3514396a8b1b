"""The page of a comparison: whole in itself, the story in its order, curves where numbers are."""

import base64
import json
import re

import numpy as np

from .compare_runs import make_run, metric_value
from .compared_page import compare


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


def test_curves_are_where_their_numbers_are(tmp_path):
    """Points of the SVG are an affine picture of (kimg, value)."""
    curves = {"a": [4.0, 3.0, 1.5, 1.0], "b": [5.0, 2.5, 2.0, 3.5]}
    for name, values in curves.items():
        run = make_run(tmp_path / name, values[-1])
        lines = [
            {"nimg": 5000 * (n + 1), "stage": 32, "metrics": {"fid768": metric_value(value)}}
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
