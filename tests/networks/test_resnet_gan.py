"""The residual pair of WGAN-GP and SAGAN: shapes, which norm does what, where attention sits."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from dinogen.losses.adversarial import gradient_penalty
from dinogen.networks.layers import SelfAttention, update_spectral_norms
from dinogen.networks.resnet_gan import ResnetCritic, ResnetGenerator


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def generator(resolution=16, **options):
    return ResnetGenerator(resolution, z_dim=7, channels=4, channel_max=16, **options)


def critic(resolution=16, **options):
    return ResnetCritic(resolution, channels=4, channel_max=16, **options)


@pytest.mark.parametrize("resolution", [8, 16, 64, 128])
@pytest.mark.parametrize("norms", [("batch", "instance"), ("group", "spectral")])
def test_images_and_scores_have_their_shapes(resolution, norms):
    attention = () if norms[0] == "batch" else (8,)
    G = generator(resolution, norm=norms[0], attention=attention)
    images = G(10 * torch.randn(2, 7))
    assert images.shape == (2, 3, resolution, resolution)
    assert images.dtype == torch.float32 and images.abs().max() <= 1
    assert critic(resolution, norm=norms[1], attention=attention)(images).shape == (2,)


@pytest.mark.parametrize("resolution", [4, 12, 0])
def test_a_resolution_that_is_no_power_of_two_is_refused(resolution):
    for make in (generator, critic):
        with pytest.raises(ValueError, match=str(resolution)):
            make(resolution)


@pytest.mark.parametrize("attention", [(32,), (8, 12)])
def test_attention_where_no_map_is_is_refused(attention):
    for make in (generator, critic):
        with pytest.raises(ValueError, match="attention"):
            make(16, attention=attention)


def sizes_of_attention(network, x):
    """Sides of the maps that reach self-attention, in the order in which they do."""
    found = []
    for module in network.modules():
        if isinstance(module, SelfAttention):
            module.register_forward_hook(lambda _m, _args, out: found.append(out.shape[-1]))
    network(x)
    return found


@pytest.mark.parametrize("attention", [(16,), (16, 32), (4, 8), (64,)])
def test_attention_is_at_the_sizes_asked_for(attention):
    up = sizes_of_attention(generator(64, attention=attention), torch.randn(2, 7))
    down = sizes_of_attention(critic(64, attention=attention), torch.randn(2, 3, 64, 64))
    assert up == sorted(attention) and down == sorted(attention, reverse=True)


def test_at_gamma_0_attention_leaves_the_networks_as_they_were():
    for network, x in ((generator(attention=(8,)), 7), (critic(attention=(8,)), (3, 16, 16))):
        x = torch.randn(3, *((x,) if isinstance(x, int) else x))
        before = network(x)
        for module in network.modules():
            if isinstance(module, SelfAttention):
                for conv in (module.query, module.key, module.value, module.out):
                    nn.init.normal_(conv.weight)
        assert torch.equal(network(x), before)
        for module in network.modules():
            if isinstance(module, SelfAttention):
                nn.init.ones_(module.gamma)
        assert not torch.allclose(network(x), before, atol=1e-4)


def test_batch_norm_mixes_samples_and_group_norm_does_not():
    z = torch.randn(6, 7)
    for norm in ("batch", "group"):
        G = generator(norm=norm).train()
        alike = torch.allclose(G(z)[:2], G(z[:2]), atol=1e-5)
        assert alike == (norm == "group")


def test_groups_are_of_neighbouring_channels_however_odd_the_width():
    for channels in (1, 5, 24, 64):
        G = ResnetGenerator(8, z_dim=3, channels=channels, norm="group")
        assert G.norm.num_channels % G.norm.num_groups == 0
    assert G.norm.num_groups == 4


@pytest.mark.parametrize("norm", ["instance", "spectral"])
def test_a_score_is_a_matter_of_its_own_image(norm):
    D, images = critic(norm=norm, attention=(8,)).train(), torch.randn(5, 3, 16, 16)
    torch.testing.assert_close(D(images)[:2], D(images[:2]))


@pytest.mark.parametrize("norm", ["instance", "spectral"])
def test_the_gradient_penalty_reaches_every_weight(norm):
    D = critic(norm=norm, attention=(8,))
    for module in D.modules():
        if isinstance(module, SelfAttention):
            nn.init.ones_(module.gamma)
    real, fake = torch.randn(3, 3, 16, 16), torch.randn(3, 3, 16, 16)
    (gradient_penalty(D, real, fake, torch.rand(3, 1, 1, 1)) + D(real).mean()).backward()
    for name, parameter in D.named_parameters():
        assert torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.abs().max() > 0, name


def test_all_convolutions_of_the_spectral_critic_have_norm_1_and_the_last_map_is_free():
    D = critic(norm="spectral", attention=(8,))
    convolutions = [m for m in D.modules() if isinstance(m, nn.Conv2d)]
    assert all(parametrize.is_parametrized(m, "weight") for m in convolutions)
    assert not parametrize.is_parametrized(D.linear)
    with torch.no_grad():
        for parameter in D.parameters():
            parameter.add_(torch.randn_like(parameter))
    for _ in range(300):
        update_spectral_norms(D)
    for m in convolutions:
        largest = torch.linalg.svdvals(m.weight.flatten(1))[0].item()
        assert largest == pytest.approx(1, abs=2e-2)


def test_no_spectral_norm_where_none_was_asked_for():
    D = critic(norm="instance")
    assert not any(parametrize.is_parametrized(m) for m in D.modules())


def test_channels_follow_width_and_limit():
    G = ResnetGenerator(64)
    assert [b.conv1.out_channels for b in G.layers] == [512, 256, 128, 64]
    D = ResnetCritic(64)
    assert [b.conv1.out_channels for b in D.layers] == [128, 256, 512, 512]


@pytest.mark.parametrize("norm", ["instance", "spectral"])
def test_a_critic_begins_neither_flat_nor_steep(norm):
    """So that the gradient penalty does not begin with thousands of steps of rescaling."""
    D = ResnetCritic(32, channels=16, norm=norm)
    images = torch.rand(4, 3, 32, 32) * 2 - 1
    images.requires_grad_()
    (gradient,) = torch.autograd.grad(D(images).sum(), images)
    slopes = gradient.flatten(1).norm(dim=1)
    assert slopes.min() > 0.02
    assert slopes.max() < 20
