"""What a family is: networks, phases, and how images come out of it."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

# families outside dinogen import both from here
from dinogen.batch import Batch as Batch
from dinogen.batch import Losses
from dinogen.batch import Scalars as Scalars
from dinogen.config import Config, Section, StageConfig
from dinogen.errors import UserError
from shards.read.dataset import Dataset

Networks = Mapping[str, nn.Module]

# Diversity of samples over that of real images.
COLLAPSING_BELOW = 0.5
COLLAPSED_BELOW = 0.1


@dataclass(frozen=True)
class Phase:
    """One update: which network it trains, how its losses are computed, how often it runs.

    Attributes:
        name: used in logs.
        network: key in ``Family.networks``; every other network is frozen meanwhile.
        losses: batch -> (losses that are summed, values that are only reported); means over the
            batch, so that gradient accumulation and ranks can weigh them by their sample counts.
        every: runs at steps divisible by this.
        remembered: names of reported values, of any shape, whose means over the global batch
            are handed to ``Family.remember`` after the update (ability ``Remembers``).
        before: for losses that are not means over samples but depend on the whole global batch:
            called once, without gradients, with all of the rank's microbatches and how many
            samples each counts (0: a repeated sample), whose ``gradient_cache`` it may set;
            all ranks call it, so it may use collectives.
        second_order: its losses hold derivatives of networks, such as a gradient penalty: it is
            left out of ``engine.compile``, which knows first derivatives alone.
    """

    name: str
    network: str
    losses: Callable[[Batch], Losses]
    every: int = 1
    remembered: tuple[str, ...] = ()
    before: Callable[[Sequence[tuple[Batch, int]]], None] | None = None
    second_order: bool = False

    def due(self, step: int) -> bool:
        """Whether the phase runs at this step."""
        return step % self.every == 0


@dataclass(frozen=True)
class Inputs:
    """What the family reads of each sample.

    Attributes:
        image_size: side of the images; None if images are not read.
        levels: of the pyramids, such as ``p8`` or ``pixels.p8``.
        labels: whether samples must have labels.
        reference_batch: number of further samples, over all ranks, whose levels (no images) each
            step reads into ``batch["reference_batch"]``; 0 for none.
        per_class: samples of one class in a row in training batches, beginning with the stage; 0:
            samples of any class.
    """

    image_size: int | None
    levels: tuple[str, ...] = ()
    labels: bool = False
    reference_batch: int = 0
    per_class: int = 0


@dataclass(frozen=True)
class Condition:
    """What samples are conditioned on; a family with the ability ``Conditional`` makes one.

    Attributes:
        embeddings: (P, E); sample number i takes row i modulo P.
        guidance: 1 for what training was conditioned on, more to exaggerate it, 0 for nothing.
    """

    embeddings: Tensor
    guidance: float


@dataclass(frozen=True)
class Graph:
    """What is exported for runtimes that know nothing of dinogen.

    Attributes:
        module: called with the inputs in their order; gives one tensor (N, 3, R, R) float32.
        inputs: (sample numbers (N,) int64, seed) -> examples of the inputs by name, latents as
            ``Family.sample`` has them. The first dimension of each is N, but for scalars, which
            all images share.
        output: its name: ``images`` in [-1, 1], or what a step of a walk predicts.
        facts: what the inputs mean and how to use the output, JSON-ready.
    """

    module: nn.Module
    inputs: Callable[[Tensor, int], dict[str, Tensor]]
    output: str = "images"
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Health:
    """The result of examining samples.

    Attributes:
        scalars: by name, for the log.
        status: ``ok``, or a word such as ``COLLAPSED``.
        warnings: a sentence for each problem.
    """

    scalars: dict[str, float] = field(default_factory=dict)
    status: str = "ok"
    warnings: tuple[str, ...] = ()

    @classmethod
    def of_diversity(
        cls,
        diversity: float,
        remedy: str,
        scalars: Mapping[str, float] | None = None,
        found: str | None = None,
    ) -> Health:
        """The status that follows from how much samples differ.

        Args:
            diversity: of samples over that of real images; not finite: ``BROKEN``.
            remedy: what to try, with which each warning of a collapse ends.
            scalars: what else was measured, for the log.
            found: another sign of collapse, which makes it ``COLLAPSED`` at any diversity.
        """
        scalars = {"diversity": diversity, **(scalars or {})}
        if not math.isfinite(diversity):
            return cls(scalars, "BROKEN", ("BROKEN: loss or samples are not finite",))
        share = f"samples differ {diversity:.1%} as much as real images"
        status = "ok"
        if found is not None or diversity < COLLAPSED_BELOW:
            status = "COLLAPSED"
        elif diversity < COLLAPSING_BELOW:
            status = "COLLAPSING"
        if status == "ok":
            return cls(scalars)
        what = share if found is None else f"{found}; {share}"
        way_out = f"if this lasts beyond the first minutes, {remedy}"
        return cls(scalars, status, (f"{status}: {what}; {way_out}",))

    @property
    def verdict(self) -> str:
        """:attr:`status`, as family files for 0.1 call it."""
        return self.status


Verdict = Health  # as family files for 0.1 call it


class Family(ABC):
    """Everything that makes one kind of generator what it is; the trainer knows only this.

    Every family has these members. What only some can do is an ability, see
    :mod:`dinogen.families.abilities`: a family that defines its method has it.

    Attributes:
        start: images that were shown before the stage began; set by the trainer.

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
        self.start = 0

    @property
    @abstractmethod
    def networks(self) -> dict[str, nn.Module]:
        """Trained networks by name; state that a family keeps is in their buffers."""

    @property
    @abstractmethod
    def phases(self) -> tuple[Phase, ...]:
        """The updates of one step, in order; complete after :meth:`begin`."""

    @property
    def main_loss(self) -> str:
        """Name of the phase whose summed losses are the log's main loss; by default the last."""
        return self.phases[-1].name

    @property
    @abstractmethod
    def inputs(self) -> Inputs:
        """What the stream has to read."""

    @property
    def ema_networks(self) -> tuple[str, ...]:
        """Networks whose moving average is kept and sampled; the first is exported."""
        return ("G",)

    def begin(  # noqa: B027 - most have all they need
        self, data: Dataset
    ) -> None:
        """Get ready for training on ``data``: load frozen networks, check that levels fit.

        Raises:
            ConfigError: the shards lack what the family reads, or were made by another guide.
        """

    @abstractmethod
    def latents(self, indices: Tensor, seed: int) -> Tensor:
        """What the images of sample numbers ``indices`` (N,) are made from.

        Returns:
            (N, ...) standard normal, on the device; what lies between two of them is a latent too.
        """

    def decode(
        self, networks: Networks, latents: Tensor, indices: Tensor, seed: int, psi: float = 1.0
    ) -> Tensor:
        """Images (N, 3, R, R) float32 in [-1, 1] of latents; here those of the first average.

        Args:
            networks: the moving averages.
            latents: (N, ...), as :meth:`latents` gives them or made from such.
            indices: (N,) int64: what else an image depends on, such as its class, goes by them.
            seed: as in :meth:`sample`.
            psi: where the family truncates (ability ``Truncates``), how far from the mean: 0 the
                mean, 1 as far as samples go. It means nothing to other families.
        """
        images: Tensor = networks[self.ema_networks[0]](latents)
        return images.float()

    def sample(
        self, networks: Networks, indices: Tensor, seed: int, condition: Condition | None = None
    ) -> Tensor:
        """Images (N, 3, R, R) in [-1, 1] of sample numbers ``indices`` (N,) under ``seed``.

        The same number, seed and condition give the same image, whatever else is drawn with it.

        Args:
            networks: the moving averages.
            indices: (N,) int64 sample numbers.
            seed: of the draws.
            condition: made by a family with the ability ``Conditional``; no other takes one.

        Raises:
            UserError: a condition is given to a family that takes none.
        """
        if condition is not None:
            raise UserError(f"family {self.config.family.name}: its samples take no condition")
        return self.decode(networks, self.latents(indices, seed), indices, seed)

    def arguments(self, network: str) -> dict[str, Any]:
        """What the network's class is called with, JSON-ready, to rebuild it elsewhere."""
        return {}

    def trainable(self, network: str) -> set[str]:
        """Names of the parameters trained now; may change where the fade-in ends."""
        return {name for name, _ in self.networks[network].named_parameters()}


def classes_of(indices: Tensor, shares: Sequence[float]) -> Tensor:
    """Classes (N,) int64 of sample numbers, as frequent as ``shares`` among any run of numbers.

    Number i takes the class at the fractional part of i times the golden ratio, in whole numbers
    of 64 bits: of n numbers in a row a class has its share up to about log(n) / n.

    Args:
        indices: (N,) int64 sample numbers.
        shares: of the classes, not negative; their sum need not be 1.
    """
    step = np.uint64(0x9E3779B97F4A7C15)
    turned = indices.cpu().numpy().astype(np.uint64) * step  # modulo 2**64
    place = (turned >> np.uint64(11)).astype(np.float64) / 2.0**53
    edges = np.cumsum(np.asarray(shares, np.float64))
    found = np.searchsorted(edges / edges[-1], place, side="right")
    return torch.from_numpy(np.minimum(found, len(edges) - 1))


@torch.no_grad()
def judged_alone(D: nn.Module, images: Tensor, *more: Tensor) -> Tensor:
    """A discriminator's mean logit of each image (N,) float32, one by one, as in evaluation.

    With batch norm or minibatch statistics, an image's logit would depend on its neighbours.

    Args:
        D: called with one image (1, 3, R, R), and ``more``.
        images: (N, 3, R, R).
        more: what else D reads for one image.
    """
    was_training = D.training
    D.eval()
    try:
        return torch.stack([D(image[None], *more).float().mean() for image in images])
    finally:
        D.train(was_training)


@torch.no_grad()
def sample_in_parts(
    family: Family,
    networks: Networks,
    num: int,
    seed: int,
    part: int = 64,
    condition: Condition | None = None,
) -> Tensor:
    """Images 0 to ``num - 1`` under ``seed``, (N, 3, R, R) in [-1, 1] on the CPU.

    A family that takes no condition is not given one, so it need not know of it.
    """
    given = () if condition is None else (condition,)
    parts = [
        family.sample(networks, torch.arange(first, min(first + part, num)), seed, *given)
        for first in range(0, num, part)
    ]
    return torch.cat([images.float().cpu() for images in parts])


def not_trained_with_text(family: Family) -> UserError:
    """The error of a run that cannot be conditioned."""
    return UserError(
        f"family {family.config.family.name}: this run was not trained with text: leave out "
        "--text, or train guided with family.text"
    )
