"""What objectives have in common: levels, views, blocks, and how ranks share a comparison."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from pydantic import Field, field_validator
from torch import Tensor

from dinogen.batch import Features, Scalars
from dinogen.config import Section
from dinogen.guidance.sets import (
    Conditions,
    Groups,
    Spread,
    View,
    append_conditions,
    full_precision,
    places_of,
    problems,
    regrouped,
    sets_of,
)
from dinogen.losses.distributions import Coordinates, with_known_gradients
from dinogen.losses.drifting import Negatives
from dinogen.losses.features import pyramid_mse
from shards.format.sample import level_guide

MAIN = "main"
# What 0.1 called them; configs of its runs still do.
_EARLIER_VIEWS = {"place": "location", "map": "global"}
# (dimension, number) -> (dimension, number) standard normal, the same on all ranks.
Directions = Callable[[int, int], Tensor]

# Pairs of samples that are compared at once: 256 MB of distances.
_MOST_PAIRS = 2**26


class Objective(Section):
    """What all objectives have."""

    weight: float = Field(1.0, gt=0, description="factor in the sum")
    guides: tuple[str, ...] = Field(
        (), description="whose features: main and names of guides:; default: all"
    )

    def levels(self, features: Mapping[str, Tensor]) -> list[str]:
        """The levels that this objective compares."""
        return [level for level in features if is_of(level, self.guides)]


class PairObjective(Objective):
    """Compares each generated image with the real one of its own sample."""

    normalize: bool = Field(
        False,
        description="divide each channel by its standard deviation over the data; default: "
        "features as the guide returns them",
    )

    def __call__(self, generated: Features, real: Features) -> Tensor:
        """The weighted mean squared error, a scalar.

        Args:
            generated: (B, locations, C) by level, with gradients.
            real: the same levels and shapes. ``normalize`` has no effect here: a
                :class:`dinogen.GuideSet` normalizes both.

        Raises:
            ValueError: none of the levels belongs to ``guides``.
        """
        _check_levels(self, generated, real)
        return self.weight * self.error(generated, real)

    def error(
        self,
        generated: Features,
        real: Features,
        scales: Features | None = None,
        keep: Tensor | None = None,
    ) -> Tensor:
        """The mean squared error without the weight, see :func:`pyramid_mse`.

        Args:
            generated: (B, locations, C) by level.
            real: the same levels and shapes.
            scales: per level, factors (C,) of the channels, applied if ``normalize`` is set.
            keep: (B,) bool, the samples that count; default: all.
        """
        sides: list[Features] = []
        for features in (generated, real):
            own = {level: features[level] for level in self.levels(features)}
            if self.normalize and scales is not None:
                own = {level: values * scales[level] for level, values in own.items()}
            sides.append(own)
        return pyramid_mse(sides[0], sides[1], keep)


class DistributionObjective(Objective):
    """Compares the distribution of generated features with that of real ones."""

    views: tuple[View, ...] = Field(
        ("location", "global"),
        min_length=1,
        description="location: the features at each location, compared separately; global: the "
        "features of all locations of a level as one vector; mean_std: their mean and standard "
        "deviation; patches: those of each patch of 2x2 and 4x4 locations",
    )

    @field_validator("views", mode="before")
    @classmethod
    def _earlier_views(cls, value: Any) -> Any:
        if not isinstance(value, list | tuple):
            return value
        return [_EARLIER_VIEWS.get(v, v) if isinstance(v, str) else v for v in value]

    def __call__(
        self, generated: Features, real: Features, directions: Directions | None = None
    ) -> Tensor:
        """The weighted loss, a scalar: the mean over levels and views.

        It is differentiable once, to ``generated``. Memory is bounded: locations are compared in
        blocks, and each block's gradient is computed at once.

        Args:
            generated: (N, locations, C) by level, N at least 2, with gradients.
            real: (M, locations, C), the same levels; M may differ from N.
            directions: for :class:`SlicedWasserstein`, see there; default: from torch's own random
                generator.

        Raises:
            ValueError: levels differ, none of them belongs to ``guides``, or there are fewer than
                two samples.
        """
        levels = _check_levels(self, generated, real)
        for name, features in (("generated", generated), ("real", real)):
            if len(features[levels[0]]) < 2:
                raise ValueError(
                    f"{type(self).__name__}: needs at least 2 {name} samples: use larger batches"
                )
        if directions is None:
            directions = _random_directions(generated[levels[0]].device)
        detached = {level: generated[level].detach() for level in levels}
        loss, gradients, _ = self.loss_and_gradients(detached, real, directions)
        return with_gradients(loss, generated, gradients)

    def floor(self, real: Features, scales: Features | None = None) -> float | None:
        """The weighted loss that a perfect generator reaches, estimated from real samples.

        Args:
            real: (M, locations, C) by level, M at least 2.
            scales: per level, factors (C,) of the channels.

        Returns:
            None if it is not known for this objective.
        """
        floors = [
            self._floor(sets.transpose(0, 1))
            for level in self.levels(real)
            for view in self.views
            for sets in places_of(
                real[level] * scales[level] if scales else real[level], view
            ).values()
        ]
        known = [floor for floor in floors if floor is not None]
        return self.weight * sum(known) / len(known) if len(known) == len(floors) else None

    def loss_and_gradients(
        self,
        generated: Features,
        real: Features,
        directions: Directions,
        conditions: Conditions | None = None,
        spread: Spread | None = None,
        groups: Groups | None = None,
    ) -> tuple[Tensor, Features, Scalars]:
        """Compute the loss and its gradient with respect to the generated features.

        Args:
            generated: (N, locations, C) by level.
            real: (M, locations, C) by level.
            directions: see :class:`SlicedWasserstein`.
            conditions: embeddings that both are conditioned on, (N, E) and (M, E), appended to the
                features of view ``global``: it then compares joint distributions.
            spread: over ranks. Features and gradients are those at this rank's locations, and
                conditions this rank's share of E. All ranks have to call it.
            groups: of samples that are compared among themselves alone; not with conditions.

        Returns:
            (the weighted loss; gradients of the levels that are compared; losses and other values
            of each level and view, unweighted). Where they are spread, each value is this rank's
            part, and the sum over ranks is the value.
        """
        levels = self.levels(generated)
        if spread is not None:
            sizes = spread.num_locations
        else:
            sizes = {level: generated[level].shape[1] for level in levels}
        grids = [math.isqrt(sizes[level]) for level in levels]
        share = self.weight / sum(len(sets_of(v, grid)) for grid in grids for v in self.views)
        gradients: Features = {}
        losses: list[Tensor] = []
        report: Scalars = {}
        for level in levels:
            sides = (generated[level], real[level])
            for view in self.views:
                parts: dict[str, tuple[Tensor, Scalars]]
                if view in ("mean_std", "patches") or groups is not None or self._together:
                    negatives = groups.negatives[level] if groups and groups.negatives else None
                    parts, found = self._compare_groups(
                        view, level, (*sides, negatives), directions, spread, groups, share
                    )
                elif view == "location":
                    loss, found, more = self._compare_locations(
                        *sides, directions, sizes[level], share
                    )
                    parts = {view: (loss, more)}
                else:
                    loss, found, more = self._compare_whole(
                        *sides, directions, conditions, spread, level, share
                    )
                    parts = {view: (loss, more)}
                gradients[level] = gradients[level] + found if level in gradients else found
                for name, (loss, more) in parts.items():
                    losses.append(loss)
                    report[f"{level}.{name}"] = loss
                    report |= {f"{level}.{name}.{key}": value for key, value in more.items()}
        return torch.stack(losses).sum() * share, gradients, report

    def compare_sets(
        self,
        generated: Tensor,
        real: Tensor,
        directions: Directions,
        coordinates: Coordinates | None = None,
    ) -> tuple[Tensor, Scalars]:
        """(loss, other values to plot) of sets (K, N, D) and (K, M, D): the mean of K problems.

        Args:
            generated: (K, N, D).
            real: (K, M, D).
            directions: see :class:`SlicedWasserstein`.
            coordinates: given where D is spread over ranks; values are then this rank's part. An
                objective without this argument has all coordinates gathered for it.
        """
        raise NotImplementedError

    def floor_of_sets(self, real: Tensor) -> Tensor | None:
        """The loss that a perfect generator reaches, from real sets (K, M, D); None if unknown."""
        return None

    def _compare_locations(
        self,
        generated: Tensor,
        real: Tensor,
        directions: Directions,
        num_locations: int,
        share: float,
    ) -> tuple[Tensor, Tensor, Scalars]:
        """View ``location`` of one level, in blocks of locations that fit into memory.

        Args:
            generated: (N, locations, C), at this rank's locations.
            real: (M, locations, C).
            directions: see :class:`SlicedWasserstein`.
            num_locations: on all ranks.
            share: factor of the gradient.

        Returns:
            Loss, gradient and other values, each this rank's part.
        """
        own = generated.shape[1]
        if not own:  # only the names count, which are the same on all ranks
            ours, theirs = (x.new_zeros(1, len(x), x.shape[2]) for x in (generated, real))
            loss, _, more = self._differentiate(ours, theirs, directions, share)
            empty = {name: torch.zeros_like(value) for name, value in more.items()}
            return torch.zeros_like(loss), torch.zeros_like(generated), empty
        num_blocks = math.ceil(own * len(generated) * (len(generated) + len(real)) / _MOST_PAIRS)
        num_blocks = min(num_blocks, own)
        gradient, total = torch.empty_like(generated) if num_blocks > 1 else generated, Scalars()
        for block in range(num_blocks):
            chosen = slice(own * block // num_blocks, own * (block + 1) // num_blocks)
            ours, theirs = (problems(x[:, chosen], "location") for x in (generated, real))
            part = (chosen.stop - chosen.start) / num_locations
            loss, found, more = self._differentiate(ours, theirs, directions, share * part)
            if num_blocks == 1:
                gradient = found.transpose(0, 1)
            else:
                gradient[:, chosen] = found.transpose(0, 1)
            for name, value in {"": loss, **more}.items():
                total[name] = total[name].add(value, alpha=part) if block else value * part
        return total.pop(""), gradient, total

    def _compare_whole(
        self,
        generated: Tensor,
        real: Tensor,
        directions: Directions,
        conditions: Conditions | None,
        spread: Spread | None,
        level: str,
        share: float,
    ) -> tuple[Tensor, Tensor, Scalars]:
        """View ``global`` of one level: loss, gradient and other values, each this rank's part."""
        sides, coordinates = (generated, real), None
        gathered = None if self._spreads else spread
        if gathered is not None:
            sides, conditions = gathered.whole(level, sides, conditions)
        elif spread is not None:
            coordinates = spread.coordinates(level, generated.shape[2])
        ours, theirs = (side.flatten(1)[None] for side in sides)
        num, factor = ours.shape[2], 1.0
        if conditions is not None:
            num_features, num_more = num, conditions[0].shape[1]
            if spread is not None and coordinates is not None:
                num_more = spread.num_conditions
                num_features = coordinates.total - num_more
            factor = math.sqrt(1 + num_more / num_features)
            ours = append_conditions(ours, conditions[0], num_features, factor)
            theirs = append_conditions(theirs, conditions[1], num_features, factor)
        loss, found, more = self._differentiate(
            ours, theirs, directions, share * factor, coordinates
        )
        found = found[0, :, :num].reshape(sides[0].shape)
        if gathered is not None:
            ranks = gathered.ranks
            found = found[:, ranks.share(found.shape[1])]
            loss, more = loss / ranks.num, {name: value / ranks.num for name, value in more.items()}
        return loss, found, more

    def _compare_groups(
        self,
        view: View,
        level: str,
        sides: tuple[Tensor, Tensor, Tensor | None],
        directions: Directions,
        spread: Spread | None,
        groups: Groups | None,
        share: float,
    ) -> tuple[dict[str, tuple[Tensor, Scalars]], Tensor]:
        """Any view of one level: within groups, of parts of the grid, or normalised together.

        Means and deviations of parts of the grid are few numbers: all ranks compare them alike.

        Args:
            view: which.
            level: its name.
            sides: generated, real and negative features, at this rank's locations.
            directions: see :class:`SlicedWasserstein`.
            spread: over ranks.
            groups: None for a single one.
            share: factor of the gradient of each set.

        Returns:
            Loss and other values of each set, by its name, and the gradient of all; this rank's
            part.
        """
        coordinates, at = None, spread if view == "location" else None
        gathered = None
        if spread is not None and view == "global" and self._spreads:
            coordinates = spread.coordinates(level, sides[0].shape[2])
        elif spread is not None and view != "location":
            gathered, num = spread.ranks, spread.num_locations[level]
            ours, theirs, others = (s if s is None else gathered.whole(s, num) for s in sides)
            assert ours is not None
            assert theirs is not None
            sides = (ours, theirs, others)
        leaf = sides[0].detach().requires_grad_()
        with torch.enable_grad():
            generated = places_of(leaf, view)
        real = places_of(sides[1], view)
        negatives = {} if sides[2] is None else places_of(sides[2], view)
        parts: dict[str, tuple[Tensor, Scalars]] = {}
        gradients = []
        for name, places in generated.items():
            sets = (places.detach(), real[name], negatives.get(name))
            loss, found, more = self._compare_places(
                level, sets, directions, at, coordinates, groups, share
            )
            if gathered is not None:
                loss = loss / gathered.num
                more = {key: value / gathered.num for key, value in more.items()}
            parts[name] = (loss, more)
            gradients.append(found)
        (gradient,) = torch.autograd.grad(list(generated.values()), leaf, gradients)
        if gathered is not None:
            gradient = gradient[:, gathered.share(gradient.shape[1])]
        return parts, gradient

    def _compare_places(
        self,
        level: str,
        sides: tuple[Tensor, Tensor, Tensor | None],
        directions: Directions,
        spread: Spread | None,
        coordinates: Coordinates | None,
        groups: Groups | None,
        share: float,
    ) -> tuple[Tensor, Tensor, Scalars]:
        """One set within groups, at each place separately, in blocks that fit into memory.

        Args:
            level: its name.
            sides: generated, real and negative samples, (samples, P, D).
            directions: see :class:`SlicedWasserstein`.
            spread: over ranks, if places are.
            coordinates: held here, if D is spread over ranks.
            groups: None for a single one.
            share: factor of the gradient.

        Returns:
            Loss, gradient (N, P, D) and other values, each this rank's part.
        """
        num_groups = groups.num if groups is not None else 1
        ours, theirs = (regrouped(side, num_groups) for side in sides[:2])
        given: dict[str, Any] = {}
        if sides[2] is not None and groups is not None and groups.weights is not None:
            others = sides[2].transpose(0, 1)
            given["negatives"] = Negatives(
                others.repeat(num_groups, 1, 1), groups.weights.repeat_interleave(len(others))
            )
        if self._together:
            if spread is not None:
                given["sum_over_ranks"] = spread.ranks.sum
            loss, found, more = self._differentiate(
                ours, theirs, directions, share, coordinates, given
            )
            return loss, regrouped(found, num_groups), more
        num_all = num_groups * (spread.num_locations[level] if spread else sides[0].shape[1])
        if not len(ours):  # only the names count, which are the same on all ranks
            empty = [x.new_zeros(1, *x.shape[1:]) for x in (ours, theirs)]
            loss, _, more = self._differentiate(empty[0], empty[1], directions, share)
            more = {name: torch.zeros_like(value) for name, value in more.items()}
            return torch.zeros_like(loss), torch.zeros_like(sides[0]), more
        size = max(1, _MOST_PAIRS // (ours.shape[1] * (ours.shape[1] + theirs.shape[1])))
        found, total = torch.empty_like(ours), Scalars()
        for first in range(0, len(ours), size):
            block = slice(first, first + size)
            part = len(ours[block]) / num_all
            own = {name: one.rows(block) for name, one in given.items()}
            loss, found[block], more = self._differentiate(
                ours[block], theirs[block], directions, share * part, coordinates, own
            )
            for name, value in {"": loss, **more}.items():
                total[name] = total[name].add(value, alpha=part) if first else value * part
        return total.pop(""), regrouped(found, num_groups), total

    @torch.enable_grad()
    def _differentiate(
        self,
        generated: Tensor,
        real: Tensor,
        directions: Directions,
        factor: float,
        coordinates: Coordinates | None = None,
        more: Mapping[str, Any] | None = None,
    ) -> tuple[Tensor, Tensor, Scalars]:
        """Loss of sets, its gradient to ``generated`` times a factor, and other values.

        ``more`` are further arguments of ``compare_sets``.
        """
        leaf = generated.detach().requires_grad_()
        # Differences of distances are small next to them: half precision would lose them.
        with torch.autocast(leaf.device.type, enabled=False), full_precision():
            given = dict(more or {})
            if coordinates is not None:
                given["coordinates"] = coordinates
            loss, others = self.compare_sets(leaf, real, directions, **given)
            (gradient,) = torch.autograd.grad(loss, leaf, torch.full_like(loss, factor))
        return loss.detach(), gradient, {name: value.detach() for name, value in others.items()}

    @property
    def _together(self) -> bool:
        """Whether all problems of a set are normalised together."""
        return False

    @property
    def repels(self) -> bool:
        """Whether ``compare_sets`` takes negatives: further samples to move away from."""
        return "negatives" in inspect.signature(self.compare_sets).parameters

    @property
    def _spreads(self) -> bool:
        """Whether ``compare_sets`` can do with this rank's coordinates."""
        return "coordinates" in inspect.signature(self.compare_sets).parameters

    def _floor(self, sets: Tensor) -> float | None:
        """The mean floor over sets (K, M, D), computed in blocks that fit into memory."""
        block = max(1, _MOST_PAIRS // sets.shape[1] ** 2)
        total = 0.0
        for part in sets.split(block):
            floor = self.floor_of_sets(part)
            if floor is None:
                return None
            total += float(floor) * len(part)
        return total / len(sets)


def is_of(level: str, guides: Sequence[str]) -> bool:
    """Whether a level's guide is among those named; every guide is if none is named."""
    return not guides or (level_guide(level) or MAIN) in guides


def with_gradients(
    loss: Tensor, features: Features, gradients: Features, factor: float = 1.0
) -> Tensor:
    """A loss of this value whose gradients with respect to the features are those given.

    Args:
        loss: scalar; it has no gradient itself.
        features: by level, with gradients.
        gradients: by level, of the same shapes.
        factor: of the gradients.
    """
    levels = list(gradients)
    scaled = [gradients[level] if factor == 1 else gradients[level] * factor for level in levels]
    return with_known_gradients(loss, [features[level] for level in levels], scaled)


def _random_directions(device: torch.device) -> Directions:
    def draw(size: int, number: int) -> Tensor:
        return torch.randn(size, number, device=device)

    return draw


def _check_levels(objective: Objective, generated: Features, real: Features) -> list[str]:
    """The levels that an objective compares, which both sides have to have."""
    levels = objective.levels(generated)
    if not levels or levels != [level for level in levels if level in real]:
        raise ValueError(
            f"{type(objective).__name__}: no features to compare: generated ones have the levels "
            f"{', '.join(generated) or 'none'}, real ones {', '.join(real) or 'none'}, and guides "
            f"are {', '.join(objective.guides) or 'all'}"
        )
    return levels
