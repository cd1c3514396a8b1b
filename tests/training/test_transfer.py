"""Weights to start from: of a run, of an exported file, of other sizes."""

import logging

import pytest
import torch

from dinogen.config import ConfigError
from dinogen.training.checkpointing.export import export
from dinogen.training.run import train
from dinogen.training.state import StageState
from tests.families.tiny import pack_discs, tiny_config


@pytest.fixture
def data(tmp_path):
    pack_discs(tmp_path / "data")
    return tmp_path / "data"


@pytest.fixture
def learnt(data, tmp_path):
    config = tiny_config("dcgan", data, tmp_path / "learnt", "stages.0.lr=0.01")
    train(config)
    return StageState(config, 0)


def begin(data, tmp_path, source, *overrides):
    run = tmp_path / "new"
    return StageState(tiny_config("dcgan", data, run, f"init_from={source}", *overrides), 0)


def same(a, b):
    a, b = a.state_dict(), b.state_dict()
    return all(torch.equal(a[name], b[name]) for name in a)


def test_of_a_run_every_network_and_average(data, tmp_path, learnt):
    state = begin(data, tmp_path, learnt.config.run)
    for name, network in state.family.networks.items():
        assert same(network, learnt.family.networks[name])
    assert same(state.ema.networks["G"], learnt.ema.networks["G"])
    assert not same(state.ema.networks["G"], state.family.networks["G"])
    assert state.progress.nimg == 0


def test_of_an_exported_file_what_it_holds(data, tmp_path, learnt, caplog):
    path = tmp_path / "G.safetensors"
    export(learnt.config.run, path)
    with caplog.at_level(logging.INFO, "dinogen"):
        state = begin(data, tmp_path, path)
    assert same(state.family.networks["G"], learnt.ema.networks["G"])
    assert not same(state.family.networks["D"], learnt.family.networks["D"])
    assert "0 of" in caplog.text


def test_what_does_not_fit_is_listed_and_left(data, tmp_path, learnt, caplog):
    caplog.set_level(logging.INFO, "dinogen")
    state = begin(data, tmp_path, learnt.config.run, "family.z_dim=5")
    first = next(k for k, v in state.family.networks["G"].state_dict().items() if 5 in v.shape)
    assert f"{first} (of another shape)" in caplog.text
    assert same(state.family.networks["D"], learnt.family.networks["D"])


def test_a_resumed_run_goes_on_from_its_own(data, tmp_path, learnt):
    config = tiny_config("dcgan", data, tmp_path / "new", f"init_from={learnt.config.run}")
    train(config)
    assert not same(StageState(config, 0).family.networks["G"], learnt.family.networks["G"])


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("nowhere", "neither a run .* nor a file.*`dinogen import`"),
        ("data/manifest.json", "cannot be read as safetensors.*`dinogen import`"),
    ],
)
def test_bad_sources_are_said(data, tmp_path, source, message):
    with pytest.raises(ConfigError, match=f"init_from: .*{message}"):
        begin(data, tmp_path, tmp_path / source)


def test_another_family_altogether_is_refused(data, tmp_path, learnt):
    config = tiny_config("ddpm", data, tmp_path / "new", f"init_from={learnt.config.run}")
    with pytest.raises(ConfigError, match=r"nothing in .* fits the networks"):
        StageState(config, 0)
