"""Finds a family: in this folder, among installed packages, or in a file of the user's own.

Those written for 0.1 are found too. There the base class had every method; what only some can do
is an ability now (:mod:`dinogen.families.abilities`), and the base class has no such methods. Two
kinds of family files would notice: those that call ``super()`` in a method of an ability, and those
that are conditioned by ``ask``, which switched a mode on and off. Both get here what they had.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from dinogen.config import Config, ConfigError, FamilyConfig, Section, describe_errors
from dinogen.families.base import Condition, Family, Health, Networks, not_trained_with_text
from dinogen.files import module_of_file

ENTRY_POINTS = "dinogen.families"
_NO_FAMILIES = {"abilities", "base", "denoiser", "gan", "latent", "registry"}


def family_names() -> list[str]:
    """Names of the families in this folder, and of those that installed packages offer."""
    folder = str(Path(__file__).parent)
    own = {m.name for m in pkgutil.iter_modules([folder])} - _NO_FAMILIES
    return sorted(own | set(_offered()))


def family_class(config: FamilyConfig) -> type[Family]:
    """The one Family subclass that a config names.

    Raises:
        ConfigError: there is no such family, file or class; names the nearest.
    """
    if config.file is not None:
        return _class_in_file(Path(config.file).absolute())
    offered = _offered()
    if config.name in offered:
        found = _one_family(offered[config.name].load(), f"entry point {config.name}")
        return with_earlier_members(found)
    names = family_names()
    if config.name not in names:
        near = get_close_matches(config.name, names, n=1)
        hint = f"did you mean '{near[0]}'?" if near else f"families: {', '.join(names)}"
        raise ConfigError(f"family.name: unknown family '{config.name}': {hint}")
    module = importlib.import_module(f"dinogen.families.{config.name}")
    return _one_family(module, module.__name__)


def family_options(config: Config) -> Section:
    """The checked options of the config's family, defaults filled in.

    Raises:
        ConfigError: an unknown key or a value out of range.
    """
    options = family_class(config.family).Options
    try:
        return options.model_validate(config.family.options)
    except ValidationError as error:
        raise ConfigError(describe_errors(error, options, "family")) from None


def resolve(config: Config) -> Config:
    """The config with the family's options checked and their defaults written out.

    Raises:
        ConfigError: an option of ``family:`` is unknown or out of range.
    """
    data = config.model_dump(mode="json")
    family = {"name": config.family.name, "file": config.family.file}
    data["family"] = family | family_options(config).model_dump(mode="json")
    return Config.model_validate(data)


@cache
def _offered() -> dict[str, EntryPoint]:
    """Entry points of installed packages by their names."""
    return {point.name: point for point in entry_points(group=ENTRY_POINTS)}


@cache
def _class_in_file(path: Path) -> type[Family]:
    """The family of a file outside the package, which is run once."""
    module = module_of_file(path, "family")
    return with_earlier_members(_one_family(module, str(path)))


def _one_family(found: ModuleType | type, source: str) -> type[Family]:
    """The family that an entry point names, or the one that a module defines.

    Raises:
        ConfigError: it defines none, or several.
    """
    if isinstance(found, type):
        if issubclass(found, Family):
            return found
        raise ConfigError(f"{source}: {found.__name__} is not a subclass of Family")
    classes = [
        item
        for item in vars(found).values()
        if isinstance(item, type) and issubclass(item, Family) and item.__module__ == found.__name__
    ]
    if len(classes) != 1:
        names = ", ".join(item.__name__ for item in classes) or "none"
        raise ConfigError(f"{source}: has to define one subclass of Family; found: {names}")
    return classes[0]


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
