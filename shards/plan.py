"""What each batch consists of: samples of one or several datasets, and the rows they fill."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from shards.order import Ints, Order, Place


@dataclass(frozen=True)
class Portion:
    """Samples of one dataset within a batch.

    Attributes:
        number: of the dataset.
        places: where its samples lie; `position` is that in its own order.
        rows: which rows of the batch they fill.
    """

    number: int
    places: Place
    rows: list[int]


@dataclass(frozen=True)
class Plan:
    """One batch, or a rank's part of it.

    Attributes:
        position: global positions, one per row.
        portions: who fills the rows; each row is filled once.
    """

    position: Ints
    portions: list[Portion]


class Shares(Protocol):
    """What one dataset has to give to a run of batches.

    Attributes:
        num_samples: positions within which all of it is shown.
    """

    num_samples: int

    @property
    def window_span(self) -> int:
        """Positions within which one window of its order is shown."""
        ...

    def shares(
        self, start: int, batch_size: int, rank: int, world_size: int, num_batches: int
    ) -> list[Place]:
        """As `Order.shares`."""
        ...


class Planner(Protocol):
    """An endless order of samples of one or several datasets.

    Attributes:
        num_samples: length of an epoch.
    """

    num_samples: int

    def plans(
        self, start: int, batch_size: int, rank: int, world_size: int, num_batches: int
    ) -> list[Plan]:
        """One rank's part of `num_batches` global batches that follow position `start`."""
        ...

    def only(self, number: int) -> Shares:
        """The part of one of the datasets."""
        ...


class Alone:
    """The order of one dataset."""

    def __init__(self, order: Order) -> None:
        self._order = order
        self.num_samples = order.num_samples

    def plans(
        self, start: int, batch_size: int, rank: int, world_size: int, num_batches: int
    ) -> list[Plan]:
        """One rank's part of `num_batches` global batches that follow position `start`."""
        shares = self._order.shares(start, batch_size, rank, world_size, num_batches)
        return [
            Plan(place.position, [Portion(0, place, list(range(len(place.position))))])
            for place in shares
        ]

    def only(self, number: int) -> Shares:
        """The order itself."""
        return self._order
