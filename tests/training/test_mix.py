"""Runs on a mix of two datasets: the config's key, the same numbers after a stop, the same data."""

from __future__ import annotations

import shutil
from fractions import Fraction

import pytest
import torch
import yaml

from dinogen.config import ConfigError, dump_config, parse_config
from dinogen.training.data import data_fingerprint, open_data
from dinogen.training.preflight import check_run
from dinogen.training.run import train
from dinogen.training.stop import Steps, Stopped
from shards import open_dataset, pack
from shards.read.mixture import MixedDataset
from tests.training.helpers import curve, weights


@pytest.fixture
def folders(data_folder, tmp_path):
    """The discs twice: all of them, and those of the second half in other shards."""
    data = open_dataset(data_folder)
    half = tmp_path / "half"
    samples = (data.sample(number) for number in range(20, 40))
    pack(samples, half, shard_size=6, guide=data.manifest.guide)
    return [data_folder, half]


@pytest.fixture
def mixed_config(make_config, folders):
    def make(*overrides, run="run", share=(0.7, 0.3), paths=folders):
        base = yaml.safe_load(dump_config(make_config(run=run)))
        mix = [{"path": str(p), "weight": w} for p, w in zip(paths, share, strict=True)]
        base["data"] |= {"path": "", "mix": mix}
        return parse_config(base, overrides)

    return make


def test_a_config_names_a_path_or_a_mix():
    mix = [{"path": "a", "weight": 0.1}, {"path": "b", "weight": 2}]
    config = parse_config({"data": {"mix": mix}})
    assert config.data.location == "a + b"
    again = parse_config(yaml.safe_load(dump_config(config)))
    assert again == config
    assert parse_config({"data": {"mix": mix}}, ["data.mix=[]", "data.path=c"]).data.path == "c"
    for data, words in [
        ({"path": "c", "mix": mix}, "path c and mix are both given: leave one of them out"),
        ({"mix": mix[:1]}, "mix: give two or more datasets"),
        ({"path": ""}, "path is empty"),
        ({"mix": [*mix, {"path": "d", "weight": 0}]}, "data.mix.2.weight"),
        ({"mix": [*mix, {"path": "d", "wieght": 1}]}, "did you mean 'weight'"),
        ({"mix": [*mix, {"path": "", "weight": 1}]}, "data.mix.2.path"),
    ]:
        with pytest.raises(ConfigError, match=words):
            parse_config({"data": data})


def test_the_data_of_a_mix(mixed_config, folders):
    data = open_data(mixed_config(share=(0.1, 0.2)))
    assert isinstance(data, MixedDataset)
    # a tenth and two tenths as they are written, not as floats hold them
    assert data.weights == (Fraction(1, 3), Fraction(2, 3))
    prints = {
        data_fingerprint(open_data(config))
        for config in (
            mixed_config(),
            mixed_config(share=(7, 3)),
            mixed_config(share=(0.6, 0.4)),
            mixed_config(paths=folders[::-1]),
        )
    }
    assert len(prints) == 3  # 7 to 3 are 0.7 to 0.3
    check_run(mixed_config(), [0, 1], open_data(mixed_config()))


def test_a_stopped_run_goes_on_as_if_it_had_not_been(mixed_config, monkeypatch, tmp_path, folders):
    whole = mixed_config(run="whole")
    train(whole)
    config = mixed_config(run="stopped")

    steps = []

    following = Steps.next

    def next_or_stop(self):
        steps.append(1)
        return None if len(steps) in (7, 20) else following(self)

    monkeypatch.setattr(Steps, "next", next_or_stop)
    for _ in range(2):
        with pytest.raises(Stopped):
            train(config)
    # elsewhere by now: what is shown hangs on what the shards hold
    moved = [shutil.copytree(folder, tmp_path / f"moved{i}") for i, folder in enumerate(folders)]
    config = mixed_config(run="stopped", paths=moved)
    train(config)
    for resolution in (4, 8):
        a, b = weights(config, resolution), weights(whole, resolution)
        assert [name for name in a if not torch.equal(a[name], b[name])] == []
        assert curve(config, resolution) == curve(whole, resolution)
    with pytest.raises(ConfigError, match="holds other shards than the checkpoint"):
        other = mixed_config(run="stopped", share=(0.6, 0.4))
        check_run(other, [0, 1], open_data(other))
