"""EDM against diffusers' schedulers, and against what Karras et al. derive their factors from."""

import math

import pytest
import torch

from dinogen._torchvision import ensure_torchvision
from dinogen.diffusion.edm import drawn_sigma, factors, share_done, target, walk_sigmas
from dinogen.diffusion.ode import integrate

ensure_torchvision()
from diffusers import EDMEulerScheduler, HeunDiscreteScheduler  # noqa: E402 - torchvision first

WALK = (0.002, 80.0, 7.0)
SIGMAS = [0.002, 0.1, 0.5, 3.0, 80.0]


def drawn(seed):
    return torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(seed))


def network(x, c_noise):
    """A stand-in for F."""
    return torch.sin(2 * x) + 0.3 * x + c_noise.cos()


def derivative(x, sigma, data=0.5):
    c_in, c_noise, c_skip, c_out = factors(torch.tensor(sigma), data)
    return (x - (c_skip * x + c_out * network(c_in * x, c_noise))) / sigma


@pytest.mark.parametrize("num_steps", [2, 5, 18, 40])
def test_sigmas_are_those_of_diffusers(num_steps):
    scheduler = EDMEulerScheduler()
    scheduler.set_timesteps(num_steps)
    torch.testing.assert_close(torch.tensor(walk_sigmas(num_steps, *WALK)), scheduler.sigmas)


def test_one_step_goes_from_the_noisiest_to_images():
    assert walk_sigmas(1, *WALK) == pytest.approx([80.0, 0.0])


@pytest.mark.parametrize("sigma", SIGMAS)
@pytest.mark.parametrize("data", [0.5, 1.0])
def test_factors_are_those_of_diffusers(sigma, data):
    scheduler = EDMEulerScheduler(sigma_data=data)
    x, said, at = drawn(0), drawn(1), torch.tensor(sigma)
    c_in, c_noise, c_skip, c_out = factors(at, data)
    torch.testing.assert_close(c_in * x, scheduler.precondition_inputs(x, at))
    torch.testing.assert_close(c_noise, scheduler.precondition_noise(at))
    expected = scheduler.precondition_outputs(x, said, at)
    torch.testing.assert_close(c_skip * x + c_out * said, expected)


@pytest.mark.parametrize("num_steps", [2, 5, 18])
def test_euler_walks_as_diffusers(num_steps):
    scheduler = EDMEulerScheduler()
    scheduler.set_timesteps(num_steps)
    x = 80 * drawn(0)
    for t in scheduler.timesteps:
        said = network(scheduler.scale_model_input(x, t), t)
        x = scheduler.step(said, t, x).prev_sample
    found = integrate(derivative, 80 * drawn(0), walk_sigmas(num_steps, *WALK), "euler")
    torch.testing.assert_close(found, x, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("num_steps", [2, 5, 18])
def test_heun_walks_as_diffusers(num_steps):
    sigmas = torch.tensor(walk_sigmas(num_steps, *WALK))
    scheduler = HeunDiscreteScheduler(prediction_type="sample")
    scheduler.set_timesteps(num_steps)
    # theirs derives the ends from betas, and visits all but the first and the last twice
    scheduler.sigmas = torch.cat([sigmas[:1], sigmas[1:-1].repeat_interleave(2), sigmas[-1:]])
    scheduler.set_begin_index(0)
    x = 80 * drawn(0)
    for number, t in enumerate(scheduler.timesteps):
        sigma = float(sigmas[(number + 1) // 2])
        x = scheduler.step(x - sigma * derivative(x, sigma), t, x).prev_sample
    found = integrate(derivative, 80 * drawn(0), sigmas.tolist(), "heun")
    torch.testing.assert_close(found, x, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("sigma", SIGMAS)
@pytest.mark.parametrize("data", [0.5, 1.0])
def test_input_and_target_have_unit_variance_and_weight_one(sigma, data):
    """Appendix B.6, equations 114 to 138, with Var(x0) = data^2 and independent noise."""
    c_in, _, c_skip, c_out = (
        float(one) for one in factors(torch.tensor(sigma, dtype=torch.float64), data)
    )
    assert c_in**2 * (data**2 + sigma**2) == pytest.approx(1)

    def target_variance(skip, out):
        return ((1 - skip) ** 2 * data**2 + skip**2 * sigma**2) / out**2

    assert target_variance(c_skip, c_out) == pytest.approx(1)
    # the share of x that leaves the least for the network to add
    others = [c_skip + step for step in (-0.01, 0.01)]
    assert all(target_variance(other, 1) > c_out**2 for other in others)
    weight = (sigma**2 + data**2) / (sigma * data) ** 2
    assert weight * c_out**2 == pytest.approx(1)


@pytest.mark.parametrize("sigma", SIGMAS)
def test_an_error_of_the_network_weighs_as_the_weighted_error_of_the_image(sigma):
    x0, eps, said, at = 0.5 * drawn(0), drawn(1), drawn(2), torch.tensor(sigma)
    x = x0 + sigma * eps
    _, _, c_skip, c_out = factors(at, 0.5)
    weight = (sigma**2 + 0.5**2) / (sigma * 0.5) ** 2
    of_image = weight * (c_skip * x + c_out * said - x0).square().mean()
    of_network = (said - target(x0, x, c_skip, c_out)).square().mean()
    torch.testing.assert_close(of_network, of_image, rtol=1e-3, atol=1e-4)


def test_sigmas_of_training_are_log_normal():
    normal = torch.randn(20_000, generator=torch.Generator().manual_seed(0))
    logs = drawn_sigma(normal, -1.2, 1.2).log()
    assert float(logs.mean()) == pytest.approx(-1.2, abs=0.03)
    assert float(logs.std()) == pytest.approx(1.2, abs=0.03)


def test_the_share_of_the_walk_is_even_over_its_steps():
    sigmas = walk_sigmas(11, *WALK)
    shares = [share_done(sigma, *WALK) for sigma in sigmas]
    assert shares[:-1] == pytest.approx([i / 10 for i in range(11)])
    assert shares[-1] == 1 and not math.isnan(shares[-1])
