"""From noise to images: DDIM, and DDPM's ancestral sampling, which is DDIM with eta 1."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import torch
from torch import Tensor

from dinogen.diffusion.schedule import Prediction, Schedule


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
        x0, eps = schedule.denoise(prediction, predict(x, t), x, t)
        if clip:
            x0, eps = schedule.denoise("x0", x0.clamp(-1, 1), x, t)
        z = noise(now) if noise is not None and eta > 0 and before >= 0 else None
        x = step(schedule, x0, eps, now, before, eta, z)
    return x
