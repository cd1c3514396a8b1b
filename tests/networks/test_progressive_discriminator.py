"""The growing discriminator: exact fade-in, mirrored widths, and which parameters are in use."""

import pytest
import torch
from torch.nn import functional as F

from dinogen.config import ConfigError
from dinogen.networks.progressive import ProgressiveDiscriminator, ProgressiveGenerator
from dinogen.training.checkpointing.transfer import grow


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def small(resolution, **options):
    return ProgressiveDiscriminator(resolution, channel_base=128, channel_max=16, **options)


@pytest.mark.parametrize("resolution", [4, 8, 16, 256])
def test_one_logit_per_image(resolution):
    assert small(resolution)(torch.randn(3, 3, resolution, resolution)).shape == (3,)


@pytest.mark.parametrize("resolution", [0, 2, 12])
def test_a_resolution_that_is_no_power_of_two_is_refused(resolution):
    with pytest.raises(ValueError, match=str(resolution)):
        small(resolution)


@pytest.mark.parametrize("resolution", [8, 16, 32])
def test_alpha_0_is_exactly_the_stage_before_on_the_shrunk_image(resolution):
    before, grown = small(resolution // 2), small(resolution)
    grow(grown, before.state_dict(), grown.new_parameters(), ConfigError)
    images = torch.randn(4, 3, resolution, resolution)
    expected = before(F.avg_pool2d(images, 2))
    assert not torch.allclose(grown(images), expected, atol=1e-3)
    grown.set_fade(0.0, fading=True)
    assert torch.equal(grown(images), expected)


def test_alpha_1_is_exactly_the_grown_network_and_between_is_between():
    # no value after the blend is negative here, so a blend of features is one of logits
    D, images = small(8, group_size=1).double(), torch.randn(4, 3, 8, 8, dtype=torch.float64)
    D.conv.bias.data.fill_(1e3)
    D.dense.weight.data.abs_()
    new = D(images)
    D.set_fade(1.0, fading=True)
    torch.testing.assert_close(D(images), new, rtol=1e-5, atol=1e-3)
    D.set_fade(0.0, fading=True)
    old = D(images)
    D.set_fade(0.25, fading=True)
    torch.testing.assert_close(D(images) - old, 0.25 * (new - old), rtol=1e-3, atol=1e-3)


def test_every_parameter_in_use_gets_a_gradient():
    D, images = small(16), torch.randn(2, 3, 16, 16)
    D(images).sum().backward()
    without = {name for name, p in D.named_parameters() if p.grad is None}
    assert without == D.old_from_rgb() == {"from_rgb.8.weight", "from_rgb.8.bias"}
    D.set_fade(0.5, fading=True)
    D(images).sum().backward()
    assert all(p.grad is not None for p in D.parameters())


def test_new_is_what_the_stage_before_did_not_have():
    before, grown = small(16), small(32)
    names = {name for name, _ in before.named_parameters()}
    assert {name for name, _ in grown.named_parameters()} - names == grown.new_parameters()
    assert small(4).old_from_rgb() == set()


def test_it_mirrors_the_generator():
    G, D = ProgressiveGenerator(256), ProgressiveDiscriminator(256)
    up = {size: (b.conv0.in_channels, b.conv0.out_channels) for size, b in G.blocks.items()}
    down = {size: (b.conv1.out_channels, b.conv1.in_channels) for size, b in D.blocks.items()}
    assert up == down
    assert list(down) == ["256", "128", "64", "32", "16", "8"]


def test_it_sees_whether_its_group_differs():
    D = small(8, group_size=4)
    one = torch.randn(1, 3, 8, 8)
    alike, mixed = one.expand(4, -1, -1, -1), torch.cat([one, torch.randn(3, 3, 8, 8)])
    assert (D(alike)[0] - D(mixed)[0]).abs() > 1e-4
    # and not beyond its group
    torch.testing.assert_close(D(torch.cat([mixed, alike]))[:4], D(mixed))
