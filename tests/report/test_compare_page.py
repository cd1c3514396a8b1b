"""The page of a comparison: one file, notes as text, curves where the numbers are."""

import base64
import json
import re

import numpy as np
import pytest

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
        for file in ("visualizations/grid16.png", "visualizations/i.png"):
            assert inside.count((run / "32x32" / file).read_bytes()) == 1
    # one image of real ones is enough
    assert sum((run / "32x32" / "real_32x32.png").read_bytes() in inside for run in runs) == 1
    assert "it does not truncate" in page.text
    assert page.open == []


def test_without_visualizations_the_last_grid_of_training_is_shown(tmp_path):
    run = make_run(tmp_path / "a")
    (run / "32x32" / "visualizations" / "visualizations.json").unlink()
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
    assert data["runs"][0]["notes"]["change"] == evil


def test_the_notes_of_a_config_are_shown(tmp_path):
    notes = {"step": "2", "change": "cosine schedule", "failed": "one face", "next": "predict v"}
    page, data, text = compare(tmp_path / "out", make_run(tmp_path / "a", notes=notes))
    assert data["runs"][0]["notes"] == notes
    for said in ("cosine schedule", "one face", "predict v"):
        assert said in page.text and said in text


def test_curves_are_where_their_numbers_are(tmp_path):
    """Points of the SVG are an affine image of (kimg, value)."""
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


@pytest.mark.parametrize(("num", "folded"), [(12, False), (13, True)])
def test_of_many_runs_only_the_samples_are_unfolded(tmp_path, num, folded):
    runs = [make_run(tmp_path / f"run{n}") for n in range(num)]
    page, _, _ = compare(tmp_path / "out", *runs)
    parts = {
        key: page.raw[page.raw.index(f'id="{key}"') :] for key in ("samples", "interpolations")
    }
    assert 'class="fold"' not in parts["samples"][: -len(parts["interpolations"])]
    assert (f"Show all {num} runs" in parts["interpolations"]) is folded
    assert page.raw.count('alt="A straight line."') == num
