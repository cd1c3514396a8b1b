"""The objectives: options of a config, and callables over features, each of them a loss.

```python
objective = dinogen.objectives.Drift()
loss = objective(guides(images), guides.real(batch))
```

``guides`` is a :class:`dinogen.GuideSet`. Features are dicts by level, such as ``p8`` or
``pixels.p8``, of tensors (N, g * g, C); the number of generated images may differ from that of real
ones wherever distributions are compared. Add objectives with ``+``, or use
:class:`dinogen.guidance.weighted.WeightedObjectives` for microbatches and several ranks.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor

from dinogen.batch import Features, Scalars
from dinogen.config import Section
from dinogen.guidance.sets import (
    Conditions,
    Spread,
    View,
    append_conditions,
    full_precision,
    problems,
)
from dinogen.losses.distributions import (
    Coordinates,
    drift,
    energy,
    energy_floor,
    mmd,
    mmd_floor,
    moments,
    sliced_wasserstein,
    with_known_gradients,
)
from dinogen.losses.features import pyramid_mse
from shards.format.sample import level_guide

__all__ = [
    "DistributionObjective",
    "Drift",
    "Energy",
    "Mmd",
    "Mse",
    "PairObjective",
    "Paired",
    "SlicedWasserstein",
]

MAIN = "main"
# What 0.1 called them; configs of its runs still do.
_EARLIER_VIEWS = {"place": "location", "map": "global"}
# (dimension, number) -> (dimension, number) standard normal, the same on all ranks.
Directions = Callable[[int, int], Tensor]
Positive = Annotated[float, Field(gt=0)]

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


class Mse(PairObjective):
    """Mean squared error against a random real image: the original experiment.

    It collapses: its best answer is the same image for every z, see
    :func:`dinogen.losses.features.pyramid_mse`.
    """

    name: Literal["mse"] = "mse"


class Paired(PairObjective):
    """Mean squared error where each sample has its own z, drawn from its key or learnt.

    Bojanowski et al. 2018, "Optimizing the Latent Space of Generative Networks". In a loop of your
    own, the generated image of a sample has to be made from that sample's z.
    """

    name: Literal["paired"] = "paired"
    num_latents: int = Field(
        0,
        ge=0,
        description="number of training images, each of which gets a learnt latent; 0: z is drawn "
        "from the sample's key",
    )
    latent_rate: float = Field(
        10.0, gt=0, description="learning rate of the latents, as a multiple of the generator's"
    )


class DistributionObjective(Objective):
    """Compares the distribution of generated features with that of real ones."""

    views: tuple[View, ...] = Field(
        ("location", "global"),
        min_length=1,
        description="location: the features at each location, compared separately; global: the "
        "features of all locations of a level as one vector",
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
            self._floor(problems(real[level] * scales[level] if scales else real[level], view))
            for level in self.levels(real)
            for view in self.views
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

        Returns:
            (the weighted loss; gradients of the levels that are compared; losses and other values
            of each level and view, unweighted). Where they are spread, each value is this rank's
            part, and the sum over ranks is the value.
        """
        levels = self.levels(generated)
        share = self.weight / (len(levels) * len(self.views))
        gradients: Features = {}
        losses: list[Tensor] = []
        report: Scalars = {}
        for level in levels:
            sides = (generated[level], real[level])
            for view in self.views:
                if view == "location":
                    num = spread.num_locations[level] if spread else sides[0].shape[1]
                    loss, found, more = self._compare_locations(*sides, directions, num, share)
                else:
                    loss, found, more = self._compare_whole(
                        *sides, directions, conditions, spread, level, share
                    )
                gradients[level] = gradients[level] + found if level in gradients else found
                losses.append(loss)
                report[f"{level}.{view}"] = loss
                report |= {f"{level}.{view}.{name}": value for name, value in more.items()}
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

    @torch.enable_grad()
    def _differentiate(
        self,
        generated: Tensor,
        real: Tensor,
        directions: Directions,
        factor: float,
        coordinates: Coordinates | None = None,
    ) -> tuple[Tensor, Tensor, Scalars]:
        """Loss of sets, its gradient to ``generated`` times a factor, and other values."""
        leaf = generated.detach().requires_grad_()
        # Differences of distances are small next to them: half precision would lose them.
        with torch.autocast(leaf.device.type, enabled=False), full_precision():
            if coordinates is None:
                loss, others = self.compare_sets(leaf, real, directions)
            else:
                loss, others = self.compare_sets(leaf, real, directions, coordinates)
            (gradient,) = torch.autograd.grad(loss, leaf, torch.full_like(loss, factor))
        return loss.detach(), gradient, {name: value.detach() for name, value in others.items()}

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


class Energy(DistributionObjective):
    """Energy distance, unbiased (Szekely and Rizzo 2013).

    See :func:`dinogen.losses.distributions.energy`.
    """

    name: Literal["energy"] = "energy"

    def compare_sets(
        self,
        generated: Tensor,
        real: Tensor,
        directions: Directions,
        coordinates: Coordinates | None = None,
    ) -> tuple[Tensor, Scalars]:
        """See :func:`dinogen.losses.distributions.energy`."""
        return energy(generated, real, coordinates), {}

    def floor_of_sets(self, real: Tensor) -> Tensor:
        """E|r - r'|."""
        return energy_floor(real)


class Mmd(DistributionObjective):
    """Maximum mean discrepancy, unbiased (Gretton et al. 2012), and optionally moments.

    See :func:`dinogen.losses.distributions.mmd`.
    """

    name: Literal["mmd"] = "mmd"
    bandwidths: tuple[Positive, ...] = Field(
        (0.25, 0.5, 1.0),
        min_length=1,
        description="widths of the Gaussian kernels, in standard deviations of a channel",
    )
    moments: float = Field(
        1.0,
        ge=0,
        description="weight of the differences in each channel's mean and standard deviation",
    )

    def compare_sets(
        self,
        generated: Tensor,
        real: Tensor,
        directions: Directions,
        coordinates: Coordinates | None = None,
    ) -> tuple[Tensor, Scalars]:
        """See :func:`dinogen.losses.distributions.mmd`, and ``moments`` there."""
        loss = mmd(generated, real, self.bandwidths, coordinates)
        if not self.moments:
            return loss, {}
        apart = moments(generated, real, coordinates)
        return loss + self.moments * apart, {"moments": apart}

    def floor_of_sets(self, real: Tensor) -> Tensor:
        """-E k(r, r'), without the bias of the moments."""
        return mmd_floor(real, self.bandwidths)


class SlicedWasserstein(DistributionObjective):
    """Sliced Wasserstein distance (Bonneel et al. 2015).

    It is the only objective that reads ``directions``: a function of (dimension, number) that
    returns as many standard normal vectors as columns, new ones in each step and the same on all
    ranks. See :func:`dinogen.losses.distributions.sliced_wasserstein`.
    """

    name: Literal["sliced_wasserstein"] = "sliced_wasserstein"
    num_slices: int = Field(128, ge=1, description="number of random directions per step")

    def compare_sets(
        self,
        generated: Tensor,
        real: Tensor,
        directions: Directions,
        coordinates: Coordinates | None = None,
    ) -> tuple[Tensor, Scalars]:
        """See :func:`dinogen.losses.distributions.sliced_wasserstein`."""
        size = coordinates.total if coordinates else generated.shape[2]
        chosen = directions(size, self.num_slices)
        return sliced_wasserstein(generated, real, chosen, coordinates), {}


class Drift(DistributionObjective):
    """Generative drifting (Deng et al. 2026): moves samples towards nearby real ones and away from
    nearby generated ones.

    The value of the loss is scaled to stay near its start, so watch another one, such as
    :class:`Energy`. See :func:`dinogen.losses.distributions.drift`.
    """

    name: Literal["drift"] = "drift"
    widths: tuple[Positive, ...] = Field(
        (0.02, 0.05, 0.2),
        min_length=1,
        description="widths of the kernels, in mean distances between samples",
    )
    views: tuple[View, ...] = Field(
        ("global",), min_length=1, description="location, global: see the other objectives"
    )

    def compare_sets(
        self,
        generated: Tensor,
        real: Tensor,
        directions: Directions,
        coordinates: Coordinates | None = None,
    ) -> tuple[Tensor, Scalars]:
        """See :func:`dinogen.losses.distributions.drift`."""
        loss, length = drift(generated, real, self.widths, coordinates)
        return loss, {"length": length}


AnyObjective = Annotated[
    Mse | Paired | Energy | Mmd | SlicedWasserstein | Drift, Field(discriminator="name")
]


def titles(objectives: Sequence[AnyObjective]) -> list[str]:
    """A name for each objective's curve: its own, numbered from the second of a name on."""
    found: list[str] = []
    for i, objective in enumerate(objectives):
        number = sum(before.name == objective.name for before in objectives[:i])
        found.append(f"{objective.name}_{number + 1}" if number else objective.name)
    return found


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
