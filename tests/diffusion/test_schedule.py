"""Noise schedules and conversions against diffusers, closed forms and each other."""

import math

import pytest
import torch

from dinogen._torchvision import ensure_torchvision
from dinogen.diffusion.process import Schedule, denoise, min_snr_weight, q_sample, target

ensure_torchvision()
from diffusers import DDPMScheduler  # noqa: E402 - torchvision has to be there first
from diffusers.training_utils import compute_snr  # noqa: E402

THEIRS = {"linear": "linear", "cosine": "squaredcos_cap_v2"}
NAMES = list(THEIRS)
PREDICTIONS = ["epsilon", "v", "x0"]


def drawn(num=16):
    """(x0, eps, t) with steps from the first to the last, float64."""
    generator = torch.Generator().manual_seed(0)
    x0, eps = torch.randn(2, num, 3, 4, 4, generator=generator, dtype=torch.float64)
    return x0, eps, torch.linspace(0, 999, num).long()


@pytest.mark.parametrize("name", NAMES)
def test_the_tables_are_those_of_diffusers(name):
    ours, theirs = Schedule(name), DDPMScheduler(beta_schedule=THEIRS[name])
    assert ours.alpha_bar.dtype == torch.float64
    torch.testing.assert_close(ours.betas.float(), theirs.betas, rtol=2e-5, atol=1e-7)
    # theirs is a product of 1000 float32 numbers
    torch.testing.assert_close(ours.alpha_bar.float(), theirs.alphas_cumprod, rtol=2e-4, atol=0)


def test_linear_runs_from_1e_4_to_0_02():
    betas = Schedule("linear").betas
    assert betas[0] == pytest.approx(1e-4) and betas[-1] == pytest.approx(0.02)
    assert betas.diff().std() < 1e-12


def test_cosine_is_its_closed_form_until_betas_reach_their_limit():
    schedule = Schedule("cosine")
    free = int((schedule.betas < 0.999).sum())
    assert free >= 998 and schedule.betas.max() == 0.999

    def f(t):
        return math.cos((t / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2

    expected = torch.tensor([f(t + 1) / f(0) for t in range(free)], dtype=torch.float64)
    torch.testing.assert_close(schedule.alpha_bar[:free], expected, rtol=1e-9, atol=0)


@pytest.mark.parametrize("num_steps", [10, 100, 4000])
@pytest.mark.parametrize("name", NAMES)
def test_any_number_of_steps_ends_in_noise(name, num_steps):
    schedule = Schedule(name, num_steps)
    assert schedule.alpha_bar.shape == (num_steps,)
    assert schedule.alpha_bar.diff().max() < 0
    assert schedule.alpha_bar[-1] < 1e-3


@pytest.mark.parametrize("name", NAMES)
def test_signal_to_noise(name):
    schedule = Schedule(name)
    signal, noise = schedule.signal_noise(torch.arange(1000), torch.zeros(1, dtype=torch.float64))
    assert (signal.square() + noise.square() - 1).abs().max() < 1e-12
    torch.testing.assert_close(schedule.snr, signal.square() / noise.square())


@pytest.mark.parametrize("name", NAMES)
def test_q_sample_and_v_are_those_of_diffusers(name):
    ours, theirs = Schedule(name), DDPMScheduler(beta_schedule=THEIRS[name])
    x0, eps, t = drawn()
    x0, eps = x0.float(), eps.float()
    close = {"rtol": 1e-5, "atol": 2e-5}
    level = ours.signal_noise(t, x0)
    torch.testing.assert_close(q_sample(x0, eps, *level), theirs.add_noise(x0, eps, t), **close)
    velocity = theirs.get_velocity(x0, eps, t)
    torch.testing.assert_close(target("v", x0, eps, *level), velocity, **close)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("name", NAMES)
def test_the_right_answer_gives_image_and_noise_back(name, prediction):
    schedule = Schedule(name)
    x0, eps, t = drawn()
    level = schedule.signal_noise(t, x0)
    x_t = q_sample(x0, eps, *level)
    found = denoise(prediction, target(prediction, x0, eps, *level), x_t, *level)
    torch.testing.assert_close(found, (x0, eps), rtol=0, atol=1e-9)


@pytest.mark.parametrize("to", PREDICTIONS)
@pytest.mark.parametrize("start", PREDICTIONS)
def test_any_answer_survives_a_round_trip_through_another(start, to):
    schedule = Schedule("linear")
    x_t, output, t = drawn()
    level = schedule.signal_noise(t, x_t)
    x0, eps = denoise(start, output, x_t, *level)
    # whatever was said, image and noise add up to x_t
    torch.testing.assert_close(q_sample(x0, eps, *level), x_t, rtol=0, atol=1e-9)
    again = denoise(to, target(to, x0, eps, *level), x_t, *level)
    torch.testing.assert_close(again, (x0, eps), rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(target(start, *again, *level), output, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("gamma", [1.0, 5.0])
@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_min_snr_weights_every_prediction_by_what_its_image_is_off(name, gamma):
    """The weighted error of any output is min(SNR, gamma) times that of the image it means."""
    schedule, t = Schedule(name), torch.tensor([0, 40, 400, 800, 990])
    x0, eps, off = (
        torch.randn(5, 7, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        for seed in range(3)
    )
    level = schedule.signal_noise(t, x0)
    x_t, snr = q_sample(x0, eps, *level), schedule.snr[t]
    for prediction in ("epsilon", "v", "x0"):
        wanted = target(prediction, x0, eps, *level)
        image, _ = denoise(prediction, wanted + off, x_t, *level)
        weight = min_snr_weight(prediction, snr, gamma)
        torch.testing.assert_close(
            weight * off.square().mean(1),
            snr.clamp(max=gamma) * (image - x0).square().mean(1),
            rtol=1e-6,
            atol=1e-9,
        )


def test_min_snr_weights_are_those_that_diffusers_trains_with():
    scheduler, t = DDPMScheduler(beta_schedule="linear"), torch.arange(0, 1000, 7)
    snr = compute_snr(scheduler, t)
    own = Schedule("linear").snr[t]
    # examples/text_to_image/train_text_to_image.py
    least = torch.stack([snr, 5 * torch.ones_like(t)], 1).min(1)[0]
    for prediction, expected in (("epsilon", least / snr), ("v", least / (snr + 1))):
        found = min_snr_weight(prediction, own, 5.0).float()
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-6)
