"""Objectives that look at the whole global batch: gathered, and differentiated in parts.

Gradient caching (Gao et al. 2021, "Scaling Deep Contrastive Learning Batch Size under Memory
Limited Setup", section 3.2): the loss is differentiated to the features of all samples first; each
microbatch then goes through the generator with its own part of that gradient. So thousands of
samples are compared in the memory of one microbatch, and the gradient is that of the whole.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from dinogen.batch import Batch, Features, GradientCache, Losses, Scalars
from dinogen.distributed import process_group, rng
from dinogen.distributed.process_group import gather_counts, gather_rows
from dinogen.guidance.objectives import MAIN, Directions, SetTerm, View
from shards.format.sample import level_grid, level_guide
from shards.read import types as shards

# What generated and real samples were asked to be: (N, E) and (M, E).
Beside = tuple[Tensor, Tensor]

# Pairs of samples that are compared at once: some hundred megabytes of distances.
_MOST_PAIRS = 2**24


class JointObjective:
    """The weighted sum of terms that compare distributions, over all ranks and microbatches.

    Args:
        terms: by their titles.
        scales: per level, what each channel (C,) is multiplied by first.
        seed: of directions.
        batch: size of the global batch.
        features: of a microbatch's generated pictures.
        beside: (B, E) of a microbatch or a bank: what its samples were asked to be, in deviations
            of all dimensions together; what view ``map`` compares then is both as one.
    """

    def __init__(
        self,
        terms: Mapping[str, SetTerm],
        scales: Features,
        seed: int,
        batch: int,
        features: Callable[[Batch], Features],
        beside: Callable[[Batch], Tensor] | None = None,
    ) -> None:
        self.terms = terms
        self.scales = scales
        self.seed = seed
        self.batch = batch
        self.features = features
        self.beside = beside

    def before(self, micros: Sequence[tuple[Batch, int]]) -> None:
        """Phase.before: with several microbatches, find the gradients to all features first.

        The generator runs twice then; nothing in it may depend on how often it ran.
        """
        if len(micros) == 1:
            return
        parts = [
            {level: values[:num] for level, values in self.features(micro).items()}
            for micro, num in micros
        ]
        own = {level: torch.cat([part[level] for part in parts]) for level in parts[0]}
        del parts  # the largest thing here, in a batch of thousands
        counted: list[Batch] = [{**micro, **_cut(micro, num)} for micro, num in micros]
        found = self._find(own, counted)
        first = 0
        for micro, num in micros:
            # One that stands for another's sample counts nothing, but has to have a gradient.
            end = max(first + num, 1)
            micro["gradient_cache"] = found.rows(end - max(num, 1), end)
            first += num

    def losses(self, batch: Batch, features: Features) -> Losses:
        """Losses of the whole, with the gradient of this microbatch's part in it.

        Args:
            batch: the microbatch.
            features: of its generated pictures, with gradients.
        """
        found = batch.get("gradient_cache") or self._find(
            {level: values.detach() for level, values in features.items()}, [batch]
        )
        # A loss is a mean over samples to the engine: times B over n, it weighs it n over B.
        share = self.batch / len(batch["key"])
        surrogate = (
            share
            * torch.stack(
                [(features[level] * found.gradients[level]).sum() for level in found.gradients]
            ).sum()
        )
        losses = dict(found.losses)
        first = next(iter(losses))
        losses[first] = losses[first] + (surrogate - surrogate.detach())
        return losses, found.report

    def compare(
        self,
        generated: Features,
        real: Features,
        directions: Directions,
        beside: Beside | None = None,
    ) -> GradientCache:
        """What the terms find in features of two sets of samples, on one rank, without gathering.

        Args:
            generated: (N, places, C) by level.
            real: (M, places, C) by level.
            directions: see :class:`SlicedWasserstein`.
            beside: what both were asked to be, (N, E) and (M, E).
        """
        gradients = {level: torch.zeros_like(values) for level, values in generated.items()}
        losses: Scalars = {}
        report: Scalars = {}
        for title, term in self.terms.items():
            levels = [level for level in generated if is_of(level, term.guides)]
            share = term.weight / (len(levels) * len(term.views))
            total = torch.zeros((), device=next(iter(generated.values())).device)
            for level in levels:
                for view in term.views:
                    sides = (generated[level], real[level] * self.scales[level])
                    loss, gradient, more = self._compare(
                        term, self.scales[level], view, *sides, directions, beside
                    )
                    gradients[level] += share * gradient
                    total = total + share * loss
                    report[f"{title}.{level}.{view}"] = loss
                    report |= {f"{title}.{level}.{view}.{k}": v for k, v in more.items()}
            losses[title] = total
        return GradientCache(gradients, losses, report)

    def floors(self, real: Features) -> dict[str, float]:
        """What a perfect generator reaches, by title, from real features; where it is known."""
        floors: dict[str, float] = {}
        for title, term in self.terms.items():
            levels = [level for level in real if is_of(level, term.guides)]
            found = [
                _floor(term, problems(real[level] * self.scales[level], view))
                for level in levels
                for view in term.views
            ]
            known = [floor for floor in found if floor is not None]
            if len(known) == len(found):
                floors[title] = term.weight * sum(known) / len(known)
        return floors

    @staticmethod
    @torch.enable_grad()
    def _compare(
        term: SetTerm,
        scale: Tensor,
        view: View,
        generated: Tensor,
        real: Tensor,
        directions: Directions,
        beside: Beside | None,
    ) -> tuple[Tensor, Tensor, Scalars]:
        """One term on one view of one level: loss, its gradient to ``generated``, and more.

        Some places at a time, as many as memory may hold; ``real`` is scaled already.
        """
        theirs = problems(real, view)
        if view == "map" and beside is not None:
            theirs = _join(theirs, beside[1])
        gradient, total, more = torch.zeros_like(generated), real.new_zeros(()), Scalars()
        pairs = len(generated) * (len(generated) + len(real))
        block = max(1, _MOST_PAIRS // pairs) if view == "place" else 1
        for first in range(0, len(theirs), block):
            places = slice(first, first + block) if view == "place" else slice(None)
            leaf = generated[:, places].detach().requires_grad_()
            ours = problems(leaf * scale, view)
            if view == "map" and beside is not None:
                ours = _join(ours, beside[0])
            # Differences of distances are small beside them: half precision would lose them.
            with torch.autocast(leaf.device.type, enabled=False):
                loss, said = term.compare(ours, theirs[first : first + block], directions)
            part = len(ours) / len(theirs)
            gradient[:, places] = part * torch.autograd.grad(loss, leaf)[0]
            total = total + part * loss.detach()
            for name, value in said.items():
                more[name] = more.get(name, 0.0) + part * value.detach()
        return total, gradient, more

    def _find(self, own: Features, micros: Sequence[Batch]) -> GradientCache:
        """Gather all ranks' features, compare, and keep what belongs to this rank's."""
        positions = torch.cat([micro["position"] for micro in micros])
        num, bank = len(positions), micros[0].get("bank")
        counts = gather_counts(num)
        generated = {level: gather_rows(values, counts) for level, values in own.items()}
        theirs = counts if bank is None else gather_counts(len(bank["position"]))
        real = {level: gather_rows(_real(micros, level), theirs).float() for level in own}
        beside = None
        if self.beside is not None:
            mine = torch.cat([self.beside(micro) for micro in micros])
            asked = gather_rows(mine, counts)
            banked = None if bank is None else gather_rows(self.beside(bank), theirs)
            beside = (asked, asked if banked is None else banked)
        first = gather_rows(positions, counts).min().reshape(1)

        def directions(size: int, number: int) -> Tensor:
            device = next(iter(own.values())).device
            return rng.normal(self.seed, "slices", first, (size, number), device)[0]

        offset = sum(counts[: process_group.rank()])
        return self.compare(generated, real, directions, beside).rows(offset, offset + num)


def problems(features: Tensor, view: View) -> Tensor:
    """Features (N, places, C) as sets to be compared: (places, N, C), or one (1, N, places * C)."""
    return features.transpose(0, 1) if view == "place" else features.flatten(1)[None]


def real_features(batch: shards.Batch, level: str) -> Tensor:
    """Features of a batch's real pictures at a level such as ``p8`` or ``pixels.p8``."""
    guide = level_guide(level)
    pyramid = batch["guides"][guide] if guide else batch["pyramid"]
    found: Tensor = pyramid[level_grid(level)]
    return found


def _floor(term: SetTerm, sets: Tensor) -> float | None:
    """The term's floor, a mean over sets (K, M, D), of some at a time."""
    block = max(1, _MOST_PAIRS // sets.shape[1] ** 2)
    total = 0.0
    for part in sets.split(block):
        floor = term.floor(part)
        if floor is None:
            return None
        total += float(floor) * len(part)
    return total / len(sets)


def _join(features: Tensor, beside: Tensor) -> Tensor:
    """(1, N, D) features and (N, E) beside them, weighed as many dimensions as the features have.

    Distances are divided by the root of all dimensions, so that both keep their weights.
    """
    num, more = features.shape[2], beside.shape[1]
    joined = torch.cat([features, beside[None] * math.sqrt(num)], 2)
    return joined * math.sqrt((num + more) / num)


def _real(micros: Sequence[Batch], level: str) -> Tensor:
    """This rank's share of the reals: its bank or, without one, its part of the batch."""
    if "bank" in micros[0]:
        return real_features(micros[0]["bank"], level)
    return torch.cat([real_features(micro, level) for micro in micros])


def _cut(batch: Batch, num: int) -> Batch:
    """The first samples of what is compared of a batch."""
    cut: Batch = {"position": batch["position"][:num]}
    if "clip" in batch:
        cut["clip"] = batch["clip"][:num]
    if "text" in batch:
        cut["text"] = batch["text"][:num]
    if "pyramid" in batch:
        cut["pyramid"] = {grid: values[:num] for grid, values in batch["pyramid"].items()}
    if "guides" in batch:
        cut["guides"] = {
            name: {grid: values[:num] for grid, values in pyramid.items()}
            for name, pyramid in batch["guides"].items()
        }
    return cut


def is_of(level: str, guides: Sequence[str]) -> bool:
    """Whether a level's guide is among those named; all are if none is."""
    return not guides or (level_guide(level) or MAIN) in guides
