"""Plots of studies: a line with a band for each experiment, tracks apart, axes, names, colours."""

import json
import re
from xml.etree import ElementTree

import numpy as np
import pytest

from dinogen.report.compare.comparison import Comparison
from dinogen.report.compare.plots import Series, colours, curves_svg, metric_plots
from dinogen.report.compare.read import read_runs

from .compare_runs import write
from .compared_page import compare
from .test_compare_time import points_of, timed_run


def study(folder, tracks=("images", "minutes"), seeds=(0, 1)):
    """Two experiments in each track, as a study leaves them; both tracks train the same."""
    runs = []
    for track, scale in zip(tracks, (2.0, 1.0), strict=True):
        for name, family in (("gan", "dcgan"), ("flow", "flow")):
            for seed in seeds:
                runs.append(
                    timed_run(
                        folder / track / f"{name}-seed{seed}",
                        [scale * (9 - n - seed * n) for n in range(4)],
                        0.01 * (1 + seed),
                        every={"gan": 1000, "flow": 2000}[name],
                        seed=seed,
                        family=family,
                    )
                )
    write(folder / "study.json", {"runs": {}})
    return runs


def plots_of(folders):
    comparison = Comparison(read_runs(folders), "t")
    numbers = colours(comparison.experiments)
    plots = metric_plots(comparison.experiments, comparison.tracks, numbers)
    for plot in plots:
        # nobody can tell lines apart that are drawn alike
        assert len({curve.number for curve in plot.curves}) == len(plot.curves)
    return plots, numbers


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


def test_a_line_is_the_mean_of_its_seeds_and_the_band_spans_their_values(drawn):
    (plot,) = [plot for plot in drawn[0] if plot.title.startswith("images")]
    (curve,) = [curve for curve in plot.curves if curve.name == "gan"]
    assert curve.kimg == [1, 2, 3, 4]
    assert curve.values == [18, 15, 12, 9]
    assert curve.high == [18, 16, 14, 12] and curve.low == [18, 14, 10, 6]
    # 10 ms an image for one seed, and 20 for the other
    assert curve.minutes == pytest.approx([n * 15 / 60 for n in (1, 2, 3, 4)])


def test_an_experiment_has_one_colour_in_all_tracks_and_for_all_seeds(drawn):
    plots, numbers = drawn
    of = {name: {numbers[run] for run in numbers if name in run} for name in ("gan", "flow")}
    assert len(of["gan"]) == len(of["flow"]) == 1
    assert of["gan"] | of["flow"] == {0, 1}
    for plot in plots:
        assert [curve.number for curve in plot.curves] == [0, 1]


def test_a_final_and_a_study_in_progress_change_no_track(tmp_path):
    runs = study(tmp_path)
    final = timed_run(tmp_path / "final" / "images-gan-seed0", [3.0, 2.0], 0.01)
    waiting = tmp_path / "minutes" / "vae-seed0"  # has not begun
    (runs[-1] / "32x32" / "result.json").unlink()  # minutes/flow-seed1 has not ended
    plots, _ = plots_of([*runs, waiting, final])
    found = {plot.title.partition(":")[0]: [curve.name for curve in plot.curves] for plot in plots}
    assert list(found) == ["images", "minutes", "final"]
    assert sorted(found["images"]) == ["flow", "gan"]
    assert sorted(found["minutes"]) == ["flow-seed0", "flow-seed1", "gan"]
    assert found["final"] == ["images-gan-seed0"]


def test_tracks_of_two_studies_are_told_apart(tmp_path):
    runs = [run for name in ("one", "two") for run in study(tmp_path / name)]
    titles = [plot.title.partition(":")[0] for plot in plots_of(runs)[0]]
    assert titles == ["one/images", "one/minutes", "two/images", "two/minutes"]
    page, _, _ = compare(tmp_path / "out", *runs)
    assert len(page.ids) == len(set(page.ids))  # although all the lines are the same


def test_without_a_study_all_runs_are_compared_with_each_other(tmp_path):
    """Runs may lie anywhere."""
    here = [timed_run(tmp_path / "a" / name, [3.0, 2.0], 0.01, family=name) for name in "xy"]
    there = [timed_run(tmp_path / "b" / name, [4.0, 1.0], 0.01, family=name) for name in "zw"]
    (plot,), numbers = plots_of([*here, *there])
    assert len(plot.curves) == 4 and sorted(numbers.values()) == [0, 1, 2, 3]
    assert plot.title == "FID-768 over training"


def test_a_folder_that_repeats_seeds_of_another_is_an_experiment_of_its_own(tmp_path):
    runs = study(tmp_path)
    (tmp_path / "study.json").unlink()
    (plot,), _ = plots_of(runs)
    names = {f"{track}/{name}" for track in ("images", "minutes") for name in ("gan", "flow")}
    assert {curve.name for curve in plot.curves} == names


def test_seeds_that_were_measured_at_other_points_meet_between_them(tmp_path):
    """Between two measurements a curve is a straight line; outside of one there is no mean."""
    one = timed_run(tmp_path / "a-seed0", [8.0, 6.0, 4.0], 0.01, every=1000)
    other = timed_run(tmp_path / "a-seed1", [9.0, 3.0], 0.01, every=1500, seed=1)
    ((plot,), _) = plots_of([one, other])
    (curve,) = plot.curves
    assert curve.kimg == [1.5, 2, 3]
    assert curve.values == pytest.approx([(7 + 9) / 2, (6 + 7) / 2, (4 + 3) / 2])
    assert "as far as all seeds were measured" in plot.notes


@pytest.mark.parametrize(("every", "values"), [(9000, [3.0]), (2000, [3.0]), (3000, [3.0, 1.0])])
def test_seeds_with_too_little_in_common_are_two_lines(tmp_path, every, values):
    one = timed_run(tmp_path / "a-seed0", [8.0, 7.0, 6.0], 0.01, every=1000)
    other = timed_run(tmp_path / "a-seed1", values, 0.01, every=every, seed=1)
    ((plot,), numbers) = plots_of([one, other])
    found = {curve.name: curve.values for curve in plot.curves}
    assert found == {"a-seed0": [8, 7, 6], "a-seed1": values}
    assert set(numbers.values()) == {0}  # of one colour, but of other dashes
    assert {curve.number % 10 for curve in plot.curves} == {0}


def test_seeds_that_were_measured_differently_have_no_mean(tmp_path):
    one = timed_run(tmp_path / "a-seed0", [8.0, 6.0], 0.01)
    other = timed_run(tmp_path / "a-seed1", [80.0, 60.0], 0.01, seed=1)
    file = other / "32x32" / "metrics.jsonl"
    file.write_text(file.read_text().replace("aaaaaaaaaaaa", "bbbbbbbbbbbb"))
    ((plot,), _) = plots_of([one, other])
    assert [curve.num_seeds for curve in plot.curves] == [1, 1]
    assert "2 different ways" in plot.warning


def test_names_of_experiments_are_their_own(tmp_path):
    """Of two groups with the same beginning, and beside a run of that name."""
    for number in range(4):
        family, seed = ("vae", "flow")[number % 2], number // 2
        timed_run(tmp_path / f"run{number}", [2.0 + number, 1.0], 0.01, family=family, seed=seed)
    timed_run(tmp_path / "run", [3.0, 3.0], 0.01, family="ddpm")
    folders = sorted(tmp_path.iterdir())
    (plot,), _ = plots_of(folders)
    assert {curve.name for curve in plot.curves} == {"run", "run0, run2", "run1, run3"}
    _, data, _ = compare(tmp_path / "out", *folders)
    assert {one["name"] for one in data["seeds"]} == {"run0, run2", "run1, run3"}
    assert {name for name, _, _ in data["equal"][0]["rows"]} == {"run", "run0, run2", "run1, run3"}


def test_runs_without_a_seed_are_no_seeds(tmp_path):
    folders = [timed_run(tmp_path / name, [2.0, 1.0], 0.01) for name in "ab"]
    for folder in folders:
        file = folder / "config.yaml"
        file.write_text(file.read_text().replace("seed: 0\n", ""))
    (plot,), _ = plots_of(folders)
    assert {curve.name for curve in plot.curves} == {"a", "b"}


def is_affine(expected, drawn):
    slope, offset = np.polyfit(expected, drawn, 1)
    return bool(np.allclose(drawn, slope * np.asarray(expected) + offset, atol=0.02))


@pytest.mark.parametrize(("end", "logarithmic"), [(20, False), (150, False), (170, True)])
def test_images_are_logarithmic_where_lines_end_far_apart(end, logarithmic):
    """Where one line is shown more than eight times the images of another, both can be read."""
    x = [np.array([5.0, 10, 15, 20]), np.linspace(end / 4, end, 4)]
    lines = [Series(n, list(one), [4.0, 3.0, 2.0, 1.5]) for n, one in enumerate(x)]
    svg = curves_svg(lines, "FID")
    drawn = np.concatenate([points_of(svg, number)[:, 0] for number in (0, 1)])
    expected = np.concatenate(x)
    assert is_affine(np.log(expected) if logarithmic else expected, drawn)


@pytest.mark.parametrize(
    ("values", "low", "logarithmic"),
    [
        ([4.0, 3.0, 2.0, 1.0], None, False),
        ([9.0, 3.0, 2.0, 1.0], None, True),
        ([9.0, 3.0, 2.0, 0.0], None, False),
        ([9.0, 3.0, 2.0, 1.0], 0.9, True),
        ([9.0, 3.0, 2.0, 1.0], -0.1, False),  # as KID's may be
        ([9.0, 3.0, 2.0, 1.0], 1e-9, False),  # all lines would lie at the top
    ],
)
def test_values_are_logarithmic_if_they_are_far_apart_and_bands_allow_it(values, low, logarithmic):
    band = None if low is None else ([*values[:3], low], [one + 0.1 for one in values])
    svg = curves_svg([Series(0, [1.0, 2.0, 3.0, 4.0], values, band)], "FID")
    drawn = points_of(svg, 0)[:, 1]
    assert is_affine(np.log(values) if logarithmic else values, drawn)


def heights_of(svg):
    """Of the names at the ends of lines, from the top, in points."""
    found = ElementTree.fromstring(svg).iter()
    texts = [
        one for one in found if one.tag.endswith("text") and (one.text or "").startswith("run")
    ]
    return {one.text: float(one.get("y")) for one in texts}


@pytest.mark.parametrize("num", [6, 16])
def test_names_stand_in_the_order_of_the_ends_and_do_not_overlap(num):
    ends = np.random.default_rng(0).permutation(np.linspace(1, 1.1, num))
    ends[0] = 3.0
    lines = [Series(n, [1.0, 2.0], [3.0, end], name=f"run{n}") for n, end in enumerate(ends)]
    svg = curves_svg(lines, "FID", names=True)
    heights = heights_of(svg)
    order = sorted(heights, key=heights.__getitem__)
    assert order == [f"run{n}" for n in np.argsort(ends)[::-1]]
    assert np.diff([heights[name] for name in order]).min() > 9.5  # the height of their font
    size = float(re.search(r'viewBox="0 0 [\d.]+ ([\d.]+)"', svg)[1])
    assert min(heights.values()) > 0 and max(heights.values()) < size
    assert not heights_of(curves_svg(lines, "FID"))


def test_where_there_is_no_room_for_the_names_the_legend_has_them():
    lines = [Series(n, [1.0, 2.0], [3.0, n + 1.0], name=f"run{n}") for n in range(40)]
    assert not heights_of(curves_svg(lines, "FID", names=True))


def test_of_long_names_the_ends_are_written():
    names = [f"run-stylegan2-ada-64-augmented-lr{n}" for n in range(3)]
    lines = [Series(n, [1.0, 2.0], [3.0, n + 1.0], name=name) for n, name in enumerate(names)]
    heights = heights_of(curves_svg(lines, "FID", names=True))
    assert sorted(name[-3:] for name in heights) == ["lr0", "lr1", "lr2"]


@pytest.mark.parametrize(
    "name", ["font-family: x", 'q" id="text_1"', "#0abc99", "a\nb", "$x$ & <b>", "顔-0", "x: --> y"]
)
def test_a_name_is_text_whatever_it_is(name, recwarn):
    lines = [Series(n, [1.0, 2.0], [3.0, 2.0], name=f"{name}{n}") for n in range(2)]
    found = ElementTree.fromstring(curves_svg(lines, "FID", names=True))
    texts = [one.text.strip() for one in found.iter() if one.tag.endswith("text") and one.text]
    assert {" ".join(f"{name}{n}".split()) for n in range(2)} <= set(texts)
    assert not recwarn.list


def test_the_page_says_what_bands_are(tmp_path):
    page, _, _ = compare(tmp_path / "out", *study(tmp_path / "study"))
    assert "bands span the lowest to the highest value of the seeds" in page.text
    one = timed_run(tmp_path / "a", [2.0, 1.0], 0.01)
    page, _, _ = compare(tmp_path / "other", one)
    assert "bands span" not in page.text


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


def test_what_is_better_is_found_where_it_is_written(tmp_path):
    """Higher is best for precision; a first line of an earlier version does not say so."""
    for name, family, end in (("a", "vae", 0.25), ("b", "flow", 0.75)):
        run = timed_run(tmp_path / name, [0.0, end], 0.01, family=family)
        file = run / "32x32" / "metrics.jsonl"
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        for line in lines:
            value = line["metrics"].pop("fid768")
            line["metrics"]["precision768"] = value | {"better": "higher"}
        del lines[0]["metrics"]["precision768"]["better"]
        file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    _, data, text = compare(tmp_path / "out", *sorted(tmp_path.iterdir()))
    for one in data["equal"]:
        assert [name for name, _, _ in one["rows"]] == ["b", "a"]
        assert one["best"] == {"precision768": ["b"]}
    assert "precision (Inception-768) ↑" in text[text.index("## After") :]


def test_an_experiment_that_stands_alone_is_no_comparison(tmp_path):
    """In the time that the fastest takes for all, the others were not measured once."""
    for seed in (0, 1):
        timed_run(tmp_path / f"fast-seed{seed}", [2.0, 1.0], 0.001, seed=seed)
    timed_run(tmp_path / "slow", [2.0, 1.0], 1.0, family="vae")
    _, data, text = compare(tmp_path / "out", *sorted(tmp_path.iterdir()))
    assert [one["unit"] for one in data["equal"]] == ["images"]
    assert " s of training" not in text
