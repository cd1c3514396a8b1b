"""Diffusion: the noise of each time step, what a network can predict of it, and sampling.

An image x0 at time step t is x_t = signal x0 + noise eps with signal = sqrt(alpha_bar_t), noise =
sqrt(1 - alpha_bar_t) and eps standard normal (Ho et al. 2020, "Denoising Diffusion Probabilistic
Models", equation 4). Their equation numbers count from 1; time steps here count from 0, so step 0
has the least noise and alpha_bar before it is 1. Sampling is DDIM; DDPM's ancestral sampling is
DDIM with eta 1. A network predicts eps, x0 or v.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from dinogen.transfer import to_device_together

Name = Literal["linear", "cosine"]
Prediction = Literal["epsilon", "v", "x0"]

MAX_BETA = 0.999
COSINE_OFFSET = 0.008


def linear_betas(num_steps: int) -> Tensor:
    """Betas from 1e-4 to 0.02 over 1000 steps, (T,) float64 (Ho et al. 2020, section 4).

    With other numbers of steps each beta is multiplied by 1000 / T, so that the last step is as
    noisy as with 1000.
    """
    scale = 1000 / num_steps
    betas = torch.linspace(1e-4 * scale, 0.02 * scale, num_steps, dtype=torch.float64)
    return betas.clamp(max=MAX_BETA)


def cosine_betas(num_steps: int) -> Tensor:
    """Betas whose alpha_bar is a squared cosine, (T,) float64.

    Nichol and Dhariwal 2021, "Improved Denoising Diffusion Probabilistic Models", equation 17.
    """
    time = torch.arange(num_steps + 1, dtype=torch.float64) / num_steps
    f = torch.cos((time + COSINE_OFFSET) / (1 + COSINE_OFFSET) * math.pi / 2).square()
    return (1 - f[1:] / f[:-1]).clamp(max=MAX_BETA)


class Schedule:
    """The noise of every time step, and what follows from it.

    The tables are float64 on the CPU, where 1 - alpha_bar loses nothing; what is handed out has the
    type of the images. Time steps are (B,) int64 from 0 to T - 1.

    Args:
        name: ``linear`` or ``cosine``.
        num_steps: T.

    Attributes:
        betas: (T,) float64, variance of the noise that each step adds.
        alpha_bar: (T,) float64, share of the image's variance that is left after each step.
    """

    def __init__(self, name: Name, num_steps: int = 1000) -> None:
        self.num_steps = num_steps
        self.betas = {"linear": linear_betas, "cosine": cosine_betas}[name](num_steps)
        self.alpha_bar = torch.cumprod(1 - self.betas, 0)

    @property
    def snr(self) -> Tensor:
        """Signal-to-noise ratio alpha_bar / (1 - alpha_bar) of every time step, (T,) float64."""
        return self.alpha_bar / (1 - self.alpha_bar)

    def signal_noise(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """sqrt(alpha_bar_t) and sqrt(1 - alpha_bar_t), each (B, 1, ...) to multiply ``like`` by.

        Args:
            t: (B,) int64 on the CPU, where the answer stays too.
            like: (B, ...).
        """
        alpha_bar = self.alpha_bar[t].reshape(-1, *[1] * (like.dim() - 1))
        return alpha_bar.sqrt().to(like.dtype), (1 - alpha_bar).sqrt().to(like.dtype)


def q_sample(x0: Tensor, eps: Tensor, signal: Tensor, noise: Tensor) -> Tensor:
    """Images with the noise of their time steps, of the shape of ``x0`` (B, ...).

    ``signal`` and ``noise`` are those of :meth:`Schedule.signal_noise`, on the images' device.
    """
    return signal * x0 + noise * eps


def target(
    prediction: Prediction, x0: Tensor, eps: Tensor, signal: Tensor, noise: Tensor
) -> Tensor:
    """What a network that predicts ``prediction`` should say, of the shape of ``x0``.

    v is signal eps - noise x0 (Salimans and Ho 2022, "Progressive Distillation for Fast Sampling of
    Diffusion Models", appendix D).
    """
    if prediction == "epsilon":
        return eps
    if prediction == "x0":
        return x0
    return signal * eps - noise * x0


def denoise(
    prediction: Prediction, output: Tensor, x_t: Tensor, signal: Tensor, noise: Tensor
) -> tuple[Tensor, Tensor]:
    """The (x0, eps) that an output means: the inverse of :func:`target`.

    Args:
        prediction: what the network predicts.
        output: what it said, of the shape of ``x_t``.
        x_t: images with noise, (B, ...).
        signal: of their time steps, as is ``noise``.
        noise: see ``signal``.
    """
    if prediction == "epsilon":
        return (x_t - noise * output) / signal, output
    if prediction == "x0":
        return output, (x_t - signal * output) / noise
    return signal * x_t - noise * output, noise * x_t + signal * output


def min_snr_weight(prediction: Prediction, snr: Tensor, gamma: float) -> Tensor:
    """Weight of the squared error of what is predicted, of the shape of ``snr``.

    Hang et al. 2023, "Efficient Diffusion Training via Min-SNR Weighting Strategy": the squared
    error of the image has weight min(SNR, gamma) (section 3.3). With x0 = (x_t - noise eps) /
    signal the error of the image is that of eps over SNR, and with x0 = signal x_t - noise v that
    of v over SNR + 1, and so are the weights (their equation 7 and below).

    Args:
        prediction: what the network predicts.
        snr: of the time steps, as :attr:`Schedule.snr`.
        gamma: above 0.
    """
    of_image = snr.clamp(max=gamma)
    return of_image / {"epsilon": snr, "v": snr + 1, "x0": torch.ones_like(snr)}[prediction]


def time_steps(num_steps: int, sample_steps: int) -> list[int]:
    """Evenly spaced time steps, the noisiest first: T - 1 is always among them.

    The noise that sampling starts from is that of step T - 1, so a choice that leaves it out starts
    with images the network never saw (Lin et al. 2024, "Common Diffusion Noise Schedules and
    Sample Steps are Flawed", section 3.3, there called trailing).

    Args:
        num_steps: T of the schedule.
        sample_steps: how many are taken, 1 to T.
    """
    return [round(num_steps * i / sample_steps) - 1 for i in range(sample_steps, 0, -1)]


def step(
    schedule: Schedule, x0: Tensor, eps: Tensor, t: int, before: int, eta: float, z: Tensor | None
) -> Tensor:
    """x at time step ``before``, from the (x0, eps) predicted at ``t``.

    Song et al. 2021, "Denoising Diffusion Implicit Models", equations 12 and 16. With eta 1 it is
    the ancestral step of Ho et al. 2020 (equations 6 and 7, variance beta tilde), between any two
    time steps.

    Args:
        schedule: which noise the time steps have.
        x0: predicted images (B, ...).
        eps: predicted noise, of the same shape.
        t: the time step now.
        before: the one to go to, less noisy; -1 is the image itself.
        eta: share of DDPM's noise that is added: 0 none, 1 all.
        z: standard normal noise of the same shape; None adds none.
    """
    now = float(schedule.alpha_bar[t])
    then = float(schedule.alpha_bar[before]) if before >= 0 else 1.0
    variance = eta * eta * (1 - then) / (1 - now) * (1 - now / then)
    # rounding may leave a negative speck where eta is 1
    x = math.sqrt(then) * x0 + math.sqrt(max(1 - then - variance, 0.0)) * eps
    return x if z is None else x + math.sqrt(variance) * z


@torch.no_grad()
def sample(
    predict: Callable[[Tensor, Tensor], Tensor],
    schedule: Schedule,
    prediction: Prediction,
    x: Tensor,
    sample_steps: int,
    *,
    eta: float = 0.0,
    noise: Callable[[int], Tensor] | None = None,
    clip: bool = True,
) -> Tensor:
    """Walk from pure noise to images.

    Args:
        predict: (x_t, t (B,) int64 on the CPU) -> what the network says.
        schedule: the one that the network was trained with.
        prediction: what the network predicts.
        x: standard normal noise (B, ...).
        sample_steps: how many time steps are visited.
        eta: 0 is DDIM, whose images follow from ``x`` alone; 1 is DDPM.
        noise: time step -> noise of the shape of ``x`` to add there; needed where eta is not 0.
        clip: keep the predicted images in [-1, 1], and let the predicted noise follow, so that
            both still add up to x_t. Without it a small error in the noise is a huge one in the
            image where the signal is weak.

    Returns:
        Images of the shape of ``x``; in [-1, 1] with ``clip``.
    """
    for now, before in itertools.pairwise([*time_steps(schedule.num_steps, sample_steps), -1]):
        t = torch.full((len(x),), now)
        level = to_device_together(schedule.signal_noise(t, x), x.device)
        x0, eps = denoise(prediction, predict(x, t), x, *level)
        if clip:
            x0, eps = denoise("x0", x0.clamp(-1, 1), x, *level)
        z = noise(now) if noise is not None and eta > 0 and before >= 0 else None
        x = step(schedule, x0, eps, now, before, eta, z)
    return x


@torch.no_grad()
def invert(
    predict: Callable[[Tensor, Tensor], Tensor],
    schedule: Schedule,
    prediction: Prediction,
    images: Tensor,
    sample_steps: int,
    *,
    rounds: int = 4,
    clip: bool = True,
) -> Tensor:
    """Walk from images to the noise from which :func:`sample` walks back to them, with eta 0.

    Song et al. 2021, "Denoising Diffusion Implicit Models": the step of equation 12 with sigma 0 is
    one of Euler's method for the differential equation 14, which can be integrated in both
    directions. A step back from x at ``before`` to x at ``now`` needs what the network says of the
    x that is looked for. With one round it is asked of x at ``before``, as the authors do. Each
    further round asks it again of what the round before found, and so solves the step as
    :func:`sample` takes it (a fixed point). Of each image the round is kept from which the step
    leads back most closely.

    Args:
        predict: as in :func:`sample`.
        schedule: as in :func:`sample`.
        prediction: as in :func:`sample`.
        images: (B, ...) in [-1, 1].
        sample_steps: how many time steps are visited.
        rounds: calls of the network per step.
        clip: as in :func:`sample`.

    Returns:
        Noise of the shape of ``images``.
    """
    x = images
    walk = [*time_steps(schedule.num_steps, sample_steps), -1]
    for now, before in reversed(list(itertools.pairwise(walk))):
        wanted, t = x, torch.full((len(x),), now)
        level = to_device_together(schedule.signal_noise(t, x), x.device)
        best, least = x, torch.full((len(x), *[1] * (x.dim() - 1)), math.inf, device=x.device)
        for _ in range(rounds):
            x0, eps = denoise(prediction, predict(x, t), x, *level)
            if clip:
                x0, eps = denoise("x0", x0.clamp(-1, 1), x, *level)
            missed = step(schedule, x0, eps, now, before, 0.0, None) - wanted
            residual = missed.square().mean(tuple(range(1, x.dim())), keepdim=True)
            closer = residual < least
            best, least = torch.where(closer, x, best), torch.where(closer, residual, least)
            x = _step_back(schedule, x0, eps, wanted, now, before)
        # the last one is not tried: it is taken where every round came closer
        x = torch.where(closer, x, best)
    return x


def _step_back(
    schedule: Schedule, x0: Tensor, eps: Tensor, wanted: Tensor, now: int, before: int
) -> Tensor:
    """x at ``now`` from which (x0, eps) lead to ``wanted`` at ``before``.

    Of the two answers the one is kept that the noise of ``before`` hides less; the other follows.
    """
    signal = math.sqrt(schedule.alpha_bar[before]) if before >= 0 else 1.0
    noise = math.sqrt(1 - signal * signal)
    if noise > signal:
        eps = (wanted - signal * x0) / noise
    else:
        x0 = (wanted - noise * eps) / signal
    alpha_bar = float(schedule.alpha_bar[now])
    return math.sqrt(alpha_bar) * x0 + math.sqrt(1 - alpha_bar) * eps
