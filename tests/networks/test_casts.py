"""Weights cast together: what autocast itself makes of them."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from dinogen.networks.casts import cast_together, conv
from dinogen.networks.layers import GroupNorm


def layers():
    torch.manual_seed(0)
    norm = GroupNorm(2, 4)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    return nn.ModuleList(
        [norm, nn.Conv2d(4, 6, 3, 2, 1), nn.Identity(), nn.Conv2d(6, 5, 1, bias=False)]
    )


def together(network, x):
    norm, first, _, second = network
    own = cast_together(*network)
    x = conv(first, norm.normalized(x, *own[0]), own[1])
    return conv(second, x, own[2])


@pytest.mark.parametrize("dtype", [torch.bfloat16, None])
def test_outputs_and_gradients_are_autocast_s_own(dtype):
    found = []
    for way in (together, lambda network, x: nn.Sequential(*network)(x)):
        network = layers()
        x = torch.randn(2, 4, 8, 8, dtype=dtype, requires_grad=True)
        with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
            y = way(network, x)
        y.float().square().sum().backward()
        found.append([y, x.grad, *(p.grad for p in network.parameters())])
    for own, expected in zip(*found, strict=True):
        assert torch.equal(own, expected) and own.dtype == expected.dtype


def test_outside_of_autocast_they_are_the_layers_own():
    norm, first, _, second = network = layers()
    own = cast_together(*network)
    assert own[0][0] is norm.weight and own[1][1] is first.bias
    assert own[2][0] is second.weight and own[2][1] is None


def test_layer_norms_without_a_bias_are_cast_too():
    norm = nn.LayerNorm(4, bias=False)
    with torch.autocast("cpu", torch.bfloat16):
        ((weight, bias),) = cast_together(norm)
    assert weight.dtype == torch.bfloat16 and bias is None


def test_all_are_cast_in_one_operator():
    network = layers()
    with torch.profiler.profile() as profile, torch.autocast("cpu", torch.bfloat16):
        cast_together(*network)
    names = [event.name for event in profile.events()]
    assert names.count("aten::_foreach_copy_") == 1 and "aten::_to_copy" not in names


def test_frozen_weights_get_no_gradient_and_others_do():
    network = layers()
    network[1].requires_grad_(False)
    x = torch.randn(2, 4, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        together(network, x).float().sum().backward()
    assert network[1].weight.grad is None and network[1].bias.grad is None
    assert network[0].weight.grad.abs().sum() > 0
    assert network[3].weight.grad.dtype == torch.float32


def test_a_weight_that_is_not_used_takes_no_part():
    network = layers()
    with torch.autocast("cpu", torch.bfloat16):
        weight, _ = cast_together(*network)[1]
    weight.sum().backward()
    assert torch.equal(network[1].weight.grad, torch.ones_like(network[1].weight))
    assert network[0].weight.grad is None and network[3].weight.grad is None


def test_it_is_differentiable_twice():
    conv2d = nn.Conv2d(3, 4, 3)
    x = torch.randn(2, 3, 5, 5, dtype=torch.bfloat16)
    seconds = []
    for own in (True, False):
        with torch.autocast("cpu", torch.bfloat16):
            y = conv(conv2d, x, cast_together(conv2d)[0]) if own else conv2d(x)
        loss = F.softplus(y).float().sum()
        (gradient,) = torch.autograd.grad(loss, conv2d.weight, create_graph=True)
        seconds.append(torch.autograd.grad(gradient.square().sum(), conv2d.weight)[0])
    torch.testing.assert_close(seconds[0], seconds[1])
