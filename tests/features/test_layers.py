"""Lists of layers, the pixels guide and the base grid, against the networks' own intermediates."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from dinogen.config import GuideConfig, parse_config
from dinogen.errors import ConfigError
from dinogen.features import (
    Guide,
    GuideError,
    GuideInfo,
    base_grid_of,
    load_guide,
    native_pyramid,
    pooled_pyramid,
    same_guide,
)
from dinogen.features.inception import LAYERS, InceptionTrunk
from dinogen.features.pyramid import to_guide

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def inception_file(tmp_path_factory):
    """Random weights of the whole trunk."""
    torch.manual_seed(0)
    file = tmp_path_factory.mktemp("inception") / "weights.safetensors"
    save_file(InceptionTrunk().state_dict(), file)
    return file


def inception(file, layer=-1):
    return load_guide(GuideConfig(name="inception", path=str(file), layer=layer), CPU)


def random_images(side, num=2):
    generator = torch.Generator().manual_seed(side)
    return torch.rand(num, 3, side, side, generator=generator) * 2 - 1


def averaged(features, grid):
    """Means over the bins floor(i n / g) to ceil((i + 1) n / g), by loops."""
    side = features.shape[-1]
    edges = [(i * side // grid, -(-(i + 1) * side // grid)) for i in range(grid)]
    rows = [
        torch.stack([features[..., a:b, c:d].mean((2, 3)) for c, d in edges], -1) for a, b in edges
    ]
    return torch.stack(rows, -2)


def test_inception_layers_are_the_inputs_of_what_follows_them(inception_file):
    """In the whole network: what enters 3b, 5b and 6a are the pools and Mixed_5d."""
    whole = inception(inception_file)
    seen = {}
    followers = {"pool1": "Conv2d_3b_1x1", "pool2": "Mixed_5b", "mixed_5d": "Mixed_6a"}
    for layer, follower in followers.items():
        getattr(whole.trunk, follower).register_forward_pre_hook(
            lambda module, given, layer=layer: seen.update({layer: given[0]})
        )
    images = random_images(91)
    seen["mixed_6e"] = whole(images)
    for layers in (["pool1"], ["mixed_5d", "pool2"], ["pool2", "mixed_6e", "pool1", "mixed_5d"]):
        guide = inception(inception_file, tuple(layers))
        assert isinstance(guide, Guide) and guide.input_size(4) == 91
        expected = torch.cat([averaged(seen[layer], 4) for layer in layers], 1)
        found = guide(images)
        assert found.shape[1] == guide.info.num_channels == sum(LAYERS[x] for x in layers)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_early_inception_layers_need_only_what_comes_before_them(inception_file, tmp_path):
    stored = load_file(inception_file)
    early = {name: t for name, t in stored.items() if name.startswith("Conv2d_")}
    save_file(early, tmp_path / "early.safetensors")
    guide = inception(tmp_path / "early.safetensors", ("pool1", "pool2"))
    assert {name.partition(".")[0] for name in guide.trunk.state_dict()} == {
        name.partition(".")[0] for name in early
    }
    images = random_images(91, 1).requires_grad_()
    assert torch.equal(guide(images), inception(inception_file, ("pool1", "pool2"))(images))
    (gradient,) = torch.autograd.grad(guide(images).square().sum(), images)
    assert gradient.abs().sum() > 0
    with pytest.raises(GuideError, match=r"Mixed_5b"):
        inception(tmp_path / "early.safetensors")


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        (-1, "mixed_6e", True),
        (-1, ("mixed_6e",), True),
        ("pool2", ("pool2",), True),
        (-1, "mixed_5d", False),
        (("pool1", "pool2"), ("pool1", "pool2"), True),
        (("pool1", "pool2"), ("pool2", "pool1"), False),
        (("pool1", "mixed_6e"), -1, False),
    ],
)
def test_layers_are_the_same_guide_however_they_are_written(inception_file, one, other, same):
    described = json.loads(json.dumps(inception(inception_file, one).info.to_dict()))
    info = inception(inception_file, other).info
    assert same_guide(described, info) == same
    assert GuideInfo(**described).to_dict() == described


@pytest.mark.parametrize("layer", [3, "pool3", ("pool1", "Mixed_6e")])
def test_layers_that_inception_lacks_are_refused(inception_file, layer):
    with pytest.raises(GuideError, match=r"guide\.layer: .*pool1, pool2, mixed_5d, mixed_6e"):
        inception(inception_file, layer)


@pytest.mark.parametrize("layers", [(1, 3), (3, 2), (-2, 1)])
def test_blocks_of_dinov2_are_joined_each_behind_the_norm(checkpoint, layers):
    import transformers

    config = transformers.AutoConfig.from_pretrained(checkpoint)
    registers = getattr(config, "num_register_tokens", 0)
    cls = transformers.Dinov2WithRegistersModel if registers else transformers.Dinov2Model
    model = cls.from_pretrained(checkpoint, attn_implementation="eager").eval()
    guide = load_guide(GuideConfig(path=str(checkpoint), layer=layers), CPU)
    images = random_images(42)
    pixels = images * guide.scale + guide.shift
    with torch.no_grad():
        hidden = model(pixel_values=pixels, output_hidden_states=True).hidden_states
        maps = [
            model.layernorm(hidden[layer if layer > 0 else 4 + layer])[:, 1 + registers :]
            for layer in layers
        ]
    expected = torch.cat([m.transpose(1, 2).reshape(2, -1, 3, 3) for m in maps], 1)
    found = guide(images)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert guide.info.num_channels == found.shape[1] == 2 * 32
    counted = [layer if layer > 0 else 4 + layer for layer in layers]
    assert guide.info.layer == counted and len(guide.model.encoder.layer) == max(counted)


def test_one_block_in_a_list_is_that_block(checkpoint):
    alone = load_guide(GuideConfig(path=str(checkpoint), layer=(2,)), CPU)
    plain = load_guide(GuideConfig(path=str(checkpoint), layer=2), CPU)
    assert alone.info == plain.info and alone.info.layer == 2
    assert torch.equal(alone(random_images(28)), plain(random_images(28)))


@pytest.mark.parametrize("layer", [(1, 4), (0,), "pool1", (3, -1)])
def test_blocks_that_dinov2_lacks_are_refused(checkpoint, layer):
    with pytest.raises(GuideError, match=r"guide\.layer: "):
        load_guide(GuideConfig(path=str(checkpoint), layer=layer), CPU)


def test_pixels_are_the_image_itself():
    guide = load_guide(GuideConfig(name="pixels"), CPU)
    assert isinstance(guide, Guide)
    assert guide.info.num_channels == 3 and not guide.info.random
    images = random_images(32)
    native = native_pyramid(guide, images, (8, 4))
    for grid, level in native.items():
        side = 32 // grid
        for place in range(grid * grid):
            row, column = place // grid * side, place % grid * side
            block = images[..., row : row + side, column : column + side]
            torch.testing.assert_close(level[:, place], block.mean((2, 3)))
    small = random_images(8).requires_grad_()
    (gradient,) = torch.autograd.grad(native_pyramid(guide, small, (8,))[8].sum(), small)
    assert torch.equal(gradient, torch.ones_like(small))
    pooled = pooled_pyramid(guide, random_images(16), (16, 4))
    torch.testing.assert_close(pooled[16].transpose(1, 2).reshape(2, 3, 16, 16), random_images(16))
    other = load_guide(GuideConfig(name="pixels", path="elsewhere"), CPU)
    assert same_guide(other.info.to_dict(), guide.info)
    with pytest.raises(GuideError, match=r"guide\.layer: 1: pixels have no layers"):
        load_guide(GuideConfig(name="pixels", layer=1), CPU)


def test_pooled_from_another_base_is_means_of_that_grid(patch_guide):
    images = random_images(64)
    levels = pooled_pyramid(patch_guide, images, (4, 8), base_grid=8)
    base = patch_guide(to_guide(images, 40)).numpy().astype(np.float64)
    means = base.reshape(2, 6, 4, 2, 4, 2).mean((3, 5))
    for grid, expected in ((8, base), (4, means)):
        found = levels[grid].transpose(1, 2).reshape(2, 6, grid, grid)
        np.testing.assert_allclose(found, expected, atol=1e-6)
    assert not torch.allclose(levels[4], pooled_pyramid(patch_guide, images, (4,))[4])
    with pytest.raises(ValueError, match=r"pooled grids \[16\]: .*\[8, 4, 2, 1\]"):
        pooled_pyramid(patch_guide, images, (16,), base_grid=8)


def test_what_a_manifest_does_not_say_is_16():
    assert base_grid_of({"pyramids": {"base_grid": 8, "grids": [8]}}) == 8
    assert [base_grid_of(old) for old in ({}, {"pyramids": {"grids": [4]}})] == [16, 16]


def test_the_config_takes_a_number_a_name_or_a_list():
    for given, wanted in [
        (11, 11),
        ("pool1", "pool1"),
        ([3, -1], (3, -1)),
        (["pool1", "mixed_5d"], ("pool1", "mixed_5d")),
    ]:
        config = parse_config({"guides": {"a_1": {"layer": given}}})
        assert config.guides["a_1"].layer == wanted
        assert parse_config(config.model_dump(mode="json")) == config
    overrides = ["guide.layer=[1, 2]", "guides.pixels.name=pixels", "clip.path=here"]
    config = parse_config({}, overrides)
    assert config.guide.layer == (1, 2) and config.guides["pixels"].name == "pixels"
    assert config.clip is not None and config.clip.path == "here"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"guide": {"layer": 1.5}}, r"guide\.layer: 1\.5: give a number, a name, or a list"),
        ({"guide": {"layer": [1, "pool1"]}}, r"guide\.layer: \[1, 'pool1'\]: give"),
        ({"guide": {"layer": []}}, r"guide\.layer: \[\]: give"),
        ({"guide": {"layer": [1, 1]}}, r"guide\.layer: \[1, 1\]: name each layer once"),
        ({"guides": {"Pixels": {}}}, r"guides: 'Pixels' cannot be the name of a guide"),
        ({"guides": {"clip": {}}}, r"guides: 'clip' cannot be the name of a guide"),
        ({"guides": {"a": {"pth": 1}}}, r"unknown key 'guides\.a\.pth': did you mean 'path'"),
        (
            {"prepare": {"pyramids": {"base_grid": 8}}},
            r"grids: 16 is not a pooled grid: use 8, 4, 2",
        ),
    ],
)
def test_what_no_config_can_mean_is_refused(given, message):
    with pytest.raises(ConfigError, match=message):
        parse_config(given)
