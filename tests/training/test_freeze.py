"""Freeze-D: layers of a discriminator keep the weights of init_from, in every family with one."""

import pytest
import torch

from dinogen.config import ConfigError, parse_config
from dinogen.families.abilities import OrdersLayers, trained_parameters
from dinogen.training.data import open_data
from dinogen.training.preflight import check_run
from dinogen.training.run import train
from dinogen.training.state import StageState
from tests.families.tiny import pack_discs, tiny_config
from tests.training.helpers import weights

# with the number of layers that come before the last
FAMILIES = {
    "dcgan": 2,
    "wgan_gp": 6,
    "sagan": 9,
    "progressive_gan": 7,
    "stylegan2_ada": 7,
    "vae_gan": 2,
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("freeze") / "data"
    pack_discs(folder)
    return folder


def learnt(family, data, tmp_path):
    config = tiny_config(family, data, tmp_path / "learnt", "stages.0.kimg=0.008")
    train(config)
    return config


def frozen(family, data, tmp_path, num, *overrides):
    source = tmp_path / "learnt"
    return tiny_config(
        family, data, tmp_path / "new", f"init_from={source}", f"freeze={{D: {num}}}", *overrides
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_frozen_layers_keep_their_weights_and_the_others_learn(data, tmp_path, family):
    before = weights(learnt(family, data, tmp_path), 16)
    num = FAMILIES[family] // 2 + 1
    config = frozen(family, data, tmp_path, num)
    train(config)
    after = weights(config, 16)
    state = StageState(config, 0)
    assert isinstance(state.family, OrdersLayers)
    layers = state.family.layers("D")
    assert len(layers) == FAMILIES[family]
    kept = set().union(*layers[:num])
    for name, _ in state.family.networks["D"].named_parameters():
        same = torch.equal(before[f"D/{name}"], after[f"D/{name}"])
        trains = name in state.family.trainable("D") and name not in kept
        # a constant that is added to all logits moves no image
        assert same != trains or not before[f"D/{name}"].any(), name
    moments = {key.split("/")[2] for key in after if key.startswith("optim/D/")}
    assert not moments & kept


@pytest.mark.parametrize("family", FAMILIES)
def test_the_first_layer_reads_the_image(data, tmp_path, family):
    state = StageState(tiny_config(family, data, tmp_path / "run"), 0)
    D = dict(state.family.networks["D"].named_parameters())
    widths = {D[name].shape[1] for name in state.family.layers("D")[0] if D[name].dim() == 4}
    assert widths == {3}


def test_layers_of_stylegan2_are_counted_as_by_its_authors(data, tmp_path):
    """FromRGB, and in each block two convolutions and the skip; 4x4 always trains."""
    state = StageState(tiny_config("stylegan2_ada", data, tmp_path / "run"), 0)
    assert [sorted(one)[-1] for one in state.family.layers("D")] == [
        "from_rgb.weight",
        *(f"blocks.{i}.{name}.weight" for i in (0, 1) for name in ("conv0", "conv1", "skip")),
    ]
    assert not state.family.layers("G")


def test_without_freeze_all_train(data, tmp_path):
    state = StageState(tiny_config("stylegan2_ada", data, tmp_path / "run"), 0)
    for name in ("G", "D"):
        assert trained_parameters(state.family, name, {}) == state.family.trainable(name)


@pytest.mark.parametrize(
    ("family", "freeze", "message"),
    [
        ("stylegan2_ada", "{D: 8}", r"freeze\.D: 8 layers, but D .* has 7 that can be frozen"),
        ("stylegan2_ada", "{G: 1}", r"freeze\.G: the layers of G .* have no order"),
        ("stylegan2_ada", "{E: 1}", r"freeze: there is no network E: the family's are G, D"),
        ("ddpm", "{D: 1}", r"freeze: there is no network D: the family's are"),
        ("vae", "{D: 1}", r"freeze: there is no network D"),
    ],
)
def test_what_cannot_be_frozen_is_said_before_the_first_step(
    data, tmp_path, family, freeze, message
):
    config = tiny_config(family, data, tmp_path / "run", "init_from=x", f"freeze={freeze}")
    with pytest.raises(ConfigError, match=message):
        check_run(config, [0], open_data(config))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({}, "freeze: without init_from"),
        ({"init_from": "x", "stages": [{"resolution": r, "kimg": 1} for r in (4, 8)]}, "one stage"),
        ({"init_from": "x", "freeze": {"D": -1}}, r"freeze\.D"),
    ],
)
def test_configs_in_which_frozen_layers_would_be_untrained_are_refused(more, message):
    with pytest.raises(ConfigError, match=message):
        parse_config({"family": {"name": "stylegan2_ada"}, "freeze": {"D": 2}} | more)


def test_a_resumed_run_cannot_freeze_otherwise(data, tmp_path):
    learnt("dcgan", data, tmp_path)
    train(frozen("dcgan", data, tmp_path, 1))
    with pytest.raises(ConfigError, match="freeze"):
        train(frozen("dcgan", data, tmp_path, 2))
