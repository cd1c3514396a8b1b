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

from collections.abc import Callable, Sequence
from typing import Annotated, Literal

from pydantic import Field
from torch import Tensor

from dinogen.batch import Scalars
from dinogen.guidance.comparing import (
    Directions,
    DistributionObjective,
    PairObjective,
)
from dinogen.guidance.sets import View
from dinogen.losses.distributions import (
    Coordinates,
    drift,
    energy,
    energy_floor,
    mmd,
    mmd_floor,
    moments,
    sliced_wasserstein,
)
from dinogen.losses.drifting import Negatives, grouped_drift

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

Positive = Annotated[float, Field(gt=0)]


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
        ("global",),
        min_length=1,
        description="location, global, mean_std, patches: see the other objectives",
    )
    normalize: Literal["each", "together"] = Field(
        "each",
        description="distances and drifts are scaled for each location and class by itself, or for "
        "all of a view together",
    )

    def compare_sets(
        self,
        generated: Tensor,
        real: Tensor,
        directions: Directions,
        coordinates: Coordinates | None = None,
        negatives: Negatives | None = None,
        sum_over_ranks: Callable[[Tensor], Tensor] | None = None,
    ) -> tuple[Tensor, Scalars]:
        """See :func:`dinogen.losses.distributions.drift` and ``grouped_drift``."""
        if negatives is None and not self._together:
            loss, length = drift(generated, real, self.widths, coordinates)
        else:
            loss, length = grouped_drift(
                generated,
                real,
                self.widths,
                negatives,
                self._together,
                coordinates,
                sum_over_ranks,
            )
        return loss, {"length": length}

    @property
    def _together(self) -> bool:
        """See ``normalize``."""
        return self.normalize == "together"


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
