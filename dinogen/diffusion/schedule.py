"""How much noise each time step has, and the three things a network can predict: eps, x0, v.

An image x0 at time step t is x_t = signal x0 + noise eps with signal = sqrt(alpha_bar_t), noise =
sqrt(1 - alpha_bar_t) and eps standard normal (Ho et al. 2020, "Denoising Diffusion Probabilistic
Models", equation 4). Their equation numbers count from 1; time steps here count from 0, so step 0
has the least noise and alpha_bar before it is 1.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

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
    type and device of the images. Time steps are (B,) int64 from 0 to T - 1.

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
        """sqrt(alpha_bar_t) and sqrt(1 - alpha_bar_t), each (B, 1, ...) to multiply ``like`` by."""
        alpha_bar = self.alpha_bar[t.cpu()].reshape(-1, *[1] * (like.dim() - 1))
        return alpha_bar.sqrt().to(like), (1 - alpha_bar).sqrt().to(like)

    def q_sample(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """Images with the noise of their time steps, of the shape of ``x0`` (B, ...)."""
        signal, noise = self.signal_noise(t, x0)
        return signal * x0 + noise * eps

    def target(self, prediction: Prediction, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """What a network that predicts ``prediction`` should say, of the shape of ``x0``.

        v is signal eps - noise x0 (Salimans and Ho 2022, "Progressive Distillation for Fast
        Sampling of Diffusion Models", appendix D).
        """
        if prediction == "epsilon":
            return eps
        if prediction == "x0":
            return x0
        signal, noise = self.signal_noise(t, x0)
        return signal * eps - noise * x0

    def denoise(
        self, prediction: Prediction, output: Tensor, x_t: Tensor, t: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The (x0, eps) that an output means: the inverse of :meth:`target`.

        Args:
            prediction: what the network predicts.
            output: what it said, of the shape of ``x_t``.
            x_t: images with noise, (B, ...).
            t: their time steps.
        """
        signal, noise = self.signal_noise(t, x_t)
        if prediction == "epsilon":
            return (x_t - noise * output) / signal, output
        if prediction == "x0":
            return output, (x_t - signal * output) / noise
        return signal * x_t - noise * output, noise * x_t + signal * output
