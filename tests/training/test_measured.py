"""Metrics of generated pictures, by `dinogen evaluate` and in training; a random tiny judge."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from dinogen.config import ConfigError
from dinogen.errors import UserError
from dinogen.features.dinov2 import make_random_dinov2
from dinogen.metrics.names import NAMES
from dinogen.training.evaluate import evaluate
from dinogen.training.evaluate_folder import evaluate_folder
from dinogen.training.run import train
from launch.cli import app
from shards import open_dataset
from tests.families.tiny import discs, tiny_config
from tests.metrics.small import pack_pictures, save_pictures

from .helpers import train_here
from .on_ranks import evaluate_here, on_ranks

OF_JUDGE = [name for name in NAMES if name.endswith("dinov2")]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Discs with val and test, and the judge beside them."""
    place = tmp_path_factory.mktemp("measured")
    pack_pictures(place / "data", discs(48))
    make_random_dinov2(place / "judge", seed=1, hidden_size=16, num_layers=1, num_heads=2)
    return place


def settings(place):
    return [f"metrics.dinov2={place / 'judge'}", f"metrics.cache={place / 'cache'}"]


@pytest.fixture(scope="module")
def run(place):
    """A GAN that is measured twice as it trains."""
    config = make(place, "run")
    train(config)
    return config


@pytest.fixture(autouse=True)
def nothing_measured_before(request):
    """What one test has measured stands beside nothing of another's."""
    if "run" in request.fixturenames:
        folder = request.getfixturevalue("run").run / "16x16"
        (folder / "evaluation.json").unlink(missing_ok=True)


def make(place, name, *overrides, family="dcgan"):
    measured = ["eval.every_kimg=0.016", "eval.generated=[fd_dinov2,kd_dinov2]"]
    measured += ["eval.num_generated=60"]
    return tiny_config(
        family, place / "data", place / name, *settings(place), *measured, *overrides
    )


def in_training(config):
    text = (config.run / "16x16" / "metrics.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def stats(config):
    text = (config.run / "16x16" / "stats.jsonl").read_text()
    return {line["nimg"]: line for line in map(json.loads, text.splitlines())}


def written(folder):
    return json.loads((folder / "evaluation.json").read_text())


def command(*words):
    return CliRunner().invoke(app, ["evaluate", *map(str, words)])


def values(result):
    """Figures and spreads of what could be measured, flat."""
    found = {}
    for name, figure in result["measured"].items():
        for key in ("value", "spread"):
            if figure[key] is not None:
                found[f"{name}/{key}"] = figure[key]
    return found


def test_all_metrics_of_a_run(run, place):
    done = command(run.run, "--num-samples", 60)
    assert done.exit_code == 0, done.output
    result = written(run.run / "16x16")
    assert list(result["measured"]) == list(NAMES)
    there = {name for name, figure in result["measured"].items() if figure["value"] is not None}
    # whose weights come with a library, or which have none
    always = {"faces", "spectrum", "sharpness"} | {n for n in NAMES if n.endswith("_onet")}
    assert there == {*OF_JUDGE, *always}
    assert result["measured"]["reconstruction_psnr"]["reason"] == "family dcgan encodes no pictures"
    assert "dcgan has no guide" in result["measured"]["guide_diversity"]["reason"]
    num_val = open_dataset(place / "data").num_samples("val")
    for name in OF_JUDGE:
        figure = result["measured"][name]
        assert (figure["num_samples"], figure["num_reference"]) == (60, num_val)
        assert figure["spread"] >= 0
        facts = result["fingerprints"][figure["fingerprint"]]
        assert facts["random"] is True and facts["judge"] == "dinov2"
        shown = f"{name}: {figure['value']:.6g}"
        assert shown in done.stdout and "by a RANDOM judge: it means nothing" in done.stdout
    assert result["sampling"]["num"] == 60 and result["sampling"]["images_per_s"] > 0
    assert "not available: fid, is, kid" in done.stdout
    # the command gives the same again
    words = result["command"].split()
    assert words[:2] == ["dinogen", "evaluate"] and "--nimg 32" in result["command"]
    assert values(evaluate(run.run, 16, nimg=32, num_samples=60)) == values(result)


def test_two_ranks_measure_what_one_measures(run):
    names = [*OF_JUDGE, "fid"]
    alone = evaluate(run.run, num_samples=113, names=names)
    (run.run / "16x16" / "evaluation.json").unlink()
    on_ranks(2, evaluate_here, str(run.run), 113, names)
    together = written(run.run / "16x16")
    assert together["world_size"] == 2
    assert set(together["measured"]) == set(names)
    assert values(together) == pytest.approx(values(alone), rel=1e-4)
    assert together["fingerprints"] == alone["fingerprints"]
    assert together["command"] == alone["command"]


def test_the_files_that_a_run_writes_measure_the_same(run, place, tmp_path):
    alone = evaluate(run.run, num_samples=50, names=["fd_dinov2", "precision_dinov2"])
    out = tmp_path / "pictures"
    words = ["sample", str(run.run), "--num", "50", "--out", str(out)]
    assert CliRunner().invoke(app, words).exit_code == 0
    words = [out, "--reference", place / "data", "--metrics", "fd_dinov2,precision_dinov2"]
    done = command(*words, *settings(place))
    assert done.exit_code == 0, done.output
    found = written(out)
    assert found["num_samples"] == 50 and "50 pictures of 16x16 in" in done.stdout
    # alone a picture may be rounded to the next value where in a batch it was not
    assert values(found) == pytest.approx(values(alone), rel=1e-3)
    assert found["fingerprints"] == alone["fingerprints"]


def test_what_was_measured_before_stays_beside_it(run, caplog):
    first = evaluate(run.run, num_samples=60, names=["fd_dinov2", "fid"])
    second = evaluate(run.run, num_samples=60, names=["kd_dinov2"])
    assert second["measured"]["fd_dinov2"] == first["measured"]["fd_dinov2"]
    assert "kd_dinov2" in second["measured"]["kd_dinov2"]["command"]
    assert "kd_dinov2" not in second["measured"]["fd_dinov2"]["command"]
    assert "cannot be compared" not in caplog.text
    # a judge that cannot be had today takes away no figure of yesterday
    lost = evaluate(run.run, names=["fd_dinov2"], changes=["metrics.dinov2=null"])
    assert lost["measured"]["fd_dinov2"] == first["measured"]["fd_dinov2"]
    assert lost["sampling"] == second["sampling"]


@pytest.mark.parametrize(
    ("other", "phrase"),
    [
        ({"num_samples": 30}, "num_samples: 30, not 60"),
        ({"num_samples": 60, "split": "test"}, "split: test, not val"),
        ({"num_samples": 60, "changes": ["metrics.num_reference=7"]}, "num_reference: 7, not"),
    ],
)
def test_who_measures_otherwise_is_told(run, caplog, other, phrase):
    before = evaluate(run.run, num_samples=60, names=["fd_dinov2"])
    after = evaluate(run.run, names=["fd_dinov2"], **other)
    assert "fd_dinov2: was measured before against something else" in caplog.text
    assert phrase in caplog.text
    figure = after["measured"]["fd_dinov2"]
    assert figure["fingerprint"] != before["measured"]["fd_dinov2"]["fingerprint"]
    assert list(after["fingerprints"]) == [figure["fingerprint"]]


def test_a_folder_of_pictures_as_the_reference(run, place, tmp_path):
    real = save_pictures(discs(12), tmp_path / "real")
    result = evaluate(run.run, num_samples=40, names=OF_JUDGE, reference=str(real))
    assert result["measured"]["fd_dinov2"]["num_reference"] == 12
    itself = evaluate_folder(real, names=OF_JUDGE, reference=str(real), changes=settings(place))[
        "measured"
    ]
    assert itself["fd_dinov2"]["value"] == pytest.approx(0, abs=1e-6)
    assert itself["precision_dinov2"]["value"] == 1
    assert "says nothing of training" in itself["memorisation_dinov2"]["reason"]
    (real / "evaluation.json").unlink()
    nothing = evaluate_folder(real, names=["fd_dinov2"], changes=settings(place))
    assert "give --reference DATA" in nothing["measured"]["fd_dinov2"]["reason"]
    large = save_pictures(discs(3, 32), tmp_path / "large")
    with pytest.raises(ConfigError, match="32x32, those measured 16x16"):
        evaluate(run.run, names=["fd_dinov2"], reference=str(large))


def test_a_checkpoint_by_its_folder_and_one_that_is_not_there(run):
    folder = run.run / "16x16" / "checkpoints" / "000000032"
    done = command(folder, "--num-samples", 40, "--metrics", "fd_dinov2")
    assert done.exit_code == 0, done.output
    assert f"evaluate {run.run} --stage 16 --nimg 32" in written(run.run / "16x16")["command"]
    done = command(run.run, "--nimg", 7)
    assert isinstance(done.exception, ConfigError) and "no checkpoint at 7" in str(done.exception)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--metrics", "fdi"], "--metrics: no metric 'fdi': did you mean fid?"),
        (["run=elsewhere"], "run=elsewhere: only keys of metrics: can be changed here"),
        (["metrics.dinov=x"], "unknown key 'metrics.dinov': did you mean 'dinov2'?"),
    ],
)
def test_wishes_that_cannot_be_met(run, words, message):
    done = command(run.run, *words)
    assert isinstance(done.exception, UserError) and message in str(done.exception)


# in training


def test_training_measures_what_evaluate_measures(run):
    lines = in_training(run)
    assert [(line["nimg"], line["stage"]) for line in lines] == [(16, 16), (32, 16)]
    figures = lines[-1]["metrics"]
    assert list(figures) == ["fd_dinov2", "kd_dinov2"]
    later = evaluate(run.run, num_samples=60, names=["fd_dinov2", "kd_dinov2"])
    for name, figure in figures.items():
        assert figure["value"] == pytest.approx(later["measured"][name]["value"], rel=1e-5)
        assert figure["spread"] is None, "in training none is worked out"
        assert figure["fingerprint"] == later["measured"][name]["fingerprint"]
        assert stats(run)[32][f"metrics/{name}"] == figure["value"]
    assert lines[-1]["fingerprints"] == later["fingerprints"]
    result = json.loads((run.run / "16x16" / "result.json").read_text())
    assert result["best"] == min(line["metrics"]["fd_dinov2"]["value"] for line in lines)


def test_training_on_two_ranks_measures_the_same(run, place):
    config = make(place, "two")
    on_ranks(2, train_here, config.model_dump(mode="json"))
    for one, two in zip(in_training(run), in_training(config), strict=True):
        for name in ("fd_dinov2", "kd_dinov2"):
            # weights differ by rounding, and a pixel by one of 256
            expected = one["metrics"][name]["value"]
            assert two["metrics"][name]["value"] == pytest.approx(expected, rel=1e-2)
        assert two["fingerprints"] == one["fingerprints"]


def test_lines_past_the_checkpoint_are_measured_again(run, place):
    config = make(place, "cut", "stages.0.kimg=0.016")
    train(config)
    path = config.run / "16x16" / "metrics.jsonl"
    (first,) = in_training(config)
    line = json.dumps(first | {"nimg": 24})
    path.write_text(f"{path.read_text()}{line}\n{line[:50]}")  # what a killed run left
    train(make(place, "cut"))
    lines = in_training(config)
    assert [line["nimg"] for line in lines] == [16, 32]
    assert lines[0] == first
    whole = in_training(run)
    assert lines[1]["metrics"] == whole[1]["metrics"]


def test_what_cannot_be_measured_is_said_once_and_ends_nothing(place, caplog):
    config = make(place, "lost", "eval.generated=[fid,fd_dinov2,lpips_diversity]")
    train(config)
    assert caplog.text.count("NOT MEASURED: fid: metrics.inception") == 1
    assert caplog.text.count("NOT MEASURED: lpips_diversity") == 1
    line = in_training(config)[-1]
    assert (
        line["metrics"]["fid"]["value"] is None and "inception" in line["metrics"]["fid"]["reason"]
    )
    assert line["metrics"]["fd_dinov2"]["value"] is not None
    assert "metrics/fid" not in stats(config)[32]


def test_without_a_figure_nobody_loses_patience(place):
    settings = ["eval.generated=[fid]", "eval.patience=1", "eval.every_kimg=0.008"]
    (result,) = train(make(place, "patient", *settings))
    assert (result["nimg"], result["ended_early"], result["best"]) == (32, False, None)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["eval.generated=[fid]", "eval.metric=fid"], "eval.metric: fid is not available: metrics"),
        (["eval.metric=memorisation_dinov2", "eval.generated=[memorisation_dinov2]"], "neither"),
        (["eval.generated=[fdi]"], "eval.generated: no metric 'fdi': did you mean fid?"),
        (["metrics.names=[fdi]"], "metrics.names: no metric 'fdi'"),
    ],
)
def test_what_has_to_be_measured_is_known_before_the_first_step(place, overrides, message):
    config = make(place, "refused", *overrides)
    with pytest.raises(ConfigError, match=message):
        train(config)
    assert not (config.run / "16x16" / "stats.jsonl").exists()


def test_more_is_better_where_the_table_says_so(place, monkeypatch):
    from dinogen.metrics import suite
    from dinogen.metrics.bootstrap import Estimate

    given = iter([0.2, 0.5, 0.4, 0.3, 0.9])

    def scripted(name, metric, sets, num, subject):
        estimate = Estimate(next(given), None)
        return suite.Figure(name, estimate.value, None, metric.better, num, None, None)

    monkeypatch.setattr(suite, "_figure", scripted)
    (result,) = train(
        make(
            place,
            "higher",
            "eval.generated=[recall_dinov2]",
            "eval.every_kimg=0.008",
            "eval.patience=2",
            "stages.0.kimg=0.8",
        )
    )
    assert (result["best"], result["best_nimg"], result["nimg"]) == (0.5, 16, 32)
    assert result["ended_early"]


def test_an_autoencoder_is_measured_on_what_it_makes_of_held_out_pictures(place):
    names = "eval.generated=[reconstruction_psnr,fd_dinov2]"
    config = make(place, "vae", names, "eval.metric=reconstruction_psnr", family="vae")
    (result,) = train(config)
    line = in_training(config)[-1]
    figure = line["metrics"]["reconstruction_psnr"]
    later = evaluate(config.run, num_samples=40, names=["reconstruction_psnr"])
    assert figure["value"] == pytest.approx(later["measured"]["reconstruction_psnr"]["value"])
    assert later["sampling"] is None
    values = [line["metrics"]["reconstruction_psnr"]["value"] for line in in_training(config)]
    assert result["best"] == max(values)
    assert "val/loss" in stats(config)[32], "its own figure is measured beside it"


def test_a_picture_among_those_of_another_size_is_named(place, tmp_path):
    folder = save_pictures(discs(3), tmp_path / "odd")
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(folder / "odd.png")
    done = command(folder, "--reference", place / "data")
    assert isinstance(done.exception, UserError) and "odd.png: 8x8" in str(done.exception)
