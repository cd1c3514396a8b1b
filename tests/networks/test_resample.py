"""Resampling filters against scipy, and the fused convolutions against one step at a time."""

import numpy as np
import pytest
import torch
from scipy import signal
from torch.nn import functional as F

from dinogen.networks.layers import binomial, conv_down, conv_up, filter_down, filter_up, upsample


def reference(x, taps, up, down):
    """scipy's full convolution along both axes."""
    for axis in (2, 3):
        x = signal.upfirdn(taps, x, up=up, down=down, axis=axis)
    return x


@pytest.mark.parametrize("num_taps", [1, 4, 12])
@pytest.mark.parametrize("down", [1, 2, 3])
@pytest.mark.parametrize("cropped", [0, 1])
def test_filters_are_scipys_upfirdn(down, num_taps, cropped):
    rng = np.random.default_rng(0)
    x, taps = rng.normal(size=(2, 3, 7, 6)), rng.normal(size=num_taps)
    kernel = torch.from_numpy(np.outer(taps, taps))
    found = filter_down(torch.from_numpy(x), kernel.flip(0, 1), down, num_taps - 1)
    np.testing.assert_allclose(found.numpy(), reference(x, taps, 1, down), atol=1e-12)
    # scipy puts no zeros behind the last pixel
    full = reference(x, taps, down, 1)[:, :, cropped:, cropped:]
    size = (full.shape[2] - cropped, full.shape[3] - cropped)
    found = filter_up(torch.from_numpy(x), kernel, down, cropped, size)
    np.testing.assert_allclose(found.numpy(), full[:, :, : size[0], : size[1]], atol=1e-12)


def test_upsampling_is_scipys_less_a_pixel_at_each_end():
    x = np.random.default_rng(0).normal(size=(1, 2, 5, 5))
    taps = np.array([1, 3, 3, 1]) / 4
    found = upsample(torch.from_numpy(x), 4 * binomial().double())
    full = reference(x, taps, 2, 1)
    np.testing.assert_allclose(found.numpy(), full[:, :, 1:-1, 1:-1], atol=1e-12)


def test_upsampling_keeps_brightness_and_place():
    x = torch.arange(8.0).expand(1, 1, 8, 8)
    found = upsample(x, 4 * binomial())[0, 0, 8]
    # pixel i becomes two, a quarter of a pixel to each side
    expected = (torch.arange(16) - 0.5) / 2
    torch.testing.assert_close(found[2:-2], expected[2:-2])


def test_conv_up_is_upsampling_and_then_a_convolution():
    torch.manual_seed(0)
    x, weight = torch.randn(2, 3, 6, 6).double(), torch.randn(5, 3, 3, 3).double()
    kernel = 4 * binomial().double()
    found = conv_up(x, weight, kernel)
    expected = F.conv2d(upsample(x, kernel), weight, padding=1)
    assert found.shape == expected.shape == (2, 5, 12, 12)
    torch.testing.assert_close(found[:, :, 2:-2, 2:-2], expected[:, :, 2:-2, 2:-2])
    centre = torch.zeros(3, 3, 3, 3).double()
    centre[range(3), range(3), 1, 1] = 1
    torch.testing.assert_close(conv_up(x, centre, kernel), upsample(x, kernel))


@pytest.mark.parametrize("size", [1, 3])
def test_conv_down_is_a_filter_and_then_a_strided_convolution(size):
    torch.manual_seed(0)
    x, weight = torch.randn(2, 3, 8, 8).double(), torch.randn(5, 3, size, size).double()
    found = conv_down(x, weight, binomial().double())
    filtered = torch.from_numpy(reference(x.numpy(), np.array([1, 3, 3, 1]) / 8, 1, 1))
    # centred: what is left lies between the second and third pixel of the filter's four
    part = slice(1, 10) if size == 3 else slice(2, 9)
    expected = F.conv2d(filtered[:, :, part, part], weight, stride=2)
    assert found.shape == (2, 5, 4, 4)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("up, padding", [(1, 0), (1, 1), (2, 1), (2, 3)])
def test_filters_are_differentiable_twice(up, padding):
    torch.manual_seed(0)
    x = torch.randn(2, 2, 4, 3, dtype=torch.float64, requires_grad=True)
    kernel = torch.randn(4, 4, dtype=torch.float64)
    sides = [up * (side - 1) + 4 - 2 * padding for side in x.shape[2:]]

    def raised(x):
        return filter_up(x, kernel, up, padding, sides)

    def lowered(x):
        return filter_down(x, kernel, up, padding)

    for function in (raised, lowered) if padding else (raised,):
        assert torch.autograd.gradcheck(function, (x,))
        assert torch.autograd.gradgradcheck(function, (x,))


def test_second_derivatives_are_those_of_a_grouped_convolution():
    torch.manual_seed(0)
    x, kernel = torch.randn(2, 3, 6, 6).double(), torch.randn(4, 4).double()
    grouped = kernel.expand(3, 1, -1, -1)
    found = []
    for down in (
        lambda x: filter_down(x, kernel, 2, 1),
        lambda x: F.conv2d(x, grouped, stride=2, padding=1, groups=3),
    ):
        x = x.detach().requires_grad_()
        (first,) = torch.autograd.grad(down(x).square().sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(first.pow(3).sum(), x)
        found.append((first.detach(), second))
    torch.testing.assert_close(*found)
