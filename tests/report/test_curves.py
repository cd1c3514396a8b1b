"""Loss curves: what stands in stats.jsonl is what is drawn, and nothing else."""

import json
import logging

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from PIL import Image

from dinogen.errors import UserError
from dinogen.report import curves
from dinogen.report.curves import ORANGE, RED, _running_mean, plot_loss_curve
from dinogen.runs.files import read_stats, series


def write(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def pixels(path, colour):
    """Mask of the image's pixels of exactly that colour."""
    with Image.open(path) as image:
        rgb = np.asarray(image.convert("RGB")).astype(int)
    return (np.abs(rgb - np.round(255 * np.array(to_rgb(colour)))) <= 1).all(axis=2)


def curve(**extra):
    return [{"nimg": 100 * n, "loss": 5.0 - n / 10, **extra} for n in range(1, 31)]


def test_the_floor_is_drawn_below_a_curve_that_stays_above_it(tmp_path):
    stats = write(tmp_path / "stats.jsonl", curve(floor=1.0))
    image = plot_loss_curve(stats, tmp_path / "curve.png", title="4x4")
    rows = np.nonzero(pixels(image, RED).sum(axis=1) > 200)[0]
    with_floor = np.asarray(Image.open(image))
    assert rows.size and rows.min() > with_floor.shape[0] * 0.6


def test_without_floor_or_diversity_neither_is_drawn(tmp_path):
    stats = write(tmp_path / "stats.jsonl", curve(floor=None))
    image = plot_loss_curve(stats, tmp_path / "curve.png", title="4x4")
    assert not pixels(image, RED).any()
    assert not pixels(image, ORANGE).any()


def test_diversity_gets_a_panel_of_its_own(tmp_path):
    plain = plot_loss_curve(write(tmp_path / "a", curve()), tmp_path / "a.png", title="4x4")
    lines = curve()
    lines[5]["diversity"], lines[25]["diversity"] = 0.9, 0.3
    more = plot_loss_curve(write(tmp_path / "b", lines), tmp_path / "b.png", title="4x4")
    assert pixels(more, ORANGE).sum() > 50
    assert Image.open(more).height > Image.open(plain).height


@pytest.mark.parametrize("num", [4, 60])
def test_the_legend_lies_above_the_curves(tmp_path, monkeypatch, num):
    drawn = []

    class Kept(curves.Figure):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            drawn.append(self)

    monkeypatch.setattr(curves, "Figure", Kept)
    lines = [
        {"nimg": 100 * n, "loss": 5.0 + (-1) ** n, "floor": 1.0, "alpha": min(1, n / 2)}
        for n in range(1, num)
    ]
    lines[1] |= {"loss": None, "diversity": 0.9}
    plot_loss_curve(write(tmp_path / "s", lines), tmp_path / "c.png", title="a title")
    (figure,) = drawn
    inside, *_ = figure.axes
    legend = inside.get_legend().get_window_extent()
    assert legend.y0 >= inside.get_window_extent().y1 - 1
    assert legend.y1 <= figure._suptitle.get_window_extent().y0 + 1
    assert legend.x0 >= 0 and len(inside.get_legend().get_texts()) >= 3


def test_updates_that_were_not_finite_are_marked(tmp_path):
    lines = curve()
    lines[10]["loss"] = None
    lines[11]["loss"] = float("nan")
    image = plot_loss_curve(write(tmp_path / "s", lines), tmp_path / "c.png", title="4x4")
    assert pixels(image, RED).any()


def test_a_resumed_run_replaces_what_it_repeats(tmp_path):
    old = [{"nimg": n, "loss": 1.0} for n in (10, 20, 30, 40)]
    new = [{"nimg": n, "loss": 2.0} for n in (25, 35)]
    lines = read_stats(write(tmp_path / "stats.jsonl", old + new))
    assert [(line["nimg"], line["loss"]) for line in lines] == [
        (10, 1.0),
        (20, 1.0),
        (25, 2.0),
        (35, 2.0),
    ]


def test_a_line_cut_off_by_a_kill_is_left_out_and_named(tmp_path, caplog):
    path = write(tmp_path / "stats.jsonl", [{"nimg": 10, "loss": 1.0}])
    path.write_text(path.read_text() + '{"nimg": 20, "lo')
    with caplog.at_level(logging.WARNING):
        assert [line["nimg"] for line in read_stats(path)] == [10]
    assert "stats.jsonl: line 2 is left out" in caplog.text


@pytest.mark.parametrize("text", [None, "", "not json\n"])
def test_missing_or_empty_statistics_are_named(tmp_path, text):
    path = tmp_path / "stats.jsonl"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError, match=r"stats\.jsonl"):
        plot_loss_curve(path, tmp_path / "curve.png", title="4x4")
    assert not (tmp_path / "curve.png").exists()


def test_series_leaves_out_what_is_no_finite_number():
    lines = [{"nimg": 1000 * n, "loss": v} for n, v in enumerate([1, None, float("inf"), 2.5])]
    assert series(lines, "loss") == ([0.0, 3.0], [1.0, 2.5])


def test_running_mean_of_a_line_is_the_line():
    values = [float(n) for n in range(100)]
    mean = _running_mean(values)
    assert mean[2:-2] == pytest.approx(values[2:-2])
    assert _running_mean([3.0] * 50) == pytest.approx([3.0] * 50)
