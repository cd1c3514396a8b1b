"""Resampling filters against scipy, and the fused convolutions against one step at a time."""

import numpy as np
import pytest
import torch
from scipy import signal
from torch.nn import functional as F

from dinogen.networks.layers import binomial, conv_down, conv_up, upfirdn, upsample


def reference(x, taps, up, down):
    """scipy's full convolution along both axes."""
    for axis in (2, 3):
        x = signal.upfirdn(taps, x, up=up, down=down, axis=axis)
    return x


@pytest.mark.parametrize("num_taps", [1, 4, 12])
@pytest.mark.parametrize("up, down", [(1, 1), (2, 1), (1, 2), (2, 2), (3, 2)])
def test_it_is_scipys_upfirdn(up, down, num_taps):
    rng = np.random.default_rng(0)
    x, taps = rng.normal(size=(2, 3, 7, 6)), rng.normal(size=num_taps)
    # scipy puts no zeros behind the last pixel
    padding = (num_taps - 1, num_taps - up)
    found = upfirdn(torch.from_numpy(x), torch.from_numpy(taps), up, down, padding)
    np.testing.assert_allclose(found.numpy(), reference(x, taps, up, down), atol=1e-12)


def test_upsampling_is_scipys_less_a_pixel_at_each_end():
    x = np.random.default_rng(0).normal(size=(1, 2, 5, 5))
    taps = np.array([1, 3, 3, 1]) / 4
    found = upsample(torch.from_numpy(x), binomial().double())
    full = reference(x, taps, 2, 1)
    np.testing.assert_allclose(found.numpy(), full[:, :, 1:-1, 1:-1], atol=1e-12)


def test_upsampling_keeps_brightness_and_place():
    x = torch.arange(8.0).expand(1, 1, 8, 8)
    found = upsample(x, binomial())[0, 0, 8]
    # pixel i becomes two, a quarter of a pixel to each side
    expected = (torch.arange(16) - 0.5) / 2
    torch.testing.assert_close(found[2:-2], expected[2:-2])


def test_conv_up_is_upsampling_and_then_a_convolution():
    torch.manual_seed(0)
    x, weight = torch.randn(2, 3, 6, 6).double(), torch.randn(5, 3, 3, 3).double()
    taps = binomial().double()
    found = conv_up(x, weight, taps)
    expected = F.conv2d(upsample(x, taps), weight, padding=1)
    assert found.shape == expected.shape == (2, 5, 12, 12)
    torch.testing.assert_close(found[:, :, 2:-2, 2:-2], expected[:, :, 2:-2, 2:-2])
    centre = torch.zeros(3, 3, 3, 3).double()
    centre[range(3), range(3), 1, 1] = 1
    torch.testing.assert_close(conv_up(x, centre, taps), upsample(x, taps))


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


def test_filters_are_differentiable_twice():
    x = torch.randn(1, 1, 4, 4, dtype=torch.float64, requires_grad=True)
    taps = binomial().double()
    assert torch.autograd.gradgradcheck(lambda x: upfirdn(x, taps, 2, 1, (2, 1)), (x,))
