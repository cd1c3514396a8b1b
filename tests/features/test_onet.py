"""The O-Net guide against facenet-pytorch's own forward, and its sizes, gradients and errors."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from dinogen.config import GuideConfig
from dinogen.features import Guide, GuideError, load_guide, pooled_pyramid
from dinogen.features.load import layer_channels
from dinogen.features.onet import LAYERS

CPU = torch.device("cpu")


def guide_of(**changes):
    return load_guide(GuideConfig(name="onet", **changes), CPU)


@pytest.mark.parametrize("layer", list(LAYERS))
def test_a_map_is_the_detectors_own_averaged_to_the_grid(layer):
    guide = guide_of(layer=layer)
    seen = {}
    module = {"conv4": "prelu4", "pool3": "pool3"}.get(layer, layer.replace("conv", "prelu"))
    getattr(guide.net, module).register_forward_hook(lambda m, i, o: seen.update(map=o))
    images = torch.randint(
        0, 256, (2, 3, 48, 48), generator=torch.Generator().manual_seed(0)
    ).float()
    found = guide(images / 127.5 - 1)
    guide.net((images - 127.5) / 128)  # as the detector calls it, for crops of this size
    assert found.shape == (2, guide.info.num_channels, 14, 14)
    assert guide.input_size(14) == 48 and guide.info.num_channels == LAYERS[layer]
    torch.testing.assert_close(found, F.adaptive_avg_pool2d(seen["map"], 14))


def test_several_layers_are_concatenated_in_their_order():
    names = ("pool3", "conv1")
    guide = guide_of(layer=names)
    images = torch.rand(1, 3, guide.input_size(4), guide.input_size(4)) * 2 - 1
    parts = torch.cat([guide_of(layer=name)(images) for name in names], 1)
    torch.testing.assert_close(guide(images), parts)
    assert layer_channels(GuideConfig(name="onet", layer=names)) == (64, 32)
    assert guide.info.num_channels == 96


@pytest.mark.parametrize("grid", [4, 8, 16])
def test_it_is_frozen_and_differentiable_at_every_grid(grid):
    guide = guide_of(layer=tuple(LAYERS))
    side = guide.input_size(grid)
    images = torch.rand(1, 3, side, side, requires_grad=True)
    features = guide.train()(images)
    assert features.shape == (1, sum(LAYERS.values()), grid, grid)
    features.square().sum().backward()
    assert images.grad is not None and images.grad.abs().sum() > 0
    assert not any(weight.requires_grad for weight in guide.parameters())
    assert isinstance(guide, Guide)


def test_the_pyramid_is_made_of_exact_means():
    guide = guide_of(layer=("conv1", "conv4"))
    levels = pooled_pyramid(guide, torch.rand(1, 3, 32, 32) * 2 - 1)
    fine = levels[16].reshape(1, 8, 2, 8, 2, -1)
    torch.testing.assert_close(levels[8].reshape(1, 8, 8, -1), fine.mean((2, 4)))


def test_other_layers_and_sizes_are_refused():
    with pytest.raises(GuideError, match=r"guide\.layer: conv9: .* conv1, conv2"):
        guide_of(layer="conv9")
    with pytest.raises(ValueError, match="2 \\* grid \\+ 20 pixels, not 48x47"):
        guide_of()(torch.zeros(1, 3, 48, 47))
    with pytest.raises(ValueError, match="grids of 4 or more, not 2"):
        guide_of().input_size(2)
