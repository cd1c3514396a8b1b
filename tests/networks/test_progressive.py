"""The progressive generator: shapes, exact fade-in, and which parameters train."""

import pytest
import torch
from torch.nn import functional as F

from dinogen.config import ConfigError
from dinogen.networks.progressive import ProgressiveGenerator
from dinogen.training.checkpointing.transfer import grow


def small(resolution):
    return ProgressiveGenerator(resolution, z_dim=16, channel_base=128, channel_max=16)


@pytest.mark.parametrize("resolution", [4, 8, 16, 256])
def test_images_have_the_resolution_and_lie_in_range(resolution):
    images = small(resolution)(10 * torch.randn(2, 16))
    assert images.shape == (2, 3, resolution, resolution)
    assert images.abs().max() <= 1


@pytest.mark.parametrize("resolution", [0, 2, 12])
def test_a_resolution_that_is_no_power_of_two_is_refused(resolution):
    with pytest.raises(ValueError, match=str(resolution)):
        small(resolution)


@pytest.mark.parametrize("resolution", [8, 16, 32])
def test_alpha_0_is_exactly_the_upsampled_stage_before(resolution):
    torch.manual_seed(0)
    before, grown = small(resolution // 2), small(resolution)
    grow(grown, before.state_dict(), grown.new_parameters(), ConfigError)
    grown.set_fade(0.0, fading=True)
    z = torch.randn(4, 16)
    expected = F.interpolate(before(z), scale_factor=2, mode="nearest")
    assert torch.equal(grown(z), expected)


def test_alpha_1_is_exactly_the_grown_network_and_between_blends_before_tanh():
    torch.manual_seed(0)
    G = small(8).double()
    z = torch.randn(4, 16, dtype=torch.float64)
    new = G(z)
    G.set_fade(1.0, fading=True)
    assert torch.equal(G(z), new)
    G.set_fade(0.0, fading=True)
    old = G(z)
    G.set_fade(0.25, fading=True)
    blend = 0.75 * torch.atanh(old) + 0.25 * torch.atanh(new)
    torch.testing.assert_close(torch.atanh(G(z)), blend)


def test_every_parameter_in_use_gets_a_gradient():
    G = small(16)
    G(torch.randn(2, 16)).square().sum().backward()
    without = {name for name, p in G.named_parameters() if p.grad is None}
    assert without == G.old_to_rgb() == {"to_rgb.8.weight", "to_rgb.8.bias"}


def test_a_stage_of_other_width_is_refused_by_name():
    grown = small(8)
    state = ProgressiveGenerator(4, z_dim=8, channel_base=128, channel_max=16).state_dict()
    with pytest.raises(ConfigError, match=r"dense\.weight"):
        grow(grown, state, grown.new_parameters(), ConfigError)


def test_width_follows_base_and_max():
    G = ProgressiveGenerator(256)
    outputs = {size: block.conv1.out_channels for size, block in G.blocks.items()}
    assert outputs == {"8": 512, "16": 512, "32": 512, "64": 256, "128": 128, "256": 64}
