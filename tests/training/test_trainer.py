"""The loop as a user meets it: stages, results, and what it refuses."""

import itertools
import json

import numpy as np
import pytest
import torch
from PIL import Image

from dinogen.config import ConfigError
from dinogen.families.registry import resolve
from dinogen.features.dinov2 import make_random_dinov2
from dinogen.training.checkpointing.checkpoint import load_checkpoint
from dinogen.training.checkpointing.snapshot import load_snapshot
from dinogen.training.run import train
from dinogen.training.state import Progress, StageState
from dinogen.training.trainer import TrainingError
from tests.training.helpers import curve, stage, weights


def test_in_fade_in_only_the_new_block_and_its_to_rgb_change(make_config):
    config = make_config("stages.1.kimg=0.08", "stages.1.fade_kimg=0.08")
    train(config)
    before, after = weights(config, 4), weights(config, 8)
    new = {name for name in after if name.startswith(("G/blocks.8", "G/to_rgb.8"))}
    assert len(new) == 6
    for name in after:
        if name.startswith("G/") and name not in new and name != "G/alpha":
            assert torch.equal(before[name], after[name]), name
    state = StageState(resolve(config), 1)
    for name in new:
        fresh = weights(config, 8)[name]
        assert not torch.equal(fresh, torch.zeros_like(fresh))
    moments = {n.split("/")[2] for n in after if n.startswith("optim/")}
    assert moments == {name.removeprefix("G/") for name in new}
    assert state.finished


def test_after_the_fade_in_everything_in_use_changes(make_config):
    config = make_config()
    train(config)
    before, after = weights(config, 4), weights(config, 8)
    for name in ("G/dense.weight", "G/dense.bias"):
        assert not torch.equal(before[name], after[name])
    assert torch.equal(before["G/to_rgb.4.weight"], after["G/to_rgb.4.weight"])


def test_what_a_stage_leaves(make_config):
    config = make_config()
    results = train(config)
    assert [r["resolution"] for r in results] == [4, 8]
    for result in results:
        size = result["resolution"]
        folder = stage(config, size)
        assert result == json.loads((folder / "result.json").read_text())
        assert result["random_guide"] and "RANDOM" in result["guide_label"]
        assert result["files"]["final"] == f"final_{size}x{size}.random-guide.png"
        for name in result["files"].values():
            assert np.asarray(Image.open(folder / name)).std() > 0
        lines = curve(config, size)
        assert {line["floor"] for line in lines} == {result["floor"]}
        assert lines[-1]["nimg"] == result["nimg"]
        assert lines[-1]["diversity"] == result["diversity"]
    assert results[1]["nimg"] == 240
    alphas = [line["alpha"] for line in curve(config, 8)]
    assert alphas[0] < alphas[1] < alphas[-1] == 1
    assert {line["lr"] for line in curve(config, 8)} == {0.01}
    assert (config.run / "index.html").stat().st_size > 1000


def test_the_learning_rate_rises_and_falls(make_config):
    """Logged as Adam had it: at a rate of 0 nothing would move, and least of all at the ends."""
    rise_and_fall = "stages=[{resolution: 4, kimg: 0.08, batch: 8, lr: 0.01, %s}]"
    config = make_config(
        rise_and_fall % "warmup_kimg: 0.032, decay_kimg: 0.032",
        "log.every_kimg=0.008",
        "checkpoint={every_kimg: 0.008, keep_last: 99}",
    )
    train(config)
    rates = [line["lr"] for line in curve(config, 4)]
    shares = [0.25, 0.5, 0.75, 1, 1, 1, 1, 0.75, 0.5, 0.25]
    assert rates == pytest.approx([0.01 * share for share in shares])
    folder = stage(config, 4) / "checkpoints"
    saved = [
        load_checkpoint(folder / f"{n:09d}").tensors("G")["dense.weight"] for n in range(8, 81, 8)
    ]
    moved = [float((b - a).abs().max()) for a, b in itertools.pairwise(saved)]
    # Adam's steps are as long as its rate, give or take what a gradient does to its neighbours.
    assert all(step < 1.5 * rate for step, rate in zip(moved, rates[1:], strict=True))
    assert moved[-1] < moved[3] / 2


def test_a_finished_run_is_not_trained_again_and_a_longer_one_goes_on(make_config):
    config = make_config("stages=[{resolution: 4, kimg: 0.08, batch: 8}]")
    first = train(config)
    assert train(config) == first
    longer = make_config("stages=[{resolution: 4, kimg: 0.16, batch: 8}]")
    assert train(longer)[0]["nimg"] == 160
    whole = make_config("stages=[{resolution: 4, kimg: 0.16, batch: 8}]", run="whole")
    train(whole)
    for name, value in weights(whole, 4).items():
        assert torch.equal(value, weights(longer, 4)[name])


def test_one_stage_alone_and_its_order(make_config):
    config = make_config()
    with pytest.raises(ConfigError, match="stage 8 grows from stage 4"):
        train(config, 8)
    train(config, 4)
    assert train(config, 8)[0]["resolution"] == 8


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ("seed=1", "seed"),
        ("family.z_dim=9", r"family\.z_dim"),
        ("stages.0.lr=0.5", r"stages\.0\.lr"),
        ("data.num_lanes=8", r"data\.num_lanes"),
        ("optim.betas=[0.5, 0.9]", r"optim\.betas"),
    ],
)
def test_a_config_that_contradicts_the_checkpoint_is_refused(make_config, change, key):
    train(make_config("stages.0.kimg=0.024"), 4)
    with pytest.raises(ConfigError, match=key):
        train(make_config(change), 4)


def test_another_guide_than_the_shards_were_made_by_is_refused(make_config, tmp_path):
    make_random_dinov2(tmp_path / "other", seed=1, hidden_size=32, num_layers=2, num_heads=2)
    with pytest.raises(ConfigError, match=r"guide: not the one that made .*weights_sha256"):
        train(make_config(f"guide.path={tmp_path / 'other'}"))


def test_an_unknown_family_option_names_the_nearest(make_config):
    with pytest.raises(ConfigError, match=r"z_dmi.*z_dim"):
        train(make_config("family.z_dmi=3"))


def test_updates_that_are_not_finite_end_the_run_with_advice(make_config):
    config = make_config("stages.0.lr=1e36", "engine.max_nonfinite=3")
    with pytest.raises(TrainingError, match=r"3 updates in a row were not finite.*lower lr"):
        train(config)


def test_sampling_repeats_itself(make_config):
    config = make_config()
    train(config)
    snapshot = load_snapshot(config.run)
    assert snapshot.resolution == 8 and snapshot.mark == ".random-guide"
    many, few = snapshot.sample(5, seed=3), snapshot.sample(2, seed=3)
    assert torch.equal(many[:2], few)
    assert not torch.equal(many, snapshot.sample(5, seed=4))
    assert load_snapshot(config.run, 4).sample(1, 0).shape == (1, 3, 4, 4)
    with pytest.raises(ConfigError, match="no run here"):
        load_snapshot(config.run / "8x8")


def test_a_generator_that_ignores_z_is_called_collapsed(make_config):
    config = make_config()
    train(config, 4)
    state = StageState(resolve(config), 0)
    healthy = state.probe()
    network = state.ema.networks["G"]
    with torch.no_grad():
        network.dense.weight.zero_()
    health = state.probe()
    assert health.status == "COLLAPSED" and health.scalars["diversity"] < 1e-3
    assert healthy.scalars["diversity"] > health.scalars["diversity"]
    floor = state.family.constants()["floor"]
    with torch.no_grad():
        near_floor = state.family.probe(state.family.networks, 1.01 * floor)
    assert near_floor.status == "COLLAPSED"


def test_samples_that_are_not_finite_are_called_broken(make_config):
    config = make_config()
    train(config, 4)
    state = StageState(resolve(config), 0)
    with torch.no_grad():
        state.ema.networks["G"].dense.weight.fill_(float("nan"))
    assert state.probe().status == "BROKEN"


def test_the_loss_of_a_result_does_not_hang_on_one_batch():
    progress = Progress(nimg=1000, logged=0)
    progress.add_loss(4.0, every=1000)
    assert progress.loss == 4.0
    progress.nimg = 1100
    progress.add_loss(2.0, every=1000)
    assert progress.loss == pytest.approx(0.9 * 4.0 + 0.1 * 2.0)
    progress.nimg = 2100
    progress.add_loss(3.0, every=1000)
    assert progress.loss == 3.0
    progress.add_loss(float("nan"), every=1000)
    assert progress.loss is None
