"""Families outside dinogen that were written for 0.1, where the base class had every method.

What only some families can do is an ability now (:mod:`dinogen.families.abilities`), and the base
class has no such methods. Two kinds of family files would notice: those that call ``super()`` in a
method of an ability, and those that are conditioned by ``ask``, which switched a mode on and off.
Both get here what they had; all others are returned as they are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor

from dinogen.families.abilities import not_trained_with_text
from dinogen.families.base import Condition, Family, Health, Networks


class _Defaults:
    """What the base class had for each ability, for ``super()`` of a family that overrides it."""

    def new_parameters(self, network: str) -> set[str]:
        return set()

    def set_fade(self, networks: Networks, alpha: float, fading: bool) -> None:
        return

    def optimizer_scale(self, network: str) -> float:
        return 1.0

    def remember(self, phase: str, means: Mapping[str, Tensor]) -> None:
        return

    def after_step(self, nimg: int) -> None:
        return

    def describe(self) -> dict[str, Any]:
        return {}

    def constants(self) -> dict[str, float]:
        return {}

    def probe(self, networks: Networks, loss: float | None) -> Health:
        return Health()

    def held_out(self, networks: Networks, batch: Any) -> dict[str, Tensor]:
        return {}

    def measured(
        self: Any, networks: Networks, indices: Tensor, seed: int, shares: Sequence[float] | None
    ) -> Tensor:
        images: Tensor = self.sample(networks, indices, seed)
        return images

    headline: Any = property(lambda self: self.phases[-1].name)
    measured_as: Any = property(lambda self: {})
    truncates: Any = property(lambda self: False)

    def reconstruct(self, networks: Networks, batch: Any) -> None:
        return None

    def realism(self, images: Tensor) -> None:
        return None

    def first_layer(self, networks: Networks) -> None:
        return None

    def mix(
        self, networks: Networks, coarse: Tensor, fine: Tensor, indices: Tensor, seed: int
    ) -> None:
        return None

    def ask(self: Any, texts: Sequence[str], guidance: float, facts: Mapping[str, Any]) -> None:
        raise not_trained_with_text(self)


@dataclass(frozen=True)
class _Prompts(Condition):
    """What ``ask`` is called with; the family makes its own embeddings."""

    texts: tuple[str, ...] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)


class _MainLoss:
    """The main loss of a family that names it ``headline``."""

    main_loss: Any = property(lambda self: self.headline)


class _Asked:
    """Conditions for a family whose ``ask`` says what its samples are from then on."""

    def condition(
        self: Any, texts: Sequence[str], guidance: float, facts: Mapping[str, Any]
    ) -> Condition:
        """See ``Conditional``; the family refuses here what it cannot do."""
        self.ask(texts, guidance, facts)
        self.ask((), guidance, facts)
        return _Prompts(torch.empty(len(texts), 0), guidance, tuple(texts), facts)

    def sample(
        self: Any,
        networks: Networks,
        indices: Tensor,
        seed: int,
        condition: Condition | None = None,
    ) -> Tensor:
        """The family's own samples, between an ``ask`` and its end if there is a condition."""
        draw = super().sample  # type: ignore[misc]
        if not isinstance(condition, _Prompts):
            images: Tensor = draw(networks, indices, seed)
            return images
        self.ask(condition.texts, condition.guidance, condition.facts)
        try:
            images = draw(networks, indices, seed)
        finally:
            self.ask((), condition.guidance, condition.facts)
        return images


@cache
def with_earlier_members(family: type[Family]) -> type[Family]:
    """The family or, where it needs what the base class of 0.1 had, a subclass that has it.

    Args:
        family: from a file or a package of the user's own.
    """
    own = [
        cls
        for cls in family.__mro__
        if issubclass(cls, Family) and not cls.__module__.startswith("dinogen.")
    ]
    defined = {name for cls in own for name in vars(cls)}
    given = {name for cls in family.__mro__ if cls not in own for name in vars(cls)}
    wanted = {
        name: value
        for name, value in vars(_Defaults).items()
        if not name.startswith("__") and name in defined - given
    }
    bases: list[type] = [family]
    if "ask" in wanted and not hasattr(family, "condition"):
        bases.insert(0, _Asked)
    if "headline" in wanted:
        bases.insert(0, _MainLoss)
    if wanted:
        bases.append(type("EarlierDefaults", (), wanted))
    if bases == [family]:
        return family
    named = {"__module__": family.__module__, "__qualname__": family.__qualname__}
    return type(family.__name__, tuple(bases), named | {"__doc__": family.__doc__})
