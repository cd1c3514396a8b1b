"""Convolutions with short second derivatives, against torch's own and finite differences."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from dinogen.networks.convolution import conv2d, conv_transpose2d

CASES = [(1, 1, 0), (3, 1, 1), (3, 2, 0), (4, 2, 1)]


def made(transposed, kernel):
    torch.manual_seed(0)
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64, requires_grad=True)
    shape = (3, 2) if transposed else (2, 3)
    weight = torch.randn(*shape, kernel, kernel, dtype=torch.float64, requires_grad=True)
    return x, weight


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("kernel", "stride", "padding"), CASES)
def test_derivatives_of_three_orders_are_torchs(transposed, kernel, stride, padding):
    ours, theirs = (conv_transpose2d, F.conv_transpose2d) if transposed else (conv2d, F.conv2d)
    x, weight = made(transposed, kernel)
    found = []
    for function in (ours, theirs):
        y = function(x, weight, stride=stride, padding=padding)
        values = [y]
        for _ in range(3):
            # squares: each derivative depends on both again
            total = sum(value.pow(2).sum() for value in values[-2:])
            values += torch.autograd.grad(total, [x, weight], create_graph=True)
        found.append(values)
    for mine, its in zip(*found, strict=True):
        torch.testing.assert_close(mine, its)


@pytest.mark.parametrize("transposed", [False, True])
def test_second_derivatives_are_those_of_finite_differences(transposed):
    function = conv_transpose2d if transposed else conv2d
    x, weight = made(transposed, 3)
    assert torch.autograd.gradgradcheck(lambda a, b: function(a, b, 2, 1), (x, weight))


def test_it_follows_autocast_and_gives_gradients_in_the_type_of_the_weight():
    x, weight = torch.randn(2, 3, 6, 6), torch.randn(4, 3, 3, 3, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = conv2d(x, weight, padding=1)
        expected = F.conv2d(x, weight, padding=1)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, expected)
    y.float().sum().backward()
    assert weight.grad is not None
    assert weight.grad.dtype == torch.float32
