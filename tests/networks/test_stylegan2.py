"""StyleGAN2's layers: scaled weights, the mapping network, modulated convolutions."""

import math

import pytest
import torch
from torch.nn import functional as F

from dinogen.networks.layers import binomial, upsample
from dinogen.networks.stylegan2 import generator
from dinogen.networks.stylegan2.generator import ModulatedConv
from dinogen.networks.stylegan2.layers import (
    CLAMP,
    Conv,
    Dense,
    Mapping,
    activate,
    follows_autocast,
)


def test_a_dense_layer_by_hand():
    torch.manual_seed(0)
    layer = Dense(5, 3, bias=2.0, lr_scale=0.01, active=True)
    x = torch.randn(4, 5)
    plain = x @ (layer.weight.detach().T * 0.01 / math.sqrt(5)) + 2
    expected = torch.where(plain > 0, plain, 0.2 * plain) * math.sqrt(2)
    torch.testing.assert_close(layer(x).detach(), expected)


def test_a_step_of_adam_moves_the_output_as_much_as_the_layer_s_scale_says():
    moved = []
    x = torch.randn(64, 256, generator=torch.Generator().manual_seed(1))
    for scale in (1.0, 0.01):
        torch.manual_seed(0)
        layer = Dense(256, 8, lr_scale=scale)
        optimizer = torch.optim.Adam(layer.parameters(), lr=0.01)
        before = layer(x).detach()
        (before - layer(x)[:, :1]).square().sum().backward()
        optimizer.step()
        moved.append((layer(x) - before).abs().mean().item())
    assert math.isclose(moved[1], 0.01 * moved[0], rel_tol=0.05)


def test_every_layer_keeps_the_variance():
    torch.manual_seed(0)
    x = torch.randn(16, 64, 8, 8)
    for layer in (Conv(64, 64, 3), Conv(64, 64, 1)):
        assert abs(layer(x)[:, :, 1:-1, 1:-1].square().mean() - 1) < 0.1
    flat = torch.randn(256, 64)
    assert abs(Dense(64, 64, active=True)(flat).square().mean() - 1) < 0.1
    assert abs(Dense(64, 64, lr_scale=0.01)(flat).square().mean() - 1) < 0.1


def test_activations_are_clamped():
    x = torch.tensor([-1e6, -1.0, 1.0, 1e6]).view(1, 1, 2, 2)
    expected = torch.tensor([-256, -0.2 * math.sqrt(2), math.sqrt(2), 256]).view(1, 1, 2, 2)
    torch.testing.assert_close(activate(x, torch.zeros(1)), expected)
    assert activate(x.half(), torch.zeros(1)).dtype == torch.float16


def test_the_mapping_network_sees_only_the_direction_of_z():
    torch.manual_seed(0)
    mapping = Mapping(8, 6, 2)
    z = torch.randn(4, 8)
    torch.testing.assert_close(mapping(z), mapping(3 * z), rtol=1e-4, atol=1e-5)
    x = z / z.square().mean(1, keepdim=True).sqrt()
    for layer in mapping.layers:
        x = F.leaky_relu(x @ layer.weight.T * 0.01 / math.sqrt(x.shape[1]), 0.2) * math.sqrt(2)
    torch.testing.assert_close(mapping(z), x)


def test_labels_change_w_and_stand_alone_without_z():
    torch.manual_seed(0)
    z, label = torch.randn(3, 8), torch.tensor([0, 1, 2])
    mapping = Mapping(8, 6, 2, num_classes=3)
    rows = mapping(z[:1].expand(3, -1), label)
    assert torch.pdist(rows).min() > 1e-2
    assert Mapping(0, 6, 2, num_classes=3)(None, label).shape == (3, 6)


def modulated_by_loop(layer, x, w):
    """One plain convolution per sample, with its own kernel: equations 1 and 3 of the paper."""
    styles = w @ layer.affine.weight.T / math.sqrt(w.shape[1]) + layer.affine.bias
    outputs = []
    for sample, style in zip(x, styles, strict=True):
        kernel = layer.weight / math.sqrt(layer.weight[0].numel()) * style[None, :, None, None]
        if layer.demodulate:
            kernel = kernel / kernel.square().sum((1, 2, 3), keepdim=True).sqrt()
        sample = upsample(sample[None], 4 * binomial()) if layer.up else sample[None]
        outputs.append(F.conv2d(sample, kernel, padding=kernel.shape[2] // 2))
    return torch.cat(outputs)


@pytest.mark.parametrize("demodulate", [True, False])
@pytest.mark.parametrize("size, up", [(3, False), (3, True), (1, False)])
def test_a_modulated_convolution_is_a_loop_over_samples(size, up, demodulate):
    torch.manual_seed(0)
    layer = ModulatedConv(6, 5, size, w_dim=4, up=up, demodulate=demodulate)
    x, w = torch.randn(3, 6, 8, 8), torch.randn(3, 4)
    found, expected = layer(x, w), modulated_by_loop(layer, x, w)
    assert found.shape == expected.shape
    inner = slice(2, -2)  # at the border the filter comes before or after the padding
    torch.testing.assert_close(
        found[:, :, inner, inner], expected[:, :, inner, inner], rtol=1e-4, atol=1e-5
    )
    # and so are their gradients: what is cancelled by demodulation has none
    wanted = torch.autograd.grad(expected[:, :, inner, inner].square().sum(), layer.affine.weight)
    got = torch.autograd.grad(found[:, :, inner, inner].square().sum(), layer.affine.weight)
    torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-3)


def test_no_size_of_weights_or_styles_leaves_the_range_of_half_precision():
    torch.manual_seed(0)
    layer = ModulatedConv(64, 8, 3, w_dim=4)
    x, w = torch.randn(2, 64, 8, 8), torch.randn(2, 4)
    before = layer(x, w)
    with torch.no_grad():
        layer.weight.mul_(1e6)
        layer.affine.weight.mul_(1e6)
        layer.affine.bias.mul_(1e6)
        with torch.autocast("cpu", torch.float16):
            half = layer(x.half(), w)
    assert half.dtype == torch.float16
    torch.testing.assert_close(layer(x, w), before, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(half.float(), before, rtol=0.02, atol=0.02)


def test_which_resolutions_follow_autocast():
    chosen = {
        n: [s for s in (4, 8, 16, 32, 64, 128, 256) if follows_autocast(s, 256, n)]
        for n in (0, 1, 4, 9)
    }
    assert chosen == {
        0: [],
        1: [256],
        4: [32, 64, 128, 256],
        9: [8, 16, 32, 64, 128, 256],
    }


@pytest.mark.parametrize("gain", [1.0, math.sqrt(2)])
def test_the_activation_and_its_derivatives_are_those_of_single_operations(gain):
    torch.manual_seed(0)
    x, bias = 200 * torch.randn(2, 3, 4, 4).double(), 100 * torch.randn(3).double()
    limit = CLAMP * gain / math.sqrt(2)

    def single(x, bias):
        return (F.leaky_relu(x + bias[:, None, None], 0.2) * gain).clamp(-limit, limit)

    found = []
    for function in (lambda x, bias: activate(x, bias, gain), single):
        own = [x.detach().requires_grad_(), bias.detach().requires_grad_()]
        y = function(*own)
        first = torch.autograd.grad(y.pow(3).sum(), own, create_graph=True)
        second = torch.autograd.grad(sum(one.pow(2).sum() for one in first), own)
        found.append((y.detach(), *(one.detach() for one in first), *second))
    torch.testing.assert_close(*found)
    assert 0 < (found[0][0].abs() == limit).double().mean() < 1


@pytest.mark.parametrize("up", [False, True])
def test_what_keeps_float16_in_range_cancels(monkeypatch, up):
    torch.manual_seed(0)
    conv = ModulatedConv(5, 6, 3, 4, up)
    x, w = torch.randn(2, 5, 4, 4), torch.randn(2, 4)
    plain = conv(x, w)
    monkeypatch.setattr(generator, "in_float16", lambda device: True)
    torch.testing.assert_close(conv(x, w), plain, rtol=1e-4, atol=1e-5)
