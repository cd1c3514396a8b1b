"""Attention and norms against torch's own, spectral norm against an SVD, minibatch std against
numpy."""

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from dinogen.networks import layers
from dinogen.networks.layers import (
    GroupNorm,
    InstanceNorm,
    SelfAttention,
    SpectralNorm,
    leaky_relu,
    minibatch_std,
    nearest_conv,
    spectral_norm,
    update_spectral_norms,
)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def test_attention_begins_as_the_identity():
    x = torch.randn(2, 16, 5, 6)
    assert torch.equal(SelfAttention(16)(x), x)


def test_attention_is_torch_s_own_without_its_scale():
    attention, x = SelfAttention(16), torch.randn(2, 16, 5, 6)
    attention.gamma.data.fill_(0.7)

    def tokens(layer):  # (B, places, channels)
        return layer(x).flatten(2).transpose(1, 2)

    attended = F.scaled_dot_product_attention(
        tokens(attention.query), tokens(attention.key), tokens(attention.value), scale=1.0
    )
    expected = attended @ attention.out.weight.flatten(1).T
    expected = x + 0.7 * expected.transpose(1, 2).reshape(x.shape)
    torch.testing.assert_close(attention(x), expected)


def test_attention_can_be_differentiated_twice():
    attention = SelfAttention(8)
    attention.gamma.data.fill_(0.5)
    x = torch.randn(2, 8, 4, 4, requires_grad=True)
    (gradient,) = torch.autograd.grad(attention(x).square().sum(), x, create_graph=True)
    gradient.square().sum().backward()
    assert all(p.grad.abs().max() > 0 for p in attention.parameters())


def test_attention_of_few_channels_has_some():
    assert SelfAttention(4)(torch.randn(1, 4, 2, 2)).shape == (1, 4, 2, 2)


@pytest.mark.parametrize(
    "layer", [nn.Linear(12, 7), nn.Conv2d(5, 9, 3), nn.Conv2d(3, 16, 1)], ids=["fc", "3x3", "1x1"]
)
def test_spectral_norm_is_that_of_an_svd(layer):
    layer = copy.deepcopy(layer)
    weight = layer.weight.detach().clone()
    spectral_norm(layer)
    for _ in range(300):
        update_spectral_norms(layer)
    sigma = torch.linalg.svdvals(weight.flatten(1))[0]
    torch.testing.assert_close(layer.weight, weight / sigma, rtol=1e-4, atol=1e-6)
    largest = torch.linalg.svdvals(layer.weight.flatten(1))[0]
    assert largest.item() == pytest.approx(1, abs=1e-4)


def test_a_normalised_map_is_1_lipschitz():
    layer = nn.Linear(20, 10)
    layer.weight.data.mul_(50)
    x, y = torch.randn(200, 20), torch.randn(200, 20)
    before = ((layer(x) - layer(y)).norm(dim=1) / (x - y).norm(dim=1)).max()
    spectral_norm(layer)
    for _ in range(300):
        update_spectral_norms(layer)
    ratio = (layer(x) - layer(y)).norm(dim=1) / (x - y).norm(dim=1)
    assert before > 5
    assert 0.5 < ratio.max() <= 1 + 1e-5


def test_at_the_start_it_is_15_iterations_near():
    rows, columns = torch.linalg.qr(torch.randn(8, 8))[0], torch.linalg.qr(torch.randn(30, 8))[0]
    weight = rows @ torch.diag(torch.tensor([5.0, 3, 2, 1, 1, 1, 1, 1])) @ columns.T
    # the wrong share shrinks by (3 / 5)^2 an iteration: 2e-7 after 15 of them
    torch.testing.assert_close(SpectralNorm(weight)(weight), weight / 5, rtol=1e-4, atol=1e-6)


def test_on_meta_nothing_is_iterated(monkeypatch):
    monkeypatch.setattr(layers, "iterate", None)
    layer = spectral_norm(nn.Conv2d(3, 8, 3, device="meta"))
    shapes = {name: tuple(tensor.shape) for name, tensor in layer.state_dict().items()}
    assert shapes == {
        "bias": (8,),
        "parametrizations.weight.original": (8, 3, 3, 3),
        "parametrizations.weight.0.u": (8,),
        "parametrizations.weight.0.v": (27,),
    }


def test_it_iterates_only_when_told():
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)).train()
    for layer in (network[0], network[2]):
        spectral_norm(layer)
    x = torch.randn(2, 3, 8, 8)
    first = network(x)
    buffers = {name: b.clone() for name, b in network.named_buffers()}
    assert len(buffers) == 4
    assert torch.equal(network(x), first) and torch.equal(network(x), first)
    assert all(torch.equal(b, buffers[name]) for name, b in network.named_buffers())
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    update_spectral_norms(network)
    assert not any(torch.equal(b, buffers[name]) for name, b in network.named_buffers())


def test_its_gradient_holds_u_and_v_fixed():
    layer = nn.Linear(6, 5, bias=False)
    spectral_norm(layer)
    original = layer.parametrizations.weight.original
    norm = layer.parametrizations.weight[0]
    upstream = torch.randn(5, 6)
    (layer.weight * upstream).sum().backward()
    # Miyato et al. 2018, equation 9 and what follows from sigma = u' W v
    W, sigma = original.detach(), (norm.u @ original.detach() @ norm.v)
    expected = (upstream - (upstream * W).sum() / sigma * torch.outer(norm.u, norm.v)) / sigma
    torch.testing.assert_close(original.grad, expected)


def test_it_is_saved_copied_and_loaded():
    a, b = spectral_norm(nn.Linear(6, 5)), spectral_norm(nn.Linear(6, 5))
    x = torch.randn(3, 6)
    assert not torch.allclose(a(x), b(x))
    b.load_state_dict(a.state_dict())
    assert torch.equal(a(x), b(x))
    assert torch.equal(a(x), copy.deepcopy(a)(x))


def test_it_stays_in_float32_under_autocast():
    layer = spectral_norm(nn.Linear(6, 5))
    expected = layer.weight.clone()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer.weight, expected)


def std_by_hand(x, group_size):
    """Over samples of a group, per feature and place, then one mean."""
    found = []
    for first in range(0, len(x), group_size):
        group = x[first : first + group_size].numpy()
        found += [np.sqrt(group.var(axis=0) + 1e-8).mean()] * len(group)
    return torch.tensor(found)


@pytest.mark.parametrize(("batch", "group_size"), [(8, 4), (8, 8), (6, 4), (3, 4), (1, 4), (4, 1)])
def test_minibatch_std_by_hand(batch, group_size):
    x = torch.randn(batch, 5, 4, 4) * torch.arange(1, batch + 1)[:, None, None, None]
    got = minibatch_std(x, group_size)
    assert torch.equal(got[:, :5], x)
    expected = std_by_hand(x, group_size)[:, None, None].expand(-1, 4, 4)
    torch.testing.assert_close(got[:, 5], expected.float())


def test_groups_do_not_depend_on_ranks_with_whole_groups():
    x = torch.randn(12, 5, 4, 4)
    shares = torch.cat([minibatch_std(x[:4], 4), minibatch_std(x[4:], 4)])
    torch.testing.assert_close(shares, minibatch_std(x, 4))


@pytest.mark.parametrize("size", [8, 6, 3])
def test_minibatch_std_mixes_no_two_batches(size):
    batches = torch.randn(2, size, 3, 4, 4)
    apart = torch.cat([minibatch_std(batch, 4) for batch in batches])
    torch.testing.assert_close(minibatch_std(batches.flatten(0, 1), 4, num_batches=2), apart)


def test_alike_samples_have_finite_gradients():
    x = torch.ones(4, 2, 4, 4, requires_grad=True)
    minibatch_std(x, 4).sum().backward()
    assert torch.isfinite(x.grad).all()


def test_all_weights_are_iterated_as_each_alone():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Linear(5, 7))
    expected = []
    for layer in network:
        spectral_norm(layer)
        (norm,) = layer.parametrizations.weight
        norm.u.copy_(F.normalize(torch.randn_like(norm.u), dim=0))
        matrix = layer.parametrizations.weight.original.detach().flatten(1)
        v = F.normalize(matrix.T @ norm.u, dim=0)
        expected.append((F.normalize(matrix @ v, dim=0), v))
    update_spectral_norms(network)
    for layer, pair in zip(network, expected, strict=True):
        (norm,) = layer.parametrizations.weight
        torch.testing.assert_close((norm.u, norm.v), pair)


def test_group_norm_keeps_the_type_under_autocast():
    norm, x = GroupNorm(2, 8), torch.randn(2, 8, 4, 4)
    with torch.autocast("cpu", torch.bfloat16):
        found = norm(x.bfloat16())
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), F.group_norm(x, 2), rtol=0.02, atol=0.02)
    assert torch.equal(norm(x), F.group_norm(x, 2, norm.weight, norm.bias))


def disturbed_instance_norm():
    torch.manual_seed(0)
    norm = InstanceNorm(3).double()
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    return norm, torch.randn(2, 3, 3, 4).double().requires_grad_()


def test_instance_norm_is_twice_differentiable():
    norm, x = disturbed_instance_norm()
    assert torch.autograd.gradcheck(norm, (x,))
    assert torch.autograd.gradgradcheck(norm, (x,), check_undefined_grad=False)


def test_instance_norm_and_its_derivatives_are_torch_s():
    ours, x = disturbed_instance_norm()
    theirs = nn.InstanceNorm2d(3, affine=True).double()
    theirs.load_state_dict(ours.state_dict())
    found = []
    for norm in (ours, theirs):
        own = x.detach().requires_grad_()
        y = norm(own)
        (first,) = torch.autograd.grad(y.pow(3).sum(), own, create_graph=True)
        (first.square().sum() + y.sum()).backward()
        found.append((y.detach(), first.detach(), own.grad, norm.weight.grad, norm.bias.grad))
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("bias", [None, torch.randn(5).double()])
def test_nearest_conv_is_a_convolution_of_the_nearest_upsample(bias):
    torch.manual_seed(0)
    x = torch.randn(2, 3, 3, 4).double().requires_grad_()
    weight = torch.randn(5, 3, 3, 3).double().requires_grad_()
    expected = F.conv2d(F.interpolate(x, scale_factor=2.0), weight, bias, padding=1)
    torch.testing.assert_close(nearest_conv(x, weight, bias), expected)
    assert torch.autograd.gradgradcheck(nearest_conv, (x[:1, :, :2, :2], weight[:2]))


def test_the_gradient_through_a_spectral_norm_is_that_of_its_formula():
    torch.manual_seed(0)
    weight = torch.randn(4, 3, 2, 2).double().requires_grad_()
    norm = SpectralNorm(weight)
    expected = weight / torch.einsum("i,ij,j->", norm.u, weight.flatten(1), norm.v)
    found = norm(weight)
    torch.testing.assert_close(found, expected)
    other = torch.randn(4, 3, 2, 2).double()
    first, second = (torch.autograd.grad((y * other).sum(), weight) for y in (found, expected))
    torch.testing.assert_close(first, second)


def test_leaky_relu_and_its_derivatives_are_torch_s():
    torch.manual_seed(0)
    assert torch.autograd.gradgradcheck(
        lambda x: leaky_relu(x, 0.2).square(), torch.randn(5).double().requires_grad_()
    )
    found = []
    for function in (leaky_relu, F.leaky_relu):
        torch.manual_seed(0)
        conv = nn.Conv2d(3, 4, 3)
        x = torch.randn(2, 3, 6, 6, requires_grad=True)
        y = function(conv(function(x, 0.2)), 0.2)
        (first,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        (first.square().sum() + y.square().sum()).backward()
        found.append((y, first, x.grad, conv.weight.grad, conv.bias.grad))
    torch.testing.assert_close(*found)


def test_attention_keeps_the_type_of_its_input_under_autocast():
    attention = SelfAttention(16)
    with torch.autocast("cpu", torch.bfloat16):
        assert attention(torch.randn(2, 16, 4, 4, dtype=torch.bfloat16)).dtype == torch.bfloat16
