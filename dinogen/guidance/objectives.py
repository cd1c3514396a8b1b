"""The objectives that a config can name, each with its options; their sum is what is trained."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, Literal

from pydantic import Field
from torch import Tensor

from dinogen.config import Section
from dinogen.losses.distributions import (
    drift,
    energy,
    energy_floor,
    mmd,
    mmd_floor,
    moments,
    sliced_wasserstein,
)

MAIN = "main"
View = Literal["place", "map"]
# (dimension, number) -> (dimension, number) standard normal, alike on all ranks.
Directions = Callable[[int, int], Tensor]
Positive = Annotated[float, Field(gt=0)]


class Term(Section):
    """What all objectives have."""

    weight: float = Field(1.0, gt=0, description="factor in the sum")
    guides: tuple[str, ...] = Field(
        (), description="whose features: main and names of guides:; all unless given"
    )


class PairTerm(Term):
    """Compares each generated picture with the real one of its own sample."""

    normalize: bool = Field(
        False, description="each channel by its deviation over the data; else as the guide made it"
    )


class Mse(PairTerm):
    """Mean squared error against a random real picture: the original experiment."""

    name: Literal["mse"] = "mse"


class Paired(PairTerm):
    """Mean squared error with z tied to the sample (Bojanowski et al. 2018, "Optimizing the
    Latent Space of Generative Networks"): drawn from its key, or learnt for each of them."""

    name: Literal["paired"] = "paired"
    num_latents: int = Field(
        0,
        ge=0,
        description="a learnt latent for each training picture: how many there are; 0: z is drawn "
        "from the key",
    )
    latent_rate: float = Field(
        10.0, gt=0, description="learning rate of learnt latents over that of the generator"
    )


class SetTerm(Term):
    """Compares the distribution of generated features with that of real ones."""

    views: tuple[View, ...] = Field(
        ("place", "map"),
        min_length=1,
        description="place: features of each place; map: of all places of a level as one",
    )

    def compare(
        self, generated: Tensor, real: Tensor, directions: Directions
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """(loss, what else is worth a curve) of sets (K, N, D) and (K, M, D), K problems."""
        raise NotImplementedError

    def floor(self, real: Tensor) -> Tensor | None:
        """What a perfect generator reaches, from real samples (K, M, D); None if not known."""
        return None


class Energy(SetTerm):
    """Energy distance without bias, see :mod:`dinogen.losses.distributions`."""

    name: Literal["energy"] = "energy"

    def compare(
        self, generated: Tensor, real: Tensor, directions: Directions
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """As :func:`dinogen.losses.distributions.energy`."""
        return energy(generated, real), {}

    def floor(self, real: Tensor) -> Tensor:
        """E|r - r'|."""
        return energy_floor(real)


class Mmd(SetTerm):
    """Maximum mean discrepancy without bias, see :mod:`dinogen.losses.distributions`."""

    name: Literal["mmd"] = "mmd"
    bandwidths: tuple[Positive, ...] = Field(
        (0.25, 0.5, 1.0), min_length=1, description="of Gaussian kernels, in channel deviations"
    )
    moments: float = Field(
        1.0, ge=0, description="weight of the channels' means and deviations beside it"
    )

    def compare(
        self, generated: Tensor, real: Tensor, directions: Directions
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """As :func:`dinogen.losses.distributions.mmd`, and the moments."""
        loss = mmd(generated, real, self.bandwidths)
        if not self.moments:
            return loss, {}
        apart = moments(generated, real)
        return loss + self.moments * apart, {"moments": apart}

    def floor(self, real: Tensor) -> Tensor:
        """-E k(r, r'); the moments' bias comes on top."""
        return mmd_floor(real, self.bandwidths)


class SlicedWasserstein(SetTerm):
    """Sliced Wasserstein distance, see :mod:`dinogen.losses.distributions`."""

    name: Literal["sliced_wasserstein"] = "sliced_wasserstein"
    num_slices: int = Field(128, ge=1, description="random directions, new ones each step")

    def compare(
        self, generated: Tensor, real: Tensor, directions: Directions
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """As :func:`dinogen.losses.distributions.sliced_wasserstein`."""
        towards = directions(generated.shape[2], self.num_slices)
        return sliced_wasserstein(generated, real, towards), {}


class Drift(SetTerm):
    """Generative drifting, see :mod:`dinogen.losses.distributions`."""

    name: Literal["drift"] = "drift"
    widths: tuple[Positive, ...] = Field(
        (0.02, 0.05, 0.2), min_length=1, description="of kernels, in mean distances"
    )
    views: tuple[View, ...] = Field(("map",), min_length=1, description="as of the others")

    def compare(
        self, generated: Tensor, real: Tensor, directions: Directions
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """As :func:`dinogen.losses.distributions.drift`."""
        loss, length = drift(generated, real, self.widths)
        return loss, {"length": length}


AnyTerm = Annotated[
    Mse | Paired | Energy | Mmd | SlicedWasserstein | Drift, Field(discriminator="name")
]


def titles(terms: Sequence[AnyTerm]) -> list[str]:
    """A name for each term's curve: its own and, from the second of a name on, its number."""
    found: list[str] = []
    for i, term in enumerate(terms):
        number = sum(before.name == term.name for before in terms[:i])
        found.append(f"{term.name}_{number + 1}" if number else term.name)
    return found
