"""Rectified flow: the straight path from an image to noise, and what a network can say of it.

An image x0 at time t in [0, 1] is x_t = (1 - t) x0 + t eps with eps standard normal, and moves with
velocity v = eps - x0 (Liu et al. 2023, "Flow Straight and Fast", equation 1; Lipman et al. 2023,
"Flow Matching for Generative Modeling", section 4.1 with sigma_min 0; time runs as in Esser et al.
2024, "Scaling Rectified Flow Transformers for High-Resolution Image Synthesis", equation 13). The
mean of v given x_t, which a network learns, is the velocity of an ordinary differential equation
that turns noise into images.

It is :func:`dinogen.diffusion.process.q_sample` with signal 1 - t and noise t, and a network that
predicts epsilon or x0 means the same by it as there. This v is not the v there.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Prediction = Literal["v", "x0", "epsilon"]
Times = Literal["uniform", "logit_normal"]

# The least signal that a predicted noise is divided by where it is read as an image.
MIN_SIGNAL = 0.02


def logit_normal(normal: Tensor, mean: float, std: float) -> Tensor:
    """Times in (0, 1) of standard normal numbers (Esser et al. 2024, equation 19).

    With mean 0 and deviation 1 most lie in the middle, where what to predict is least certain; a
    positive mean moves them to the noise.
    """
    return torch.sigmoid(mean + std * normal)


def target(prediction: Prediction, x0: Tensor, eps: Tensor) -> Tensor:
    """What a network that predicts ``prediction`` should say, of the shape of ``x0`` (B, ...)."""
    return {"v": lambda: eps - x0, "x0": lambda: x0, "epsilon": lambda: eps}[prediction]()


def denoise(prediction: Prediction, output: Tensor, x_t: Tensor, t: float) -> tuple[Tensor, Tensor]:
    """The (x0, eps) that an output means, as :func:`dinogen.diffusion.process.denoise`.

    Args:
        prediction: what the network predicts.
        output: what it said, of the shape of ``x_t``.
        x_t: images with noise (B, ...).
        t: their time; above 0 where it predicts x0. Where the image is less than
            :data:`MIN_SIGNAL` of x_t, a predicted noise is read as if it were that much.
    """
    if prediction == "v":
        return x_t - t * output, x_t + (1 - t) * output
    if prediction == "x0":
        return output, (x_t - (1 - t) * output) / t
    return (x_t - t * output) / max(1 - t, MIN_SIGNAL), output


def velocity(
    prediction: Prediction, output: Tensor, x_t: Tensor, t: float, *, clip: bool = False
) -> Tensor:
    """dx/dt that an output means, of the shape of ``x_t``.

    Args:
        prediction: as in :func:`denoise`.
        output: as in :func:`denoise`.
        x_t: as in :func:`denoise`.
        t: as in :func:`denoise`.
        clip: keep the images of predicted noise in [-1, 1]: where the signal is weak, a small
            error of the noise is a huge one of the image.
    """
    if prediction == "v":
        return output
    x0, eps = denoise(prediction, output, x_t, t)
    if prediction == "epsilon" and clip:
        x0 = x0.clamp(-1, 1)
    return eps - x0


def walk_times(num_steps: int) -> list[float]:
    """Evenly spaced times from 1, noise, to 0, images: ``num_steps`` + 1 of them."""
    return [1 - number / num_steps for number in range(num_steps + 1)]
