"""Integration of dx/dtime from noise to an image, and back: Euler, Heun and midpoint.

Times are numbers on the host, the noisiest first, and end at 0, where there is no noise left. What
time is, and what the derivative is, :mod:`dinogen.diffusion.flow` and :mod:`dinogen.diffusion.edm`
say.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

Method = Literal["euler", "heun", "midpoint"]
# (x (B, ...), time) -> dx/dtime, of the shape of x
Derivative = Callable[[Tensor, float], Tensor]


def step(derivative: Derivative, x: Tensor, now: float, then: float, method: Method) -> Tensor:
    """x at time ``then``, from x (B, ...) at time ``now``.

    Euler's error is of the order of the number of steps, that of Heun and of the midpoint of its
    square; they call the derivative twice. Heun's second call would be at ``then``; a step to 0 is
    one of Euler's, for the derivative there may divide by the time (Karras et al. 2022,
    "Elucidating the Design Space of Diffusion-Based Generative Models", algorithm 1).
    """
    first = derivative(x, now)
    if method == "midpoint":
        middle = x + (then - now) / 2 * first
        return x + (then - now) * derivative(middle, (now + then) / 2)
    reached = x + (then - now) * first
    if method == "euler" or then == 0:
        return reached
    return x + (then - now) / 2 * (first + derivative(reached, then))


@torch.no_grad()
def integrate(derivative: Derivative, x: Tensor, times: Sequence[float], method: Method) -> Tensor:
    """x (B, ...) at the last of ``times``, from x at the first."""
    for now, then in itertools.pairwise(times):
        x = step(derivative, x, now, then, method)
    return x


@torch.no_grad()
def integrate_back(
    derivative: Derivative, x: Tensor, times: Sequence[float], method: Method, rounds: int = 4
) -> Tensor:
    """x at the first of ``times``, from which :func:`integrate` leads to x (B, ...) at the last.

    Each step is solved as :func:`integrate` takes it, by a fixed point: a multiple of what a step
    misses is taken from where it began. The multiple follows from the last two rounds (Barzilai and
    Borwein 1988, "Two-Point Step Size Gradient Methods", equation 5). Of each sample the round is
    kept from which the step leads back most closely.

    Args:
        derivative: as in :func:`integrate`.
        x: (B, ...).
        times: as in :func:`integrate`.
        method: as in :func:`integrate`.
        rounds: how often each step is tried; each costs what a step does.
    """
    for now, then in reversed(list(itertools.pairwise(times))):
        wanted = x
        best, least = x, torch.full((len(x), *[1] * (x.dim() - 1)), math.inf, device=x.device)
        # A step leaves then / now of the noise, and all that is certain about the image; in a step
        # to 0 all noise is lost.
        pace = torch.full_like(least, 2 / (1 + then / now) if then else 1.0)
        before: tuple[Tensor, Tensor] | None = None
        for _ in range(rounds):
            missed = step(derivative, x, now, then, method) - wanted
            residual = _dot(missed, missed)
            closer = residual < least
            best, least = torch.where(closer, x, best), torch.where(closer, residual, least)
            if before is not None:
                moved, changed = x - before[0], missed - before[1]
                along = _dot(moved, changed)
                pace = torch.where(along > 0, _dot(moved, moved) / along, pace)
            before = x, missed
            x = x - pace * missed
        # the last one is not tried: it is taken where every round came closer
        x = torch.where(closer, x, best)
    return x


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Of each sample, (B, 1, ...)."""
    return (a * b).sum(tuple(range(1, a.dim())), keepdim=True)
