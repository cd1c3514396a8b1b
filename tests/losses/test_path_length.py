"""Path lengths against the Jacobian of a linear generator."""

import math

import numpy as np
import torch

from dinogen.losses.adversarial import path_lengths


def linear(num_layers=1, w_dim=5, size=6):
    rng = np.random.default_rng(0)
    return torch.from_numpy(rng.normal(size=(num_layers, 3 * size * size, w_dim)))


def random_images(J, ws):
    return torch.einsum("lpw,blw->bp", J, ws).unflatten(1, (3, 6, 6))


def test_of_a_linear_generator_it_is_the_jacobian_seen_along_y():
    J = linear()
    ws = torch.randn(4, 1, 5, dtype=torch.float64, requires_grad=True)
    y = torch.randn(4, 3, 6, 6, dtype=torch.float64)
    found = path_lengths(random_images(J, ws), ws, y)
    expected = np.linalg.norm(y.flatten(1).numpy() @ J[0].numpy(), axis=1) / math.sqrt(36)
    np.testing.assert_allclose(found.detach(), expected)


def test_its_mean_square_is_the_frobenius_norm():
    J = linear()
    ws = torch.randn(5000, 1, 5, dtype=torch.float64, requires_grad=True)
    y = torch.randn(5000, 3, 6, 6, generator=torch.Generator().manual_seed(0)).double()
    found = path_lengths(random_images(J, ws), ws, y)
    assert math.isclose(found.square().mean(), J.square().sum() / 36, rel_tol=0.05)


def test_over_layers_it_is_the_root_mean_square():
    J = linear(3)
    ws = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    y = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    found = path_lengths(random_images(J, ws), ws, y)
    each = torch.einsum("lpw,bp->blw", J, y.flatten(1)).norm(dim=2) / 6
    torch.testing.assert_close(found.detach(), each.square().mean(1).sqrt())


def test_it_is_differentiable():
    J = linear().requires_grad_()
    y = torch.randn(2, 3, 6, 6, dtype=torch.float64)

    def mean_length(J):
        ws = torch.ones(2, 1, 5, dtype=torch.float64, requires_grad=True)
        return path_lengths(random_images(J, ws), ws, y).mean()

    assert torch.autograd.gradcheck(mean_length, (J,))
