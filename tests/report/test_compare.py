"""Comparisons: hand-made runs whose numbers are found again, and what must be said loudly."""

import json
import re
import statistics

import pytest

from dinogen.config import ConfigError, parse_config
from dinogen.errors import UserError
from dinogen.report.compare import write_comparison
from dinogen.report.compare.read import find_runs
from dinogen.runs.fingerprint import fingerprint_id
from dinogen.runs.run import Run

from .compare_runs import ALIKE, VERSIONS, make_run, metric_value, write
from .compared_page import cell, compare


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
    kept = {"fid768": metric_value(1.25), "kid768": metric_value(0.5, command=earlier)}
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
        one = metric_value(value, 0.01, better)
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
        measured={"fid768": metric_value(0.5, fingerprint="bbbbbbbbbbbb")},
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


def test_noise_of_a_familys_own_does_not_keep_it_from_being_the_best(tmp_path):
    """StyleGAN2 draws noise for each image, and says so in its fingerprint."""
    noisy = {"bbbbbbbbbbbb": ALIKE | {"sampling": {"noise": "per image"}}}
    plain = {fingerprint_id(ALIKE): ALIKE}
    run = make_run(
        tmp_path / "a",
        measured={"fid768": metric_value(2.0, 0.1, fingerprint=fingerprint_id(ALIKE))},
        fingerprints=plain,
    )
    other = make_run(
        tmp_path / "b",
        family="stylegan2_ada",
        measured={"fid768": metric_value(1.0, 0.1, fingerprint="bbbbbbbbbbbb")},
        fingerprints=noisy,
    )
    page, data, _ = compare(tmp_path / "out", run, other)
    assert "best" in cell(page, "b", "FID-768")[1]
    assert not [one for one in data["warnings"] if "different ways" in one]
    assert data["fingerprints"] == plain | noisy  # the origins still say how each was drawn


def test_classes_in_turn_are_said_to_differ(tmp_path):
    turns = {"bbbbbbbbbbbb": ALIKE | {"sampling": {"classes": "in turn"}}}
    measured = {"fid768": metric_value(1.0, fingerprint="bbbbbbbbbbbb")}
    other = make_run(tmp_path / "b", measured=measured, fingerprints=turns)
    _, data, _ = compare(tmp_path / "out", make_run(tmp_path / "a"), other)
    (told,) = [one for one in data["warnings"] if "different ways" in one]
    assert "sampling: as usual (a); classes in turn (b)." in told


@pytest.mark.parametrize("sampling", ["x", ["a"], 3, True, None, {}, {"classes": {"a": 1}}])
def test_a_fingerprint_may_say_anything_of_its_draws(tmp_path, sampling):
    """One run with a file of another version, or a damaged one, costs no page."""
    odd = {"bbbbbbbbbbbb": ALIKE | {"sampling": sampling}}
    measured = {"fid768": metric_value(1.0, fingerprint="bbbbbbbbbbbb")}
    run = make_run(tmp_path / "a", measured=measured, fingerprints=odd)
    lines = [
        {"nimg": nimg, "stage": 32, "metrics": measured, "fingerprints": odd} for nimg in (1, 2)
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (run / "32x32" / "metrics.jsonl").write_text(text)
    page, data, _ = compare(tmp_path / "out", run, make_run(tmp_path / "b"))
    assert {one["name"]: one["status"] for one in data["runs"]} == dict.fromkeys("ab", "finished")
    assert not data["damaged"] and "FID-768 over training" in page.text
    assert Run(run).stage(32).metric("fid768")["value"] == 1.0


def test_values_of_training_have_their_fingerprints_beside_those_of_checkpoints(tmp_path):
    """What only training measured is compared too, where checkpoints were measured since."""
    noisy = {"bbbbbbbbbbbb": ALIKE | {"sampling": {"noise": "per image"}}}
    plain = {fingerprint_id(ALIKE): ALIKE}
    runs = []
    for name, facts in (("a", noisy), ("b", plain)):
        run = make_run(tmp_path / name)
        (mark,) = facts
        line = {"nimg": 20016, "stage": 32, "fingerprints": facts}
        for file, metric in (("metrics", "spectrum"), ("checkpoints", "fid768")):
            line["metrics"] = {metric: metric_value(2.0 if name == "a" else 1.0, fingerprint=mark)}
            (run / "32x32" / f"{file}.jsonl").write_text(json.dumps(line) + "\n")
            line["fingerprints"] = {}
        runs.append(run)
    page, _, _ = compare(tmp_path / "out", *runs)
    assert "best" in cell(page, "b", "spectrum")[1]


def test_different_counts_are_said_even_without_a_fingerprint(tmp_path):
    for name, num in (("a", 100), ("b", 50)):
        one = metric_value(
            0.3, 0.1, "higher", num_samples=num, num_reference=None, fingerprint=None
        )
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


def test_random_extractors_and_guides_are_said_loudly(tmp_path):
    run = make_run(tmp_path / "a", fingerprints={"aaaaaaaaaaaa": ALIKE | {"random": True}})
    result = run / "32x32" / "result.json"
    write(result, json.loads(result.read_text()) | {"random_guide": True})
    _, data, _ = compare(tmp_path / "out", run)
    assert [one.split(":")[0] for one in data["warnings"]] == ["RANDOM EXTRACTOR", "RANDOM GUIDE"]


def test_what_is_not_available_is_listed_with_its_reason(tmp_path):
    reason = "no weights: set metrics.inception to their file"
    gone = {"fid": metric_value(None, reason=reason), "is": metric_value(None, reason=reason)}
    page, data, text = compare(tmp_path / "out", make_run(tmp_path / "a", measured=gone))
    (one,) = data["not_available"]
    assert one == {"metrics": "FID, IS", "reason": reason, "runs": ["a"]}
    assert reason in page.text and reason in text
    assert "FID" not in "".join(page.metric_values()["a" + "dcgan, 32×32"])


def test_failed_runs_are_listed_with_what_is_known(tmp_path):
    good = make_run(tmp_path / "good")
    stopped = make_run(tmp_path / "stopped")
    (stopped / "32x32" / "result.json").unlink()
    with (stopped / "32x32" / "stats.jsonl").open("w") as file:
        file.write('{"nimg": 1000, "loss": 2.0}\n{"nimg": 2000, "loss": null}\n')
    collapsed = make_run(tmp_path / "collapsed")
    result = collapsed / "32x32" / "result.json"
    change = {"health": "COLLAPSED", "warnings": ["COLLAPSED: samples differ 3 %"]}
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
    assert "last 1 log lines have no finite loss" in failures["stopped"]["what"][1]
    assert failures["stopped"]["status"] == "unfinished"
    assert failures["collapsed"]["what"] == ["COLLAPSED: samples differ 3 %"]
    said = "; ".join(failures["broken"]["what"])
    assert "32x32/stats.jsonl: holds no line of statistics" in said
    assert "32x32/evaluation.json cannot be read" in said
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
    assert {run["name"]: run["family"] for run in data["runs"]} == {
        "bad-seed0": "wgan_gp",
        "dcgan-seed0": "dcgan",
    }


def test_folders_that_hold_no_run_are_refused(tmp_path):
    with pytest.raises(UserError, match="no run here or below"):
        find_runs([tmp_path])
    with pytest.raises(UserError, match="no such folder"):
        find_runs([tmp_path / "nowhere"])
    with pytest.raises(UserError, match="no run to compare"):
        write_comparison([], tmp_path / "out", "none")


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


def test_values_of_training_stand_in_where_nothing_else_was_measured(tmp_path):
    run = make_run(tmp_path / "a", measured={})
    line = {"nimg": 20016, "metrics": {"fid768": metric_value(3.5)}}
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
