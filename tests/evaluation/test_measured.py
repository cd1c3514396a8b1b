"""A run is measured alike by `dinogen evaluate` and in training, on one rank and on two."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from dinogen.config import ConfigError
from dinogen.errors import UserError
from dinogen.evaluation.evaluate import evaluate, evaluate_folder
from dinogen.metrics.registry import NAMES
from dinogen.training.run import train
from launch.cli.main import app
from launch.cli.results import closing_lines
from shards import open_dataset
from tests.families.tiny import discs
from tests.metrics.small import save_images
from tests.training.helpers import train_here
from tests.training.on_ranks import evaluate_here, on_ranks

from .measured import in_training, lay_out, make, settings, stats

OF_EXTRACTOR = [name for name in NAMES if name.endswith("dinov2")]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return lay_out(tmp_path_factory.mktemp("measured"))


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


def written(folder):
    return json.loads((folder / "evaluation.json").read_text())


def command(*words):
    return CliRunner().invoke(app, ["evaluate", *map(str, words)])


def values(result):
    """Metric values and spreads of what could be measured, flat."""
    found = {}
    for name, metric_value in result["measured"].items():
        for key in ("value", "spread"):
            if metric_value[key] is not None:
                found[f"{name}/{key}"] = metric_value[key]
    return found


def test_all_metrics_of_a_run(run, place):
    done = command(run.run, "--num-samples", 60)
    assert done.exit_code == 0, done.output
    result = written(run.run / "16x16")
    assert list(result["measured"]) == list(NAMES)
    there = {
        name
        for name, metric_value in result["measured"].items()
        if metric_value["value"] is not None
    }
    # whose weights come with a library, or which have none
    always = {"faces", "spectrum", "sharpness"} | {n for n in NAMES if n.endswith("_onet")}
    assert there == {*OF_EXTRACTOR, *always}
    assert result["measured"]["reconstruction_psnr"]["reason"] == "family dcgan encodes no images"
    assert "dcgan has no guide" in result["measured"]["guide_diversity"]["reason"]
    num_val = open_dataset(place / "data").num_samples("val")
    for name in OF_EXTRACTOR:
        metric_value = result["measured"][name]
        assert (metric_value["num_samples"], metric_value["num_reference"]) == (60, num_val)
        assert metric_value["spread"] >= 0
        facts = result["fingerprints"][metric_value["fingerprint"]]
        assert facts["random"] is True and facts["judge"] == "dinov2"
        assert f"{name}: {metric_value['value']:.6g}" in done.stdout
    assert "by a RANDOM feature extractor: it means nothing" in done.stdout
    assert result["sampling"]["num"] == 60 and result["sampling"]["images_per_s"] > 0
    assert "not available: fid, is, kid" in done.stdout
    # the command gives the same again
    words = result["command"].split()
    assert words[:2] == ["dinogen", "evaluate"] and "--nimg 32" in result["command"]
    assert values(evaluate(run.run, 16, nimg=32, num_samples=60)) == values(result)


def test_two_ranks_measure_what_one_measures(run):
    names = [*OF_EXTRACTOR, "fid"]
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
    out = tmp_path / "images"
    words = ["sample", str(run.run), "--num", "50", "--out", str(out)]
    assert CliRunner().invoke(app, words).exit_code == 0
    words = [out, "--reference", place / "data", "--metrics", "fd_dinov2,precision_dinov2"]
    done = command(*words, *settings(place))
    assert done.exit_code == 0, done.output
    found = written(out)
    assert found["num_samples"] == 50 and "50 images of 16x16 in" in done.stdout
    # alone an image may be rounded to the next value where in a batch it was not
    assert values(found) == pytest.approx(values(alone), rel=1e-3)
    assert found["fingerprints"] == alone["fingerprints"]


def test_what_was_measured_before_stays_beside_it(run, caplog):
    first = evaluate(run.run, num_samples=60, names=["fd_dinov2", "fid"])
    second = evaluate(run.run, num_samples=60, names=["kd_dinov2"])
    assert second["measured"]["fd_dinov2"] == first["measured"]["fd_dinov2"]
    assert "kd_dinov2" in second["measured"]["kd_dinov2"]["command"]
    assert "kd_dinov2" not in second["measured"]["fd_dinov2"]["command"]
    assert "cannot be compared" not in caplog.text
    # a feature extractor that is missing today does not delete a value of yesterday
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
    assert "fd_dinov2 was measured before against something else" in caplog.text
    assert phrase in caplog.text
    metric_value = after["measured"]["fd_dinov2"]
    assert metric_value["fingerprint"] != before["measured"]["fd_dinov2"]["fingerprint"]
    assert list(after["fingerprints"]) == [metric_value["fingerprint"]]


def test_what_cannot_be_measured_again_is_said_beside_the_kept_value(run, tmp_path):
    before = evaluate(run.run, num_samples=40, names=["fd_dinov2"])["measured"]["fd_dinov2"]
    gone = [f"data.path={tmp_path}/gone"]
    after = evaluate(run.run, num_samples=40, names=["fd_dinov2"], changes=gone)
    assert after["measured"]["fd_dinov2"] == before
    assert "fd_dinov2" in after["measured_before"]
    (line,) = [one for one in closing_lines(after) if "not available" in one]
    assert "fd_dinov2" in line and f"{tmp_path}/gone is not there" in line


def test_a_folder_of_images_as_the_reference(run, place, tmp_path):
    real = save_images(discs(12), tmp_path / "real")
    result = evaluate(run.run, num_samples=40, names=OF_EXTRACTOR, reference=str(real))
    assert result["measured"]["fd_dinov2"]["num_reference"] == 12
    itself = evaluate_folder(
        real, names=OF_EXTRACTOR, reference=str(real), changes=settings(place)
    )["measured"]
    assert itself["fd_dinov2"]["value"] == pytest.approx(0, abs=1e-6)
    assert itself["precision_dinov2"]["value"] == 1
    assert "has no training split" in itself["memorisation_dinov2"]["reason"]
    (real / "evaluation.json").unlink()
    nothing = evaluate_folder(real, names=["fd_dinov2"], changes=settings(place))
    assert "give --reference DATA" in nothing["measured"]["fd_dinov2"]["reason"]
    large = save_images(discs(3, 32), tmp_path / "large")
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
        (["run=elsewhere"], "run=elsewhere: only keys of metrics: and places"),
        (["metrics.dinov=x"], "unknown key 'metrics.dinov': did you mean 'dinov2'?"),
    ],
)
def test_requests_that_cannot_be_met(run, words, message):
    done = command(run.run, *words)
    assert isinstance(done.exception, UserError) and message in str(done.exception)


# in training


def test_training_measures_what_evaluate_measures(run):
    lines = in_training(run)
    assert [(line["nimg"], line["stage"]) for line in lines] == [(16, 16), (32, 16)]
    metric_values = lines[-1]["metrics"]
    assert list(metric_values) == ["fd_dinov2", "kd_dinov2"]
    later = evaluate(run.run, num_samples=60, names=["fd_dinov2", "kd_dinov2"])
    for name, metric_value in metric_values.items():
        assert metric_value["value"] == pytest.approx(later["measured"][name]["value"], rel=1e-5)
        assert metric_value["spread"] is None, "in training none is worked out"
        assert metric_value["fingerprint"] == later["measured"][name]["fingerprint"]
        assert stats(run)[32][f"metrics/{name}"] == metric_value["value"]
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


def test_a_image_among_those_of_another_size_is_named(place, tmp_path):
    folder = save_images(discs(3), tmp_path / "odd")
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(folder / "odd.png")
    done = command(folder, "--reference", place / "data")
    assert isinstance(done.exception, UserError) and "odd.png: 8x8" in str(done.exception)
