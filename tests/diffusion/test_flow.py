"""The straight path against diffusers' flow matching schedulers, and its readings."""

import math

import pytest
import torch
from scipy import stats

from dinogen._torchvision import ensure_torchvision
from dinogen.diffusion import process
from dinogen.diffusion.flow import denoise, logit_normal, target, velocity, walk_times
from dinogen.diffusion.ode import integrate

ensure_torchvision()
from diffusers import (  # noqa: E402 - torchvision comes first
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
)

PREDICTIONS = ["v", "x0", "epsilon"]


def drawn(seed):
    return torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(seed))


def network(x, t):
    """A stand-in that depends on all that a network sees."""
    return torch.sin(2 * x) + 0.3 * x + math.cos(3 * t)


@pytest.mark.parametrize("num_steps", [1, 4, 25])
def test_euler_walks_as_diffusers(num_steps):
    scheduler = FlowMatchEulerDiscreteScheduler()
    times = walk_times(num_steps)
    scheduler.set_timesteps(sigmas=times[:-1])
    torch.testing.assert_close(scheduler.sigmas, torch.tensor(times))
    x = drawn(0)
    for t in scheduler.timesteps:
        x = scheduler.step(network(x, float(t) / 1000), t, x).prev_sample
    torch.testing.assert_close(integrate(network, drawn(0), times, "euler"), x)


@pytest.mark.parametrize("num_steps", [2, 5, 25])
def test_heun_walks_as_diffusers(num_steps):
    scheduler = FlowMatchHeunDiscreteScheduler()
    scheduler.set_timesteps(num_steps)
    times = [*dict.fromkeys(scheduler.sigmas.tolist())]
    assert len(times) == num_steps + 1
    x = drawn(0)
    for t in scheduler.timesteps:
        x = scheduler.step(network(x, float(t) / 1000), t, x).prev_sample
    torch.testing.assert_close(integrate(network, drawn(0), times, "heun"), x, rtol=2e-4, atol=2e-4)


def test_noise_is_added_as_in_diffusers():
    scheduler = FlowMatchEulerDiscreteScheduler()
    t = torch.tensor([scheduler.timesteps[300], scheduler.timesteps[900]])
    expected = scheduler.scale_noise(drawn(0), t, drawn(1))
    noise = (t / 1000)[:, None, None, None]
    found = process.q_sample(drawn(0), drawn(1), 1 - noise, noise)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("t", [0.05, 0.5, 0.9])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_readings_are_inverse_to_targets_and_agree_with_the_velocity(prediction, t):
    x0, eps = drawn(0), drawn(1)
    x_t = (1 - t) * x0 + t * eps
    output = target(prediction, x0, eps)
    for found, expected in zip(denoise(prediction, output, x_t, t), (x0, eps), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    found = velocity(prediction, output, x_t, t)
    torch.testing.assert_close(found, eps - x0, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("prediction", ["x0", "epsilon"])
def test_readings_are_those_of_ddpm_with_this_signal_and_noise(prediction):
    x_t, output, t = drawn(0), drawn(1), 0.4
    level = torch.tensor(1 - t), torch.tensor(t)
    expected = process.denoise(prediction, output, x_t, *level)
    for found, value in zip(denoise(prediction, output, x_t, t), expected, strict=True):
        torch.testing.assert_close(found, value)


def test_a_velocity_means_the_image_that_ddpm_reads_at_the_same_ratio_of_signal_and_noise():
    """x_t / |(1 - t, t)| is ddpm's x with signal^2 + noise^2 = 1; both see the same pair."""
    x0, eps, t = drawn(0), drawn(1), 0.3
    length = math.hypot(1 - t, t)
    signal, noise = torch.tensor((1 - t) / length), torch.tensor(t / length)
    x_t = (1 - t) * x0 + t * eps
    of_flow = denoise("v", eps - x0, x_t, t)
    of_ddpm = process.denoise("v", signal * eps - noise * x0, x_t / length, signal, noise)
    for found, expected in zip(of_flow, of_ddpm, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_predicted_noise_is_read_within_bounds_where_there_is_no_signal():
    x = drawn(0)
    wrong = x + 0.05
    clipped = velocity("epsilon", wrong, x, 1.0, clip=True)
    torch.testing.assert_close(wrong - clipped, ((x - wrong) / 0.02).clamp(-1, 1))
    assert velocity("epsilon", wrong, x, 1.0).isfinite().all()


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (0.7, 0.5), (-1.0, 2.0)])
def test_times_are_logit_normal(mean, std):
    normal = torch.randn(4000, generator=torch.Generator().manual_seed(0))
    t = logit_normal(normal, mean, std)

    def cdf(values):
        return stats.norm.cdf((values.log() - (1 - values).log() - mean) / std)

    assert t.min() > 0 and t.max() < 1
    assert stats.kstest(t.double(), lambda values: cdf(torch.as_tensor(values))).pvalue > 0.01


def test_the_walk_is_even_and_ends_in_images():
    times = walk_times(8)
    assert times == [1.0, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125, 0.0]
