"""Channels told from the config alone, against those of the guides that it loads."""

import pytest
import torch
from safetensors.torch import save_file

from dinogen.config import GuideConfig
from dinogen.features.base import GuideError
from dinogen.features.dinov2 import make_random_dinov2
from dinogen.features.inception import InceptionTrunk
from dinogen.features.layers import layer_channels
from dinogen.features.load import load_guide

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def dinov2(tmp_path_factory):
    folder = tmp_path_factory.mktemp("guides") / "dinov2"
    make_random_dinov2(folder, seed=0, hidden_size=24, num_layers=3, num_heads=2, image_size=28)
    return folder


@pytest.mark.parametrize("layer", [-1, 2, (1, 3)])
def test_of_dinov2_each_layer_has_the_hidden_size(layer, dinov2):
    config = GuideConfig(path=str(dinov2), layer=layer)
    channels = layer_channels(config)
    assert channels == (24,) * (len(layer) if isinstance(layer, tuple) else 1)
    guide = load_guide(config, CPU)
    assert sum(channels) == guide.info.num_channels
    assert guide(torch.zeros(1, 3, 28, 28)).shape[1] == sum(channels)


def test_joined_layers_split_into_those_of_one_layer_each(dinov2):
    images = torch.randn(2, 3, 28, 28, generator=torch.Generator().manual_seed(0))
    config = GuideConfig(path=str(dinov2), layer=(1, 3))
    parts = load_guide(config, CPU)(images).split(layer_channels(config), 1)
    for layer, part in zip((1, 3), parts, strict=True):
        alone = load_guide(GuideConfig(path=str(dinov2), layer=layer), CPU)(images)
        torch.testing.assert_close(part, alone)


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("facebook/dinov2-small", 384),
        ("facebook/dinov2-base", 768),
        ("facebook/dinov2-with-registers-large", 1024),
        ("facebook/dinov2-giant", 1536),
    ],
)
def test_of_published_ones_the_name_says_it(name, size, monkeypatch):
    monkeypatch.setattr("dinogen.features.layers.checkpoint_folder", None)
    assert layer_channels(GuideConfig(path=name, layer=(3, 6, 9))) == (size,) * 3


def test_of_inception_each_layer_has_its_own(tmp_path):
    trunk = InceptionTrunk("mixed_5d")
    save_file(
        {k: torch.zeros_like(v) for k, v in trunk.state_dict().items()}, tmp_path / "w.safetensors"
    )
    config = GuideConfig(name="inception", path=str(tmp_path), layer=("pool2", "mixed_5d", "pool1"))
    channels = layer_channels(config)
    assert channels == (192, 288, 64)
    assert sum(channels) == load_guide(config, CPU).info.num_channels
    assert layer_channels(GuideConfig(name="inception")) == (768,)


def test_of_pixels_three():
    assert layer_channels(GuideConfig(name="pixels")) == (3,)


def test_what_cannot_be_known_is_a_clear_error(tmp_path):
    with pytest.raises(GuideError, match=r"guide\.layer: mixed_7z: .*pool1, pool2"):
        layer_channels(GuideConfig(name="inception", layer="mixed_7z"))
    with pytest.raises(GuideError, match=r"guide\.path: .* lacks config\.json"):
        layer_channels(GuideConfig(path=str(tmp_path)))
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(GuideError, match=r"guide\.path: .* is damaged"):
        layer_channels(GuideConfig(path=str(tmp_path)))
