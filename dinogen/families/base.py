"""What a family is: networks, phases, and how pictures come out of it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dinogen.config import Config, Section, StageConfig
from dinogen.errors import UserError
from shards.read.dataset import Dataset

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
        remembered: names of reported values, of any shape, whose means over the global batch
            are handed to ``Family.remember`` after the update.
        before: for losses that are no means over samples but look at the global batch as one:
            called once, without gradients, with all of the rank's microbatches and how many
            samples each counts (0: it stands for another's), which it may add entries to; all
            ranks call it, so it may use collectives.
        second_order: its losses hold derivatives of networks, such as a gradient penalty: it is
            left out of ``engine.compile``, which knows first derivatives alone.
    """

    name: str
    network: str
    losses: Callable[[Batch], tuple[Scalars, Scalars]]
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
        image_size: side of the pictures; None for none.
        levels: of the pyramids, such as ``p8`` or ``pixels.p8``.
        labels: whether there have to be some.
        bank: so many further samples, over all ranks, whose levels (no pictures) each step reads
            into ``batch["bank"]``; none if 0.
    """

    image_size: int | None
    levels: tuple[str, ...] = ()
    labels: bool = False
    bank: int = 0


@dataclass(frozen=True)
class Verdict:
    """What a probe of the samples found."""

    scalars: dict[str, float] = field(default_factory=dict)
    verdict: str = "ok"
    warnings: tuple[str, ...] = ()


class Family(ABC):
    """Everything that makes one kind of generator what it is; the trainer knows only this.

    Attributes:
        start: images that were shown before the stage began; set by who trains it.

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
        """Trained networks by name; what a family remembers is a buffer of one of them."""

    @property
    @abstractmethod
    def phases(self) -> tuple[Phase, ...]:
        """The updates of one step, in order."""

    @property
    def headline(self) -> str:
        """Name of the phase whose losses, summed, head the log; the last one unless told."""
        return self.phases[-1].name

    @property
    @abstractmethod
    def inputs(self) -> Inputs:
        """What the stream has to read."""

    @property
    def ema_networks(self) -> tuple[str, ...]:
        """Networks whose moving average is kept and sampled; the first is what is exported."""
        return ("G",)

    def begin(  # noqa: B027 - most have all they need
        self, data: Dataset
    ) -> None:
        """Get ready for training on ``data``: load frozen networks, check that levels fit.

        Raises:
            ConfigError: the shards lack what the family reads, or were made by another guide.
        """

    def sample(self, networks: Networks, indices: Tensor, seed: int) -> Tensor:
        """Pictures (N, 3, R, R) in [-1, 1] of sample numbers ``indices`` (N,) under ``seed``.

        The same number and seed give the same picture, whatever else is asked for.
        """
        return self.decode(networks, self.latents(indices, seed), indices, seed)

    def measured(
        self, networks: Networks, indices: Tensor, seed: int, shares: Sequence[float] | None
    ) -> Tensor:
        """Images as metrics are measured on; those of :meth:`sample` in most families.

        Where a family has classes, they are as frequent as in the data; where its generator takes
        noise beside the latent, each image has noise of its own, as in training.

        Args:
            networks: the moving averages.
            indices: (N,) int64 sample numbers.
            seed: of the draws.
            shares: of the classes in the data; None: each class in turn.

        Returns:
            (N, 3, R, R) float32 in [-1, 1]; the same for the same number, whatever else is asked.
        """
        return self.sample(networks, indices, seed)

    @property
    def measured_as(self) -> dict[str, Any]:
        """In what :meth:`measured` differs from :meth:`sample`, beside the classes' shares.

        Part of the fingerprint of what is measured; empty where there is no difference.
        """
        return {}

    @abstractmethod
    def latents(self, indices: Tensor, seed: int) -> Tensor:
        """What the pictures of sample numbers ``indices`` (N,) are made from.

        Returns:
            (N, ...) standard normal, on the device; what lies between two of them is a latent too.
        """

    def decode(
        self, networks: Networks, latents: Tensor, indices: Tensor, seed: int, psi: float = 1.0
    ) -> Tensor:
        """Pictures (N, 3, R, R) float32 in [-1, 1] of latents; here those of the first average.

        Args:
            networks: the moving averages.
            latents: (N, ...), as :meth:`latents` gives them or made from such.
            indices: (N,) int64: what else a picture depends on, such as its class, goes by them.
            seed: as in :meth:`sample`.
            psi: where the family :attr:`truncates`, how far from the mean: 0 the mean, 1 as far as
                samples go. It means nothing to other families.
        """
        images: Tensor = networks[self.ema_networks[0]](latents)
        return images.float()

    def ask(self, texts: Sequence[str], guidance: float, facts: Mapping[str, Any]) -> None:
        """From now on sample what prompts ask for.

        Args:
            texts: prompts; sample number i is asked for number i modulo their count. None of
                them: samples are what nobody asked for, as at first.
            guidance: 1 for what training asked for, more to exaggerate it, 0 for nothing.
            facts: what :meth:`describe` said in training.

        Raises:
            UserError: the family, or the run, knows no text.
        """
        raise UserError(
            f"family {self.config.family.name}: this run was not trained to be asked for anything: "
            "leave out --text, or train guided with family.text"
        )

    @property
    def truncates(self) -> bool:
        """Whether ``psi`` of :meth:`decode` says how far from the mean."""
        return False

    def reconstruct(self, networks: Networks, batch: Batch) -> Tensor | None:
        """What the moving averages make of ``batch["image"]``: its encoding, decoded.

        Returns:
            (N, 3, R, R) float32 in [-1, 1]; None if the family encodes nothing.
        """
        return None

    def realism(self, images: Tensor) -> Tensor | None:
        """How real the family's own discriminator finds pictures (N, 3, R, R) in [-1, 1].

        Returns:
            (N,) float32, higher for more real; no picture's figure depends on another. None if
            there is no discriminator.
        """
        return None

    def first_layer(self, networks: Networks) -> Tensor | None:
        """What the latent is multiplied by first, (out, z_dim).

        Its right singular vectors are the directions in which pictures change most (Shen and Zhou
        2021, "Closed-Form Factorization of Latent Semantics in GANs", section 3.2). None if the
        latent is no vector.
        """
        return None

    def mix(
        self, networks: Networks, coarse: Tensor, fine: Tensor, indices: Tensor, seed: int
    ) -> Tensor | None:
        """Pictures that are ``coarse`` in their lower resolutions and ``fine`` in the others.

        Args:
            networks: the moving averages.
            coarse: (N, ...) latents.
            fine: latents of the same shape.
            indices: (N,) int64, as in :meth:`decode`.
            seed: as in :meth:`decode`.

        Returns:
            (N, 3, R, R) float32 in [-1, 1]; None if the family has no styles to mix.
        """
        return None

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

    def optimizer_scale(self, network: str) -> float:
        """c: the network's optimizer gets lr * c and betas to the power of c.

        For networks that take further steps for lazy regularisers: k / (k + 1) for one each k
        steps (Karras et al. 2020, "Analyzing and Improving the Image Quality of StyleGAN",
        appendix B).
        """
        return 1.0

    def remember(  # noqa: B027 - most remember nothing
        self, phase: str, means: Scalars
    ) -> None:
        """Told after a phase's update what it reported under the names it ``remembered``.

        The means are over the global batch, alike on every rank up to floating-point order. What
        is kept of them belongs into buffers of the networks.
        """

    def after_step(self, nimg: int) -> None:  # noqa: B027 - most have nothing to do
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
        """Facts for results and pages (such as the guide), JSON-ready.

        ``frozen``: hashes, by key of the config, of weights that may not change within a run.
        """
        return {}


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
    """A discriminator's mean logit of each picture (N,) float32, one by one, as in evaluation.

    Batch norm and minibatch statistics would let a picture's neighbours have their say.

    Args:
        D: called with one picture (1, 3, R, R), and ``more``.
        images: (N, 3, R, R).
        more: what else D reads, of one picture.
    """
    was_training = D.training
    D.eval()
    try:
        return torch.stack([D(image[None], *more).float().mean() for image in images])
    finally:
        D.train(was_training)
