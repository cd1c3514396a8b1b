"""Losses of autoencoders against torch.distributions, numpy and arithmetic by hand."""

import math

import numpy as np
import pytest
import torch
from torch.distributions import Independent, Normal, kl_divergence

from dinogen.losses.features import (
    kl_to_standard_normal,
    perceptual_distance,
    psnr,
    reparameterize,
    squared_error,
)


def posterior(num=5, latent=7):
    torch.manual_seed(0)
    return torch.randn(num, latent), 2 * torch.randn(num, latent)


def test_kl_and_its_gradient_are_those_of_torch_distributions():
    mean, log_variance = (x.requires_grad_() for x in posterior())
    kl = kl_to_standard_normal(mean, log_variance)
    gradients = torch.autograd.grad(kl.sum(), (mean, log_variance))
    q = Independent(Normal(mean, (0.5 * log_variance).exp()), 1)
    p = Independent(Normal(torch.zeros(7), torch.ones(7)), 1)
    expected = kl_divergence(q, p)
    assert kl.shape == (5,)
    torch.testing.assert_close(kl, expected)
    for got, want in zip(
        gradients, torch.autograd.grad(expected.sum(), (mean, log_variance)), strict=True
    ):
        torch.testing.assert_close(got, want)


def test_kl_near_the_prior_is_not_lost_to_rounding():
    log_variance = torch.full((1, 4), 1e-3)
    exact = 4 * 0.5 * (math.expm1(1e-3) - 1e-3)
    kl = kl_to_standard_normal(torch.zeros(1, 4), log_variance)
    assert kl.item() == pytest.approx(exact, rel=1e-3)
    assert kl_to_standard_normal(torch.zeros(1, 4), torch.zeros(1, 4)).item() == 0


def test_reparameterized_draws_are_those_of_the_posterior():
    mean, log_variance = torch.tensor([[1.5, -2.0]]), torch.tensor([[0.6, -1.0]])
    noise = torch.randn(100_000, 2, generator=torch.Generator().manual_seed(0))
    z = reparameterize(mean, log_variance, noise)
    torch.testing.assert_close(z.mean(0), mean[0], atol=0.02, rtol=0)
    torch.testing.assert_close(z.var(0).log(), log_variance[0], atol=0.02, rtol=0)
    # and a draw moves with the posterior
    torch.testing.assert_close(reparameterize(mean, log_variance, noise[:1] * 0), mean)


def test_squared_error_is_the_likelihood_of_unit_variance_up_to_a_constant():
    rng = np.random.default_rng(0)
    a, b, c = (torch.from_numpy(rng.normal(size=(4, 3, 5, 5))) for _ in range(3))
    error = squared_error(a, b)
    np.testing.assert_allclose(error, ((a - b) ** 2).numpy().sum((1, 2, 3)), rtol=1e-6)
    likelihood = [Normal(x, 1.0).log_prob(b).sum((1, 2, 3)) for x in (a, c)]
    torch.testing.assert_close(
        0.5 * (squared_error(c, b) - error), (likelihood[0] - likelihood[1]).float()
    )


def test_perceptual_distance_counts_each_map_alike():
    rng = np.random.default_rng(1)
    shapes = [(2, 4, 8, 8), (2, 16, 4, 4), (2, 3, 2, 2)]
    a, b = ([rng.normal(size=shape) for shape in shapes] for _ in range(2))
    expected = sum(((x - y) ** 2).mean((1, 2, 3)) for x, y in zip(a, b, strict=True))
    got = perceptual_distance(*([torch.from_numpy(x) for x in maps] for maps in (a, b)))
    np.testing.assert_allclose(got, expected, rtol=1e-6)


def test_psnr_is_skimage_s():
    from skimage.metrics import peak_signal_noise_ratio

    rng = np.random.default_rng(2)
    a, b = rng.uniform(-1, 1, (2, 3, 8, 8, 3))
    got = psnr(torch.from_numpy(((a - b) ** 2).mean((1, 2, 3))))
    expected = [peak_signal_noise_ratio(x, y, data_range=2) for x, y in zip(a, b, strict=True)]
    np.testing.assert_allclose(got, expected)
