"""Curves over time, values at equal images and equal time, and who learnt from what measures."""

import json
import re

import numpy as np
import pytest

from dinogen.runs.values import favours, trained_with

from .compare_runs import make_run, metric_value, write
from .compared_page import compare


def timed_run(folder, values, per_image, *, every=1000, seed=0, timed=True, **changes):
    """A run measured each ``every`` images, of which each took ``per_image`` seconds of steps."""
    run = make_run(folder, values[-1], seed=seed, **changes)
    stage = run / "32x32"
    points = [every * (n + 1) for n in range(len(values))]
    lines = [
        {"nimg": nimg, "stage": 32, "metrics": {"fid768": metric_value(value)}}
        for nimg, value in zip(points, values, strict=True)
    ]
    (stage / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    steps = [{"nimg": nimg, "loss": 1.0, "training_s": nimg * per_image} for nimg in points]
    if not timed:
        steps = [{key: one[key] for key in ("nimg", "loss")} for one in steps]
    (stage / "stats.jsonl").write_text("".join(json.dumps(line) + "\n" for line in steps))
    if timed:
        result = json.loads((stage / "result.json").read_text())
        write(stage / "result.json", result | {"training_s": points[-1] * per_image})
    return run


def points_of(svg, number):
    """The points of a run's line, in the SVG's coordinates."""
    paths = re.findall(rf'<path d="([^"]*)"[^>]*stroke: var\(--s{number}\)[^>]*>', svg)
    (points,) = [
        np.array([float(x) for x in re.findall(r"-?[\d.]+", path)]).reshape(-1, 2)
        for path in paths
        if path.count("L") == 3
    ]
    return points


def test_curves_over_time_are_where_their_numbers_are(tmp_path):
    curves = {"a": ([4.0, 3.0, 1.5, 1.0], 0.06), "b": ([5.0, 2.5, 2.0, 3.5], 0.12)}
    runs = [timed_run(tmp_path / name, *curve) for name, curve in curves.items()]
    page, _, _ = compare(tmp_path / "out", *runs)
    over_time = page.raw[page.raw.index('class="by-time"') :]
    wide = over_time[over_time.index('class="wide"') : over_time.index('class="narrow"')]
    assert "training, minutes" in wide and "images seen" not in wide
    drawn = [points_of(wide, number)[:, 0] for number in (0, 1)]
    minutes = [np.arange(1, 5) * 1000 * per_image / 60 for _, per_image in curves.values()]
    # one affine image for both lines
    slope, offset = np.polyfit(np.concatenate(minutes), np.concatenate(drawn), 1)
    assert slope > 0
    for found, wanted in zip(drawn, minutes, strict=True):
        assert np.allclose(found, slope * wanted + offset, atol=0.01)
    assert page.raw.count('type="radio"') == 2


def test_without_times_there_is_no_choice_of_axis(tmp_path):
    runs = [timed_run(tmp_path / name, [2.0, 1.0], 1.0, timed=False) for name in "ab"]
    page, data, text = compare(tmp_path / "out", *runs)
    assert 'type="radio"' not in page.raw and 'class="by-time"' not in page.raw
    assert [one["unit"] for one in data["equal"]] == ["images"]
    assert " s of training" not in text


def test_without_curves_there_is_no_choice_of_axis(tmp_path):
    run = timed_run(tmp_path / "a", [2.0, 1.0], 1.0)
    (run / "32x32" / "metrics.jsonl").unlink()
    page, _, _ = compare(tmp_path / "out", run)
    assert "Training loss" in page.text and 'type="radio"' not in page.raw


def test_values_after_equal_images_and_after_equal_time(tmp_path):
    """Worked out by hand: a is done after 4,000 images and 40 s, b after 2,000 and 40 s."""
    timed_run(tmp_path / "a", [8.0, 4.0, 2.0, 1.0], 0.01)
    timed_run(tmp_path / "b", [6.0, 5.0], 0.02)
    page, data, text = compare(tmp_path / "out", tmp_path / "a", tmp_path / "b")
    images, seconds = data["equal"]
    assert (images["unit"], images["amount"]) == ("images", 2.0)
    assert (seconds["unit"], seconds["amount"]) == ("seconds", 40.0)
    values = [{name: cells["fid768"] for name, _, cells in one["rows"]} for one in data["equal"]]
    assert values[0] == {"a": [4.0, None], "b": [5.0, None]}
    assert values[1] == {"a": [1.0, None], "b": [5.0, None]}
    for told in ("after 2 thousand images", "after 40 s of training"):
        assert told in page.text.lower() and told in text.lower()


def test_between_measurements_a_line_and_over_seeds_a_mean(tmp_path):
    for seed, end in enumerate((1.0, 3.0)):
        timed_run(tmp_path / f"a-seed{seed}", [9.0, end], 0.01, seed=seed)
    timed_run(tmp_path / "c", [7.0], 0.01, every=1500, family="vae")
    _, data, _ = compare(tmp_path / "out", *sorted(tmp_path.iterdir()))
    rows = {name: cells["fid768"] for name, _, cells in data["equal"][0]["rows"]}
    # half way between 9 and 1, and between 9 and 3
    assert rows["a"] == pytest.approx([5.5, 0.5**0.5])
    assert rows["c"] == [7.0, None]


def test_runs_that_do_not_say_how_long_they_took_are_named(tmp_path):
    for name in "ab":
        timed_run(tmp_path / name, [2.0, 1.0], 0.01)
    timed_run(tmp_path / "old", [2.0, 1.0], 0.01, timed=False)
    page, data, text = compare(tmp_path / "out", *sorted(tmp_path.iterdir()))
    assert [one["left_out"] for one in data["equal"]] == [[], ["old"]]
    assert "Without a record of their time: old." in text
    assert page.text.count("Without a record of their time: old.") == 2


def test_a_run_that_an_earlier_version_began_does_not_say_how_long_it_took(tmp_path):
    for name in "ab":
        timed_run(tmp_path / name, [2.0, 1.0], 0.01)
    run = timed_run(tmp_path / "old", [2.0, 1.0], 0.01)
    file = run / "32x32" / "stats.jsonl"
    first, last = map(json.loads, file.read_text().splitlines())
    del first["training_s"]
    file.write_text("".join(json.dumps(one) + "\n" for one in (first, last)))
    _, data, _ = compare(tmp_path / "out", *sorted(tmp_path.iterdir()))
    assert [one["left_out"] for one in data["equal"]] == [[], ["old"]]


def test_values_that_were_measured_differently_are_not_put_side_by_side(tmp_path):
    timed_run(tmp_path / "a", [2.0, 1.0], 0.01)
    run = timed_run(tmp_path / "b", [2.0, 1.0], 0.01)
    file = run / "32x32" / "metrics.jsonl"
    file.write_text(file.read_text().replace("aaaaaaaaaaaa", "bbbbbbbbbbbb"))
    assert compare(tmp_path / "out", tmp_path / "a", run)[1]["equal"] == []


def test_the_time_of_earlier_stages_counts(tmp_path):
    run = timed_run(tmp_path / "a", [2.0, 1.0], 0.01)
    first = json.loads((run / "32x32" / "result.json").read_text())
    write(run / "16x16" / "result.json", first | {"training_s": 7.0})
    (run / "16x16" / "stats.jsonl").write_text('{"nimg": 500, "loss": 1, "training_s": 7}\n')
    _, data, _ = compare(tmp_path / "out", run)
    one = data["runs"][0]
    assert one["curves"]["training_s"] == {"kimg": [0.5, 1.0, 2.0], "values": [7.0, 17.0, 27.0]}
    assert one["numbers"]["training_s"]["value"] == 27.0


def test_who_was_trained_with_the_network_that_measures_is_said(tmp_path):
    few = "from only 500 generated images (fewer than 1,000)"
    both = f"{few}; {trained_with('onet')}"
    assert favours(both) and not favours(few) and not favours(None)
    measured = {"fd_onet": metric_value(1.0, caution=both), "fid768": metric_value(1.0)}
    own = make_run(tmp_path / "repa", measured=measured)
    measured = {"fd_onet": metric_value(2.0, caution=few), "fid768": metric_value(2.0)}
    page, data, text = compare(tmp_path / "out", own, make_run(tmp_path / "b", measured=measured))
    (said,) = [one for one in data["warnings"] if "learnt from" in one]
    assert said.startswith("FD-O-Net: repa learnt from the network that measures")
    assert said in page.text
    assert "(few images, own network)" in text and "(few images)" in text


def test_values_after_the_same_training_carry_their_cautions(tmp_path):
    """Also where only one of several seeds, or one of two points, has a caution."""
    own = trained_with("onet")
    for seed in (0, 1):
        run = timed_run(tmp_path / f"repa-seed{seed}", [4.0, 2.0], 0.01, seed=seed)
        file = run / "32x32" / "metrics.jsonl"
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        for line in lines:
            line["metrics"]["fid768"] |= {"caution": None, "num_samples": 5000}
        lines[0]["metrics"]["fid768"]["caution"] = own if seed else None
        file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    timed_run(tmp_path / "b", [3.0, 1.0], 0.01, family="vae")  # from 500 images, without the key
    page, data, text = compare(tmp_path / "out", *sorted(tmp_path.iterdir()))
    for one in data["equal"]:
        assert one["cautions"] == {"repa": {"fid768": "own network"}, "b": {"fid768": "few images"}}
    tables = text[text.index("## After ") : text.index("## Failures")]
    assert tables.count("(own network)") == 2 and tables.count("(few images)") == 2
    tables = page.raw[page.raw.index('id="equal"') : page.raw.index('id="curves"')]
    assert tables.count('<span class="note">own network</span>') == 2
    assert tables.count('<span class="note">few images</span>') == 2
    legend = re.search(r'<ul class="legend">.*?</ul>', page.raw, re.S)[0]
    assert legend.count("(mean of 2 seeds, own network)") == 1 and legend.count("(few images)") == 1


def test_the_notes_of_a_study_stand_on_the_page(tmp_path):
    from dinogen.report.compare import write_comparison

    page = write_comparison([make_run(tmp_path / "a")], tmp_path / "out", "t", ["images: 9 k <b>"])
    assert "images: 9 k &lt;b&gt;" in page.page.read_text()
    assert "images: 9 k" in (tmp_path / "out" / "comparison.md").read_text()
