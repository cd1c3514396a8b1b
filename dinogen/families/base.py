"""What a family is: networks, phases, and how to sample; and how one is found by name."""

from __future__ import annotations

import importlib
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from dinogen.config import Config, ConfigError, Section, StageConfig, describe_errors
from shards.dataset import Dataset

Batch = dict[str, Any]
Scalars = dict[str, Tensor]
Networks = Mapping[str, nn.Module]


@dataclass(frozen=True)
class Phase:
    """One update: which network it trains, how its losses are computed, how often it runs.

    Attributes:
        name: used in logs.
        network: key in ``Family.networks``; every other network is frozen meanwhile.
        losses: batch -> (losses that are summed, values that are only reported); means over the
            batch, so that gradient accumulation and ranks can weigh them by their sample counts.
        every: runs at steps divisible by this.
    """

    name: str
    network: str
    losses: Callable[[Batch], tuple[Scalars, Scalars]]
    every: int = 1

    def due(self, step: int) -> bool:
        """Whether the phase runs at this step."""
        return step % self.every == 0


@dataclass(frozen=True)
class Inputs:
    """What the family reads of each sample."""

    image_size: int | None
    levels: tuple[str, ...] = ()


@dataclass(frozen=True)
class Verdict:
    """What a probe of the samples found."""

    scalars: dict[str, float] = field(default_factory=dict)
    verdict: str = "ok"
    warnings: tuple[str, ...] = ()


class Family(ABC):
    """Everything that makes one kind of generator what it is; the trainer knows only this.

    Args:
        config: the whole run.
        stage: the resolution that is built.
        device: where the networks live.

    Raises:
        ConfigError: an option of ``family:`` is unknown or out of range.
    """

    Options: type[Section] = Section

    def __init__(self, config: Config, stage: StageConfig, device: torch.device) -> None:
        self.config = config
        self.stage = stage
        self.device = device

    @property
    @abstractmethod
    def networks(self) -> dict[str, nn.Module]:
        """Trained networks by name; what a family remembers is a buffer of one of them."""

    @property
    @abstractmethod
    def phases(self) -> tuple[Phase, ...]:
        """The updates of one step, in order. The last one's losses head the log."""

    @property
    @abstractmethod
    def inputs(self) -> Inputs:
        """What the stream has to read."""

    @property
    def ema_networks(self) -> tuple[str, ...]:
        """Networks whose moving average is kept and sampled; the first is what is exported."""
        return ("G",)

    @abstractmethod
    def begin(self, data: Dataset) -> None:
        """Get ready for training on ``data``: load frozen networks, check that levels fit.

        Raises:
            ConfigError: the shards lack what the family reads, or were made by another guide.
        """

    @abstractmethod
    def sample(self, networks: Networks, indices: Tensor, seed: int) -> Tensor:
        """Pictures (N, 3, R, R) in [-1, 1] of sample numbers ``indices`` (N,) under ``seed``."""

    def arguments(self, network: str) -> dict[str, Any]:
        """What the network's class is called with, JSON-ready, to rebuild it elsewhere."""
        return {}

    def new_parameters(self, network: str) -> set[str]:
        """Names of the parameters that the stage before did not have."""
        return set()

    def trainable(self, network: str) -> set[str]:
        """Names of the parameters trained now; may change where the fade-in ends."""
        return {name for name, _ in self.networks[network].named_parameters()}

    def set_fade(  # noqa: B027 - most families do not grow
        self, networks: Networks, alpha: float, fading: bool
    ) -> None:
        """Told before each step how far the new block is faded in (alpha 0 to 1)."""

    def after_step(self, nimg: int) -> None:  # noqa: B027 - most remember nothing
        """Called after each step's updates."""

    def constants(self) -> dict[str, float]:
        """Lines drawn beside every curve of the stage, such as the collapse floor."""
        return {}

    def probe(self, networks: Networks, loss: float | None) -> Verdict:
        """Look at samples and judge them.

        Args:
            networks: the moving averages.
            loss: mean headline loss since the last log line, None before the first.
        """
        return Verdict()

    def held_out(self, networks: Networks, batch: Batch) -> Scalars:
        """Measure the moving averages on samples that nothing was learnt from.

        Args:
            networks: the moving averages.
            batch: what ``inputs`` says, of any size; ``position`` is each sample's number in its
                split, for draws with a purpose of their own.

        Returns:
            Means over the batch, the same names each time; empty if there is nothing to measure.
        """
        return {}

    def describe(self) -> dict[str, Any]:
        """Facts for results and pages (such as the guide), JSON-ready."""
        return {}


def family_names() -> list[str]:
    """Names of the families in this folder."""
    folder = str(Path(__file__).parent)
    return sorted(m.name for m in pkgutil.iter_modules([folder]) if m.name != "base")


def family_class(name: str) -> type[Family]:
    """The one Family subclass that ``dinogen/families/NAME.py`` defines.

    Raises:
        ConfigError: there is no such file; names the nearest.
    """
    names = family_names()
    if name not in names:
        near = get_close_matches(name, names, n=1)
        hint = f"did you mean '{near[0]}'?" if near else f"families: {', '.join(names)}"
        raise ConfigError(f"family.name: unknown family '{name}': {hint}")
    module = importlib.import_module(f"dinogen.families.{name}")
    found = [
        item
        for item in vars(module).values()
        if isinstance(item, type)
        and issubclass(item, Family)
        and item.__module__ == module.__name__
    ]
    (cls,) = found
    return cls


def family_options(config: Config) -> Section:
    """The checked options of the config's family, defaults filled in.

    Raises:
        ConfigError: an unknown key or a value out of range.
    """
    options = family_class(config.family.name).Options
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
    data["family"] = {"name": config.family.name} | family_options(config).model_dump(mode="json")
    return Config.model_validate(data)
