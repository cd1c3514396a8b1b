"""Held-out metric values while a run trains, and its early end."""

import json

import pytest
import torch

from dinogen.config import ConfigError
from dinogen.evaluation.evaluate import evaluate
from dinogen.families.vae import Vae
from dinogen.training.checkpointing.checkpoint import newest_checkpoint
from dinogen.training.run import train
from shards import open_dataset
from tests.families.tiny import pack_discs, tiny_config


@pytest.fixture
def data(tmp_path):
    pack_discs(tmp_path / "data")
    return tmp_path / "data"


def lines(config):
    text = (config.run / "16x16" / "stats.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def checkpoints(config):
    return sorted(int(p.name) for p in (config.run / "16x16/checkpoints").iterdir())


def script(monkeypatch, values):
    """Make the family measure these values, one after the other."""
    left = list(values)
    monkeypatch.setattr(Vae, "held_out", lambda *_: {"loss": torch.tensor(left.pop(0))})
    # one batch per measurement
    monkeypatch.setattr("dinogen.evaluation.subject.BATCH", 100)


def test_it_measures_what_evaluate_measures(data, tmp_path):
    config = tiny_config("vae", data, tmp_path / "run", "eval.every_kimg=0.016")
    train(config)
    measured = {line["nimg"]: line["val/loss"] for line in lines(config) if "val/loss" in line}
    assert list(measured) == [16, 32]
    result = evaluate(config.run)
    assert result["num_samples"] == open_dataset(data).num_samples("val") > 3
    assert result["metrics"]["held_out/loss"] == pytest.approx(measured[32], rel=1e-6)


def test_it_ends_early_and_keeps_the_best(data, tmp_path, monkeypatch, caplog):
    script(monkeypatch, [3.0, 2.0, 2.5, float("nan")])
    settings = ["stages.0.kimg=0.8", "eval.every_kimg=0.008", "eval.patience=2"]
    settings += ["checkpoint.keep_last=1"]
    config = tiny_config("vae", data, tmp_path / "run", *settings)
    (result,) = train(config)
    assert result["ended_early"] is True
    assert (result["best"], result["best_nimg"], result["nimg"]) == (2.0, 16, 32)
    assert checkpoints(config) == [16, 32], "the best one stays beside the last"
    assert "ended early: loss was no better than 2" in caplog.text
    # finished is finished: nothing is measured again
    assert train(config) == [result]


def test_an_interrupted_run_ends_early_at_the_same_point(data, tmp_path, monkeypatch):
    settings = ["eval.every_kimg=0.008", "eval.patience=2", "stages.0.kimg=0.8"]
    script(monkeypatch, [3.0, 2.0, 2.5, 2.5])
    config = tiny_config("vae", data, tmp_path / "whole", *settings)
    train(config)
    parts = tiny_config("vae", data, tmp_path / "parts", *settings, "stages.0.kimg=0.024")
    script(monkeypatch, [3.0, 2.0, 2.5])
    train(parts)
    script(monkeypatch, [2.5])
    parts = tiny_config("vae", data, tmp_path / "parts", *settings)
    (result,) = train(parts)
    assert result["ended_early"]
    assert result["nimg"] == 32
    expected = newest_checkpoint(config.run / "16x16/checkpoints").tensors("G")
    found = newest_checkpoint(parts.run / "16x16/checkpoints").tensors("G")
    assert all(torch.equal(expected[k], found[k]) for k in expected)


@pytest.mark.parametrize(
    ("family", "overrides", "message"),
    [
        ("dcgan", ["eval.every_kimg=1"], "eval: family dcgan has nothing to measure"),
        ("vae", ["eval.every_epochs=1", "eval.split=test"], "eval.split: .* no samples in split"),
        ("vae", ["eval.every_kimg=0.01", "eval.metric=fid"], "eval.metric: .*loss.*name one"),
    ],
)
def test_what_cannot_be_measured_is_said(family, overrides, message, data, tmp_path):
    with pytest.raises(ConfigError, match=message):
        train(tiny_config(family, data, tmp_path / "run", *overrides))


def test_patience_alone_is_refused(data, tmp_path):
    with pytest.raises(ConfigError, match="patience needs measurements"):
        tiny_config("vae", data, tmp_path / "run", "eval.patience=3")
