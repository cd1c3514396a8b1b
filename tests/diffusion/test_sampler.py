"""DDIM and DDPM against diffusers, and against a Gaussian whose best predictor is known."""

import itertools

import pytest
import torch

from dinogen._torchvision import ensure_torchvision
from dinogen.diffusion.process import Schedule, denoise, invert, sample, step, time_steps

ensure_torchvision()
from diffusers import DDIMScheduler, DDPMScheduler  # noqa: E402 - torchvision comes first

BETAS = {"linear": "linear", "cosine": "squaredcos_cap_v2"}
KINDS = {"epsilon": "epsilon", "v": "v_prediction", "x0": "sample"}


def theirs(cls, schedule, prediction, clip):
    """diffusers' scheduler; in float64, for its float32 tables lose digits of 1 - alpha_bar."""
    scheduler = cls(
        beta_schedule=BETAS[schedule],
        prediction_type=KINDS[prediction],
        clip_sample=clip,
        timestep_spacing="trailing",
    )
    scheduler.betas = scheduler.betas.double()
    scheduler.alphas = 1 - scheduler.betas
    scheduler.alphas_cumprod = scheduler.alphas.cumprod(0)
    return scheduler


def network(x, t):
    """A stand-in that depends on everything a network sees, and leaves [-1, 1] now and then."""
    return torch.sin(2 * x) + 0.3 * x + torch.cos(t.to(x) / 200).reshape(-1, 1, 1, 1)


def start(seed=0):
    return torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("sample_steps", [1, 2, 10, 50, 100, 1000])
def test_time_steps_are_diffusers_trailing(sample_steps):
    scheduler = theirs(DDIMScheduler, "linear", "epsilon", clip=True)
    scheduler.set_timesteps(sample_steps)
    assert time_steps(1000, sample_steps) == scheduler.timesteps.tolist()


@pytest.mark.parametrize("sample_steps", [3, 7, 37, 999])
def test_time_steps_start_at_the_noisiest_and_are_even(sample_steps):
    steps = time_steps(1000, sample_steps)
    assert len(set(steps)) == sample_steps and steps[0] == 999
    gaps = {a - b for a, b in itertools.pairwise([*steps, -1])}
    assert max(gaps) - min(gaps) <= 1


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("t", [999, 499, 19])
def test_one_ddim_step(t, eta):
    schedule, scheduler = Schedule("linear"), theirs(DDIMScheduler, "linear", "epsilon", clip=False)
    scheduler.set_timesteps(100)
    x, eps, z = start(0), start(1), start(2)
    expected = scheduler.step(eps, t, x, eta=eta, variance_noise=z).prev_sample
    x0, _ = denoise("epsilon", eps, x, *schedule.signal_noise(torch.tensor([t, t]), x))
    ours = step(schedule, x0, eps, t, t - 10, eta, z if eta else None)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("t", [999, 500, 1])
def test_one_ddpm_step(t, schedule):
    ours, scheduler = Schedule(schedule), theirs(DDPMScheduler, schedule, "x0", clip=False)
    x, x0 = start(0), start(1)
    z = torch.randn(x.shape, generator=torch.Generator().manual_seed(7))
    expected = scheduler.step(x0, t, x, generator=torch.Generator().manual_seed(7)).prev_sample
    _, eps = denoise("x0", x0, x, *ours.signal_noise(torch.tensor([t, t]), x))
    found = step(ours, x0, eps, t, t - 1, 1.0, z)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("prediction", KINDS)
def test_a_whole_ddim_walk(prediction, clip, eta):
    scheduler = theirs(DDIMScheduler, "cosine", prediction, clip)
    scheduler.set_timesteps(20)
    # the first step of the cosine schedule multiplies what is said by 20,000
    steps = scheduler.timesteps if clip else scheduler.timesteps[1:]
    x = start()
    for t in steps:
        x = scheduler.step(
            network(x, t),
            t,
            x,
            eta=eta,
            use_clipped_model_output=True,
            variance_noise=start(int(t)),
        ).prev_sample
    if clip:
        found = sample(
            network, Schedule("cosine"), prediction, start(), 20, eta=eta, noise=start, clip=True
        )
    else:
        found, schedule = start(), Schedule("cosine")
        for now, before in itertools.pairwise([*steps.tolist(), -1]):
            t = torch.full((2,), now)
            level = schedule.signal_noise(t, found)
            x0, eps = denoise(prediction, network(found, t), found, *level)
            found = step(schedule, x0, eps, now, before, eta, start(now) if eta else None)
    torch.testing.assert_close(found, x, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("prediction", KINDS)
@pytest.mark.parametrize("sample_steps", [20, 200])
def test_a_whole_ancestral_walk(sample_steps, prediction):
    scheduler = theirs(DDPMScheduler, "linear", prediction, clip=True)
    scheduler.set_timesteps(sample_steps)
    x = start()
    for t in scheduler.timesteps:
        generator = torch.Generator().manual_seed(int(t))
        x = scheduler.step(network(x, t), t, x, generator=generator).prev_sample
    found = sample(
        network, Schedule("linear"), prediction, start(), sample_steps, eta=1.0, noise=start
    )
    torch.testing.assert_close(found, x, rtol=1e-3, atol=1e-3)


def test_noise_is_asked_for_at_every_step_but_the_last_and_never_by_ddim():
    asked = []

    def noise(t):
        asked.append(t)
        return start(t)

    sample(network, Schedule("cosine"), "v", start(), 10, eta=0.0, noise=noise)
    assert asked == []
    sample(network, Schedule("cosine"), "v", start(), 10, eta=1.0, noise=noise)
    assert asked == time_steps(1000, 10)[:-1]


def test_clipped_samples_lie_in_range():
    wild = sample(lambda x, t: 100 * x, Schedule("linear"), "epsilon", start(), 10)
    assert wild.abs().max() == 1


class Gaussian:
    """Data N(mean, std**2): the least squared error of eps is linear in x_t.

    A sample then is linear in all the noise that made it. Its mean and variance are read off
    exactly, from one sample without noise and one for each noise alone.
    """

    mean, std = 0.3, 0.2

    def __init__(self, name, num_steps, sample_steps, eta):
        self.schedule = Schedule(name, num_steps)
        steps = time_steps(num_steps, sample_steps)
        num = 1 + sample_steps  # none, the first noise, one at each step but the last
        x = torch.zeros(num, 1, dtype=torch.float64)
        x[1] = 1

        def noise(t):
            z = torch.zeros_like(x)
            z[2 + steps.index(t)] = 1
            return z

        found = sample(
            self.eps, self.schedule, "epsilon", x, sample_steps, eta=eta, noise=noise, clip=False
        )
        self.sample_mean = float(found[0])
        self.sample_std = float((found - found[0]).square().sum().sqrt())

    def eps(self, x, t):
        signal, noise = self.schedule.signal_noise(t, x)
        variance = (signal * self.std).square() + noise.square()
        return noise * (x - signal * self.mean) / variance


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_the_best_predictor_gives_the_mean_and_variance_of_the_data(name, eta):
    fine, coarse = Gaussian(name, 1000, 1000, eta), Gaussian(name, 250, 250, eta)
    assert fine.sample_mean == pytest.approx(0.3, abs=0.002)
    assert fine.sample_std == pytest.approx(0.2, rel=0.02)
    # what is left is the size of the steps: a quarter of it, a quarter of the error
    assert abs(fine.sample_std - 0.2) < 0.4 * abs(coarse.sample_std - 0.2)


@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_ddim_gives_them_in_100_steps(name):
    few = Gaussian(name, 1000, 100, 0.0)
    assert few.sample_mean == pytest.approx(0.3, abs=0.005)
    assert few.sample_std == pytest.approx(0.2, rel=0.1)


class PerChannel:
    """The best predictor of epsilon where data are normal, with a variance per channel."""

    def __init__(self, schedule):
        self.schedule = schedule
        self.variance = torch.tensor([0.04, 0.01, 0.09]).view(1, 3, 1, 1)

    def __call__(self, x, t):
        signal, noise = self.schedule.signal_noise(t, x)
        return noise * x / (signal**2 * self.variance + noise**2)


@pytest.mark.parametrize("name", ["linear", "cosine"])
@pytest.mark.parametrize("steps", [20, 100])
def test_ddim_backwards_leads_to_noise_from_which_ddim_leads_back(name, steps):
    schedule = Schedule(name)
    predict = PerChannel(schedule)
    images = predict.variance.sqrt() * start()
    noise = invert(predict, schedule, "epsilon", images, steps, rounds=8)
    back = sample(predict, schedule, "epsilon", noise, steps)
    assert (back - images).abs().mean() < 0.004
    plain = invert(predict, schedule, "epsilon", images, steps, rounds=1)
    worse = sample(predict, schedule, "epsilon", plain, steps)
    assert (worse - images).square().mean() > (back - images).square().mean()
    if steps == 100:  # the finer the steps, the closer is the noise to that of the equation
        expected = images / predict.variance.sqrt()
        assert (noise - expected).abs().mean() < 0.1


def test_one_step_back_is_the_equation_run_backwards():
    """Song et al. 2021, equation 12 with sigma 0, solved for x_t at the noise of x_{t-1}."""
    schedule = Schedule("linear")
    predict = PerChannel(schedule)
    images = 0.1 * start()
    found = invert(predict, schedule, "epsilon", images, 1, rounds=1)
    a = schedule.alpha_bar[999].float()
    eps = predict(images, torch.tensor([999, 999]))
    # clipping keeps the predicted image in [-1, 1]; the noise follows
    x0 = ((images - (1 - a).sqrt() * eps) / a.sqrt()).clamp(-1, 1)
    eps = (images - a.sqrt() * x0) / (1 - a).sqrt()
    expected = a.sqrt() * images + (1 - a).sqrt() * eps
    assert torch.allclose(found, expected, atol=1e-4)
