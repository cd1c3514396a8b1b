"""Euler, Heun and midpoint on a Gaussian, whose flow is known: orders, calls, and the way back."""

import math

import pytest
import torch
from scipy.integrate import solve_ivp

from dinogen.diffusion.edm import walk_sigmas
from dinogen.diffusion.flow import walk_times
from dinogen.diffusion.ode import integrate, integrate_back

MEAN, STD = 0.3, 0.5
METHODS = ["euler", "heun", "midpoint"]


def flow(x, t):
    """E(eps - x0 | x_t) for images N(MEAN, STD^2), by the rule of conditional Gaussians."""
    variance = (1 - t) ** 2 * STD**2 + t**2
    return -MEAN + (t - (1 - t) * STD**2) / variance * (x - (1 - t) * MEAN)


def edm(x, sigma):
    """(x - D) / sigma with the best denoiser of such images."""
    D = MEAN + STD**2 / (STD**2 + sigma**2) * (x - MEAN)
    return (x - D) / sigma


def noise(num=64):
    return torch.randn(num, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def flow_error(num_steps, method):
    """The exact answer keeps each point at its quantile, so noise z becomes MEAN + STD z."""
    found = integrate(flow, noise(), walk_times(num_steps), method)
    return float((found - (MEAN + STD * noise())).abs().max())


def edm_error(num_steps, method):
    x = 80 * noise()
    found = integrate(edm, x, walk_sigmas(num_steps, 1e-6, 80.0, 7.0), method)
    exact = MEAN + STD / math.sqrt(STD**2 + 80.0**2) * (x - MEAN)
    return float((found - exact).abs().max())


@pytest.mark.parametrize("error", [flow_error, edm_error])
@pytest.mark.parametrize(("method", "order"), [("euler", 1), ("heun", 2), ("midpoint", 2)])
def test_orders_of_convergence(error, method, order):
    # enough steps for the highest term of the error to be alone; that of the midpoint vanishes here
    coarse, fine = (error(num, method) for num in (200, 400))
    assert math.log2(coarse / fine) == pytest.approx(order + (method == "midpoint"), abs=0.15)


@pytest.mark.parametrize(("method", "order"), [("euler", 1), ("heun", 2), ("midpoint", 2)])
def test_orders_where_there_are_two_modes(method, order):
    def derivative(x, t):
        """E(eps - x0 | x_t) of images N(-1, 0.3^2) or N(1, 0.3^2), half each."""
        means = (1 - t) * torch.tensor([-1.0, 1.0], dtype=torch.float64)
        variance = (1 - t) ** 2 * 0.3**2 + t**2
        off = x[..., None] - means
        each = torch.tensor([1.0, -1.0]) + (t - (1 - t) * 0.3**2) / variance * off
        return (torch.softmax(-off.square() / (2 * variance), -1) * each).sum(-1)

    start = noise(16)
    exact = solve_ivp(
        lambda t, x: derivative(torch.from_numpy(x), t).numpy(),
        (1, 0),
        start.flatten().numpy(),
        rtol=1e-10,
        atol=1e-10,
    ).y[:, -1]
    coarse, fine = (
        abs(integrate(derivative, start.flatten(), walk_times(num), method).numpy() - exact).max()
        for num in (200, 400)
    )
    assert math.log2(coarse / fine) == pytest.approx(order, abs=0.15)


@pytest.mark.parametrize("method", METHODS)
def test_few_steps_give_the_moments_of_the_data(method):
    found = integrate(flow, noise(20_000), walk_times(20), method)
    within = {"euler": 0.1, "heun": 0.005, "midpoint": 0.005}[method]
    exact = MEAN + STD * noise(20_000)
    assert float(found.mean() - exact.mean()) == pytest.approx(0, abs=within)
    assert float(found.std() / exact.std()) == pytest.approx(1, abs=within)


@pytest.mark.parametrize(("method", "calls"), [("euler", 5), ("heun", 9), ("midpoint", 10)])
def test_calls_and_no_call_where_there_is_no_noise(method, calls):
    seen = []

    def noted(x, t):
        seen.append(t)
        return flow(x, t)

    integrate(noted, noise(), walk_times(5), method)
    assert len(seen) == calls and min(seen) > 0 and max(seen) == 1


@pytest.mark.parametrize(
    ("derivative", "times"),
    [(flow, walk_times(10)), (edm, walk_sigmas(10, 0.002, 80.0, 7.0))],
    ids=["flow", "edm"],
)
@pytest.mark.parametrize("method", METHODS)
def test_the_way_back_leads_to_where_it_began(derivative, times, method):
    start = times[0] * noise()
    images = integrate(derivative, start, times, method)
    found = integrate_back(derivative, images, times, method)
    torch.testing.assert_close(found, start, rtol=0, atol=1e-4 * times[0])


def test_more_rounds_come_closer_where_the_step_bends():
    def bent(x, t):
        return flow(x, t) + 0.5 * torch.sin(4 * x)

    images = integrate(bent, noise(), walk_times(6), "heun")
    missed = []
    for rounds in (1, 2, 4, 8):
        start = integrate_back(bent, images, walk_times(6), "heun", rounds)
        again = integrate(bent, start, walk_times(6), "heun")
        missed.append(float((again - images).abs().max()))
    assert missed == sorted(missed, reverse=True)
    assert missed[0] > 1e-2 and missed[-1] < 1e-4


def test_each_sample_goes_back_by_itself():
    images = integrate(flow, noise(), walk_times(4), "heun")
    together = integrate_back(flow, images, walk_times(4), "heun")
    alone = integrate_back(flow, images[5:6], walk_times(4), "heun")
    torch.testing.assert_close(alone[0], together[5])
