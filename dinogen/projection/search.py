"""Searches the latents of images: gradient descent through a generator that stays as it is."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional as F

from dinogen.distributed import rng
from dinogen.errors import UserError
from dinogen.families.abilities import LatentSpace, decode_in, to_space
from dinogen.families.base import Family, Networks
from dinogen.projection.loss import Loss, Seen

# Karras et al. 2020, "Analyzing and Improving the Image Quality of StyleGAN", appendix D
NUM_SAMPLES = 10_000
LR = 0.1
LR_RAMP_UP, LR_RAMP_DOWN = 0.05, 0.25
SPREAD, SPREAD_UNTIL = 0.05, 0.75
NOISE_WEIGHT = 1e5
_SMALLEST_NOISE = 8
# A latent longer than a normal one of its size is drawn back by this times the excess squared.
PRIOR_WEIGHT = 1.0
# Samples that each search in z may start from.
NUM_CANDIDATES = 256
PART = 64


@dataclass
class Found:
    """What a search found.

    Attributes:
        latents: (N, *shape) on the device.
        noise: (N, values of the maps) on the device, or None.
        errors: the loss of each image, by step, (steps, N) on the CPU.
        frames: images (N, 3, R, R) on the CPU, at some of the steps.
    """

    latents: Tensor
    noise: Tensor | None
    errors: Tensor
    frames: list[Tensor] = field(default_factory=list)


@dataclass(frozen=True)
class Searcher:
    """Searches one space of a generator.

    Attributes:
        family: its networks make the images.
        networks: the moving averages, which get no gradients.
        space: in which latents are searched.
        loss: what is made small.
        seed: of all random numbers.
        label: class that the images are made of, where the family has classes.
        steps: of each search.
        restarts: searches of each image in a space whose samples are normal, where a search often
            ends in a local minimum: they start from the samples that are nearest to it, and the
            best end is kept. In other spaces there is one, from the mean.
        num_frames: how many images of the way are kept.
    """

    family: Family
    networks: Networks
    space: LatentSpace
    loss: Loss
    seed: int
    label: int
    steps: int
    restarts: int = 1
    num_frames: int = 60

    def search(
        self,
        wanted: Tensor,
        positions: Tensor,
        start: Tensor | None = None,
        progress: Callable[[int], None] = lambda step: None,
    ) -> Found:
        """Search the latents of images, all together and each for itself.

        As in Karras et al. 2020, appendix D: Adam, from the mean of w, with a rate that is ramped
        up and down, w disturbed by noise that fades out, maps of noise that are searched too, kept
        free of correlation and brought back to mean 0 and variance 1 after each step.

        Args:
            wanted: the images (N, 3, R, R) in [-1, 1], on the device.
            positions: (N,) int64, a number of each image's own, for its random numbers.
            start: (N, *shape) where the search begins, undisturbed; None as :attr:`restarts` says.
            progress: called with the number of steps done.

        Raises:
            UserError: no gradient reaches the latents.
        """
        num = len(wanted)
        restarts = self.restarts if start is None and self.space.normal else 1
        if start is not None:
            latents, spread = start.detach().clone(), 0.0
        elif self.space.normal:
            latents = self._nearest(wanted, restarts)
            spread = SPREAD * math.sqrt(math.prod(self.space.shape))
        else:
            mean, deviation = self.statistics
            latents, spread = mean.expand(num, *self.space.shape).clone(), SPREAD * deviation
        with torch.no_grad():
            targets = self.loss.seen(wanted.repeat_interleave(restarts, 0))
        noise = self._first_noise(positions)
        searched = [one.requires_grad_() for one in (latents, noise) if one is not None]
        optimizer = torch.optim.Adam(searched, lr=LR, betas=(0.9, 0.999))
        shown = _spread_over(self.steps, self.num_frames)
        errors, frames = [], []
        for step in range(self.steps):
            at = step / self.steps
            optimizer.param_groups[0]["lr"] = LR * ramp(at)
            disturbed = latents
            if spread:
                drawn = self._draw(f"project/{step}", positions, restarts)
                disturbed = latents + drawn * spread * max(0.0, 1 - at / SPREAD_UNTIL) ** 2
            made = self.decode(disturbed, noise)
            found = self.loss.between(self.loss.seen(made), targets)
            if not found.requires_grad:
                raise UserError(
                    f"family {self.family.config.family.name}: no gradient reaches its latents in "
                    f"{self.space.name}, so photos cannot be projected into this run"
                )
            total = found.sum() + self._penalties(latents, noise).sum()
            gradients = torch.autograd.grad(total, searched)
            errors.append(found.detach())
            if step in shown:
                best = found.detach().view(num, restarts).argmin(1)
                rows_of_best = torch.arange(num, device=best.device) * restarts + best
                frames.append(made.detach()[rows_of_best].cpu())
            for one, gradient in zip(searched, gradients, strict=True):
                one.grad = gradient
            optimizer.step()
            if noise is not None:
                normalize_noise(noise.data, self.space.noise_sides)
            progress(step + 1)
        return self._best(num, latents, noise, targets, errors, frames)

    @cached_property
    @torch.no_grad()
    def statistics(self) -> tuple[Tensor, float]:
        """Mean (*shape) of samples of the space, and their root mean square distance from it."""
        parts = [
            self._to_space(torch.arange(first, min(first + 1000, NUM_SAMPLES)))
            for first in range(0, NUM_SAMPLES, 1000)
        ]
        mean = sum(part.sum(0) for part in parts) / NUM_SAMPLES
        assert isinstance(mean, Tensor)
        distances = [(part - mean).square().sum(-1).view(len(part), -1) for part in parts]
        squares = sum(float(one.mean(1).sum()) for one in distances)
        return mean, math.sqrt(squares / NUM_SAMPLES)

    def _to_space(self, numbers: Tensor) -> Tensor:
        z = self.family.latents(numbers, self.seed)
        found = to_space(self.family, self.networks, self.space.name, z, numbers)
        # of a space per layer samples have the same row in each, and one is enough to sum
        return found[:, :1] if self.space.per_layer else found

    def decode(self, latents: Tensor, noise: Tensor | None) -> Tensor:
        """Images (N, 3, R, R) float32 of latents of the space, with a gradient to them."""
        indices = torch.full((len(latents),), self.label)
        name = self.space.name
        return decode_in(self.family, self.networks, name, latents, indices, noise).float()

    def _draw(self, purpose: str, positions: Tensor, restarts: int) -> Tensor:
        shape = (restarts, *self.space.shape)
        return rng.normal(self.seed, purpose, positions, shape, self.family.device).flatten(0, 1)

    @torch.no_grad()
    def _nearest(self, wanted: Tensor, restarts: int) -> Tensor:
        """Of a few hundred samples the latents (N * restarts, ...) nearest to each image."""
        numbers = torch.arange(max(NUM_CANDIDATES, restarts))
        targets = [self.loss.seen(one) for one in wanted.split(1)]
        losses = []
        for part in numbers.split(PART):
            made = self.loss.seen(self.decode(self.family.latents(part, self.seed), None))
            losses.append(torch.stack([self.loss.between(made, one) for one in targets]))
        nearest = torch.cat(losses, 1).topk(restarts, largest=False).indices.flatten().cpu()
        return self.family.latents(numbers[nearest], self.seed)

    def _first_noise(self, positions: Tensor) -> Tensor | None:
        sides = self.space.noise_sides
        if not sides:
            return None
        shape = (sum(side**2 for side in sides),)
        return rng.normal(self.seed, "project/noise", positions, shape, self.family.device)

    def _penalties(self, latents: Tensor, noise: Tensor | None) -> Tensor:
        """What keeps latents and noise as samples are, one value or (N,)."""
        found = latents.new_zeros(1)
        if self.space.normal:
            excess = F.relu(latents.flatten(1).square().mean(1) - 1)
            found = found + PRIOR_WEIGHT * excess.square()
        if noise is not None:
            found = found + NOISE_WEIGHT * correlation(noise, self.space.noise_sides)
        return found

    @torch.no_grad()
    def _best(
        self,
        num: int,
        latents: Tensor,
        noise: Tensor | None,
        targets: Seen,
        errors: Sequence[Tensor],
        frames: list[Tensor],
    ) -> Found:
        """The end of the best search of each image."""
        latents = latents.detach()
        noise = None if noise is None else noise.detach()
        made = self.decode(latents, noise)
        last = self.loss.between(self.loss.seen(made), targets).view(num, -1)
        restarts = last.shape[1]
        best = torch.arange(num, device=last.device) * restarts + last.argmin(1)
        by_step = torch.stack(list(errors)).cpu()[:, best.cpu()]
        return Found(latents[best], noise, by_step, [*frames, made[best].cpu()])


def ramp(at: float) -> float:
    """The share of the learning rate at a point of the search from 0 to 1."""
    down = min(1.0, (1 - at) / LR_RAMP_DOWN)
    down = 0.5 - 0.5 * math.cos(down * math.pi)
    return down * min(1.0, at / LR_RAMP_UP)


def _maps(noise: Tensor, sides: Sequence[int]) -> list[Tensor]:
    """Rows (N, values) as maps (N, 1, side, side), which share their memory."""
    parts = noise.split([side**2 for side in sides], 1)
    return [part.unflatten(1, (1, side, side)) for part, side in zip(parts, sides, strict=True)]


def correlation(noise: Tensor, sides: Sequence[int]) -> Tensor:
    """How much neighbours in maps of noise agree, at each size down to 8x8, (N,).

    Karras et al. 2020, "Analyzing and Improving the Image Quality of StyleGAN", appendix D: squared
    means of the products of each value with its neighbours, summed over a pyramid of 2x2 means.

    Args:
        noise: (N, values of all maps).
        sides: of the maps.
    """
    found = noise.new_zeros(len(noise))
    for one in _maps(noise, sides):
        level = one
        while True:
            for axis in (2, 3):
                found = found + (level * level.roll(1, axis)).mean((1, 2, 3)).square()
            if level.shape[-1] <= _SMALLEST_NOISE:
                break
            level = F.avg_pool2d(level, 2)
    return found


def normalize_noise(noise: Tensor, sides: Sequence[int]) -> None:
    """Bring each map (N, values of all maps) to mean 0 and variance 1, where it is."""
    for part in noise.split([side**2 for side in sides], 1):
        part -= part.mean(1, keepdim=True)
        part *= part.square().mean(1, keepdim=True).rsqrt()


def _spread_over(steps: int, num: int) -> set[int]:
    """At most ``num`` steps, more of them early, where images change most."""
    if steps <= num:
        return set(range(steps))
    return {round(steps * (i / num) ** 1.5) for i in range(num)}
