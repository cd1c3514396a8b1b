"""Plots of studies: a line with a band for each experiment, tracks apart, axes, names, colours."""

import re

import numpy as np
import pytest

from dinogen.report.compare.comparison import Comparison
from dinogen.report.compare.plots import Series, colours, curves_svg, folders_of, metric_plots
from dinogen.report.compare.read import read_runs

from .compared_page import compare
from .test_compare_time import points_of, timed_run


def study(folder):
    """Two tracks of two experiments with two seeds each, as a study leaves them."""
    runs = []
    for track, scale in (("images", 2.0), ("minutes", 1.0)):
        for name, family in (("gan", "dcgan"), ("flow", "flow")):
            for seed in (0, 1):
                values = [scale * (9 - n - seed * n) for n in range(4)]
                each = {"gan": 1000, "flow": 2000}[name] * (1 if track == "images" else 30)
                runs.append(
                    timed_run(
                        folder / track / f"{name}-seed{seed}",
                        values,
                        0.01 * (1 + seed),
                        every=each,
                        seed=seed,
                        family=family,
                        notes={"track": track},
                    )
                )
    return runs


def plots_of(folders):
    comparison = Comparison(read_runs(folders), "t")
    numbers = colours(comparison.all_runs, comparison.seeds)
    return metric_plots(comparison.begun, comparison.seeds, numbers), numbers


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    return plots_of(study(tmp_path_factory.mktemp("study")))


def test_each_track_has_a_plot_with_a_line_for_each_experiment(drawn):
    plots, _ = drawn
    titles = [plot.title for plot in plots]
    assert titles == [f"{track}: FID-768 over training" for track in ("images", "minutes")]
    for plot in plots:
        assert sorted(curve.name for curve in plot.curves) == ["flow", "gan"]
        assert plot.notes == ["mean of 2 seeds", "few images"]
        assert [notes for _, notes in plot.legend] == [[], []]


def test_a_line_is_the_mean_of_its_seeds_and_the_band_reaches_from_lowest_to_highest(drawn):
    (plot,) = [plot for plot in drawn[0] if plot.title.startswith("images")]
    (curve,) = [curve for curve in plot.curves if curve.name == "gan"]
    assert curve.kimg == [1, 2, 3, 4]
    assert curve.values == [18, 15, 12, 9]
    assert curve.high == [18, 16, 14, 12] and curve.low == [18, 14, 10, 6]
    # 10 ms an image for one seed, and 20 for the other
    assert curve.minutes == pytest.approx([n * 15 / 60 for n in (1, 2, 3, 4)])


def test_an_experiment_has_one_colour_in_all_tracks_and_for_all_seeds(drawn):
    _, numbers = drawn
    by_name = {}
    for name, number in numbers.items():
        by_name.setdefault(re.search("gan|flow", name)[0], set()).add(number)
    assert sorted(by_name["gan"] | by_name["flow"]) == [0, 1]
    assert len(by_name["gan"]) == len(by_name["flow"]) == 1


def test_a_folder_with_a_single_experiment_is_compared_with_the_others(tmp_path):
    """Only tracks have plots of their own: runs may lie anywhere."""
    here = [timed_run(tmp_path / "a" / name, [3.0, 2.0], 0.01, family=name) for name in "xy"]
    there = timed_run(tmp_path / "b" / "x", [4.0, 1.0], 0.01, family="z")
    comparison = Comparison(read_runs([*here, there]), "t")
    assert folders_of(comparison.runs, comparison.seeds) == []
    (plot,), numbers = plots_of([*here, there])
    assert len(plot.curves) == 3 and sorted(numbers.values()) == [0, 1, 2]
    assert plot.title == "FID-768 over training"


def test_seeds_that_were_measured_at_other_points_meet_between_them(tmp_path):
    """Between two measurements a curve is a straight line; outside of one there is no mean."""
    one = timed_run(tmp_path / "a-seed0", [8.0, 6.0, 4.0], 0.01, every=1000)
    other = timed_run(tmp_path / "a-seed1", [9.0, 3.0], 0.01, every=1500, seed=1)
    ((plot,), _) = plots_of([one, other])
    (curve,) = plot.curves
    assert curve.kimg == [1.5, 2, 3]
    assert curve.values == pytest.approx([(7 + 9) / 2, (6 + 7) / 2, (4 + 3) / 2])


def test_seeds_without_a_common_part_are_two_lines(tmp_path):
    one = timed_run(tmp_path / "a-seed0", [8.0, 6.0], 0.01, every=1000)
    other = timed_run(tmp_path / "a-seed1", [3.0], 0.01, every=9000, seed=1)
    ((plot,), _) = plots_of([one, other])
    assert {(curve.name, curve.num_seeds) for curve in plot.curves} == {
        ("a-seed0", 1),
        ("a-seed1", 1),
    }


@pytest.mark.parametrize("end", [20, 400])
def test_an_axis_is_logarithmic_where_lines_end_far_apart(end):
    """Where one line is shown ten times the images of another, both can be read."""
    x = [np.array([5.0, 10, 15, 20]), np.linspace(end / 4, end, 4)]
    lines = [Series(n, list(one), [4.0, 3.0, 2.0, 1.5]) for n, one in enumerate(x)]
    svg = curves_svg(lines, "FID")
    drawn = np.concatenate([points_of(svg, number)[:, 0] for number in (0, 1)])
    expected = np.concatenate(x)
    expected = np.log(expected) if end == 400 else expected
    slope, offset = np.polyfit(expected, drawn, 1)
    assert slope > 0 and np.allclose(drawn, slope * expected + offset, atol=0.02)


def test_names_stand_in_the_order_of_the_ends_and_do_not_overlap():
    ends = [1.0, 1.01, 1.02, 3.0, 1.03, 1.005]
    lines = [Series(n, [1.0, 2.0], [3.0, end], name=f"run{n}") for n, end in enumerate(ends)]
    svg = curves_svg(lines, "FID", names=True)
    found = re.findall(r'y="([\d.]+)"[^>]*>(run\d)<', svg) or [
        (y, name) for y, name in re.findall(r"translate\([\d.]+ ([\d.]+)\)[^>]*>(run\d)<", svg)
    ]
    heights = {name: float(y) for y, name in found}
    assert len(heights) == len(ends)
    order = sorted(heights, key=heights.__getitem__)  # from the top
    assert order == [f"run{n}" for n in np.argsort(ends)[::-1]]
    gaps = np.diff([heights[name] for name in order])
    assert gaps.min() > 9.5  # points: the height of their font
    assert "run0" not in curves_svg(lines, "FID")


def test_the_page_says_what_bands_are(tmp_path):
    page, _, _ = compare(tmp_path / "out", *study(tmp_path / "study"))
    assert "Bands reach from the lowest seed to the highest." in page.text
    assert len(page.ids) == len(set(page.ids))
    one = timed_run(tmp_path / "a", [2.0, 1.0], 0.01)
    page, _, _ = compare(tmp_path / "other", one)
    assert "Bands" not in page.text


def test_tables_after_equal_training_are_sorted_and_mark_the_best(tmp_path):
    timed_run(tmp_path / "a", [8.0, 4.0], 0.01, family="vae")
    timed_run(tmp_path / "b", [6.0, 2.0], 0.01, family="flow")
    timed_run(tmp_path / "c", [7.0, 3.0], 0.01, family="ddpm")
    page, data, text = compare(tmp_path / "out", *sorted(tmp_path.iterdir()))
    for one in data["equal"]:
        assert [name for name, _, _ in one["rows"]] == ["b", "c", "a"]
        assert one["best"] == {"fid768": ["b"]}
    assert text.count("**2**") == 2
    equal = page.raw[page.raw.index('id="equal"') : page.raw.index('id="curves"')]
    assert re.findall(r'class="best"><b>([^<]*)</b>', equal) == ["2", "2"]


def test_an_experiment_that_stands_alone_is_no_comparison(tmp_path):
    """In the time that the fastest takes for all, the others were not measured once."""
    for seed in (0, 1):
        timed_run(tmp_path / f"fast-seed{seed}", [2.0, 1.0], 0.001, seed=seed)
    timed_run(tmp_path / "slow", [2.0, 1.0], 1.0, family="vae")
    _, data, text = compare(tmp_path / "out", *sorted(tmp_path.iterdir()))
    assert [one["unit"] for one in data["equal"]] == ["images"]
    assert "seconds of training" not in text
