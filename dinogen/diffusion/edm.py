"""EDM: the preconditioning, noise and time steps of Karras et al. 2022.

"Elucidating the Design Space of Diffusion-Based Generative Models". An image x0 with noise of
strength sigma is x = x0 + sigma eps. The denoiser is D(x; sigma) = c_skip x + c_out F(c_in x;
c_noise) (equation 7), F being the network. Its factors make the input and the target of F of unit
variance, and c_out as small as can be. The walk follows dx/dsigma = (x - D(x; sigma)) / sigma
(equation 4 with sigma(t) = t) by :mod:`dinogen.diffusion.ode`; with its Heun that is algorithm 1.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


class Factors(NamedTuple):
    """The factors of some sigmas (table 1, row "EDM"), each of the shape of these.

    Attributes:
        c_in: the noisy image is multiplied by it before the network.
        c_noise: what the network is given for a time: log(sigma) / 4.
        c_skip: share of the noisy image in the denoised one.
        c_out: what the network says is multiplied by it.
    """

    c_in: Tensor
    c_noise: Tensor
    c_skip: Tensor
    c_out: Tensor


def factors(sigma: Tensor, sigma_data: float) -> Factors:
    """The factors of ``sigma`` (...) above 0.

    Args:
        sigma: standard deviations of the noise.
        sigma_data: standard deviation of the images' values, in [-1, 1] about 0.5.
    """
    total = sigma.square() + sigma_data**2
    return Factors(
        c_in=total.rsqrt(),
        c_noise=sigma.log() / 4,
        c_skip=sigma_data**2 / total,
        c_out=sigma * sigma_data * total.rsqrt(),
    )


def drawn_sigma(normal: Tensor, mean: float, std: float) -> Tensor:
    """Sigmas of training of standard normal numbers: log-normal (table 1, "Noise distribution")."""
    return torch.exp(mean + std * normal)


def target(x0: Tensor, x: Tensor, c_skip: Tensor, c_out: Tensor) -> Tensor:
    """What F should say of x, so that D(x) is x0; of unit variance (equation 8).

    The loss weight lambda(sigma) = (sigma^2 + sigma_data^2) / (sigma sigma_data)^2 of the denoised
    images is 1 / c_out^2, so the error of F itself has weight 1 at every sigma.
    """
    return (x0 - c_skip * x) / c_out


def walk_sigmas(num_steps: int, sigma_min: float, sigma_max: float, rho: float) -> list[float]:
    """Sigmas from ``sigma_max`` to ``sigma_min`` in ``num_steps``, and 0 (equation 5).

    A larger ``rho`` puts more of them near ``sigma_min``. One step goes from ``sigma_max`` to 0.
    """
    high, low = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    last = max(num_steps - 1, 1)
    return [(high + i / last * (low - high)) ** rho for i in range(num_steps)] + [0.0]


def share_done(sigma: float, sigma_min: float, sigma_max: float, rho: float) -> float:
    """Share of the walk of :func:`walk_sigmas` that is done at ``sigma``: 0 at ``sigma_max``."""
    high, low, now = (math.pow(one, 1 / rho) for one in (sigma_max, sigma_min, sigma))
    return min(1.0, max(0.0, (high - now) / (high - low)))
