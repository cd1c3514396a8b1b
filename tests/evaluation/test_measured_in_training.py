"""What training measures of generated images: what is missing, what is better, and patience."""

from __future__ import annotations

import pytest

from dinogen.config import ConfigError
from dinogen.evaluation.evaluate import evaluate
from dinogen.training.run import train

from .measured import in_training, lay_out, make, stats


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return lay_out(tmp_path_factory.mktemp("measured"))


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


def test_without_a_value_nobody_loses_patience(place):
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
    from dinogen.metrics.value import Estimate

    given = iter([0.2, 0.5, 0.4, 0.3, 0.9])

    def scripted(name, metric, sets, num, subject):
        estimate = Estimate(next(given), None)
        return suite.MetricValue(name, estimate.value, None, metric.better, num, None, None)

    monkeypatch.setattr(suite, "_metric_value", scripted)
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


def test_an_autoencoder_is_measured_on_what_it_makes_of_held_out_images(place):
    names = "eval.generated=[reconstruction_psnr,fd_dinov2]"
    config = make(place, "vae", names, "eval.metric=reconstruction_psnr", family="vae")
    (result,) = train(config)
    line = in_training(config)[-1]
    metric_value = line["metrics"]["reconstruction_psnr"]
    later = evaluate(config.run, num_samples=40, names=["reconstruction_psnr"])
    assert metric_value["value"] == pytest.approx(later["measured"]["reconstruction_psnr"]["value"])
    assert later["sampling"] is None
    values = [line["metrics"]["reconstruction_psnr"]["value"] for line in in_training(config)]
    assert result["best"] == max(values)
    assert "val/loss" in stats(config)[32], "its own metric value is measured beside it"
