"""What only some families can do: a small protocol each, which callers test with isinstance.

A family has an ability when it defines the protocol's members; it inherits from nothing and
registers nowhere. A method returns None where the family, as configured, has nothing to give; each
protocol says where that is allowed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from dinogen.batch import Batch, Scalars
from dinogen.errors import ConfigError
from dinogen.families.base import Condition, Family, Graph, Health, Networks, not_trained_with_text
from shards.read.dataset import Dataset

# --- training


@runtime_checkable
class Grows(Protocol):
    """A stage starts from the networks of the stage before and adds parameters to them."""

    def new_parameters(self, network: str) -> set[str]:
        """Names of the parameters that the stage before did not have."""


@runtime_checkable
class FadesIn(Protocol):
    """What is new of a stage is blended in over its first images."""

    def set_fade(self, networks: Networks, alpha: float, fading: bool) -> None:
        """Set how far the new block is faded in (alpha 0 to 1); called before each step."""


@runtime_checkable
class ScalesOptimizer(Protocol):
    """Some networks have more than one update a step."""

    def optimizer_scale(self, network: str) -> float:
        """c: the network's optimizer gets lr * c and betas to the power of c.

        For networks with further steps for lazy regularisers: k / (k + 1) for one each k steps
        (Karras et al. 2020, "Analyzing and Improving the Image Quality of StyleGAN", appendix B).
        """


@runtime_checkable
class Remembers(Protocol):
    """Means over the global batch are kept from step to step, in buffers of the networks."""

    def remember(self, phase: str, means: Scalars) -> None:
        """Called after a phase's update with what it reported under the names it ``remembered``.

        The means are over the global batch, and the same on every rank up to floating-point order.
        Whatever is kept of them belongs in buffers of the networks.
        """


@runtime_checkable
class FollowsSteps(Protocol):
    """Something is done once per step, regardless of its phases."""

    def after_step(self, nimg: int) -> None:
        """Called after each step's updates, with the images shown so far."""


@runtime_checkable
class RunsFrozen(Protocol):
    """Its losses run through networks that are not trained, such as guides."""

    @property
    def frozen(self) -> Sequence[nn.Module]:
        """The networks, complete after ``Family.begin``; ``engine.compile`` compiles them too."""


@runtime_checkable
class Describes(Protocol):
    """There are facts worth storing with the trained weights, such as which guide was used."""

    def describe(self) -> dict[str, Any]:
        """Facts for results and pages, JSON-ready.

        ``frozen``: hashes, by key of the config, of weights that may not change within a run.
        """


@runtime_checkable
class ChecksData(Protocol):
    """The manifest tells whether data fit, before a job is queued or anything is loaded."""

    def check_data(self, data: Dataset) -> None:
        """Raise a ConfigError that names the key that does not fit the data, and what would."""


@runtime_checkable
class Recalls(Protocol):
    """What its samples need besides the networks is named in the facts of a checkpoint."""

    def recall(self, facts: Mapping[str, Any], folder: Path) -> None:
        """Take what :class:`Describes` said in training; ``folder`` is that of the run or file."""


@runtime_checkable
class HasConstants(Protocol):
    """Some values are the same at every step of a stage."""

    def constants(self) -> dict[str, float]:
        """Horizontal lines drawn in every loss plot of the stage, such as the collapse floor."""


@runtime_checkable
class OrdersLayers(Protocol):
    """The layers of a network, such as a discriminator, have an order that begins at the image."""

    def layers(self, network: str) -> Sequence[Set[str]]:
        """The layers of a network that can be frozen, from the image inwards.

        Freeze-D: Mo et al. 2020, "Freeze the Discriminator: a Simple Baseline for Fine-Tuning
        GANs".

        Returns:
            Names of the parameters of each layer; empty for a network without such an order.
        """


# --- measuring


@runtime_checkable
class Probes(Protocol):
    """Samples are examined while a stage trains."""

    def probe(self, networks: Networks, loss: float | None) -> Health:
        """What the family finds in samples of the moving averages.

        Args:
            networks: the moving averages.
            loss: mean main loss since the last log line, None before the first.
        """


@runtime_checkable
class MeasuresHeldOut(Protocol):
    """There is a loss that can be measured on samples that were not trained on."""

    def held_out(self, networks: Networks, batch: Batch) -> Scalars:
        """Measure the moving averages on held-out samples.

        Args:
            networks: the moving averages.
            batch: what ``inputs`` says, of any size; ``position`` is each sample's number in its
                split, for random numbers with a purpose of their own.

        Returns:
            Means over the batch, the same names each time.
        """


@runtime_checkable
class DrawsForMetrics(Protocol):
    """Images for metrics are generated differently from samples."""

    def measured(
        self, networks: Networks, indices: Tensor, seed: int, shares: Sequence[float] | None
    ) -> Tensor:
        """Images that metrics are measured on.

        If the family has classes, they are as frequent as in the data; if its generator takes
        noise as well as a latent, each image gets its own noise, as in training.

        Args:
            networks: the moving averages.
            indices: (N,) int64 sample numbers.
            seed: of the random numbers.
            shares: of the classes in the data; None cycles through the classes.

        Returns:
            (N, 3, R, R) float32 in [-1, 1]; an image depends on its number alone.
        """


@runtime_checkable
class NamesItsDraws(Protocol):
    """How images for metrics are generated is part of the fingerprint."""

    @property
    def measured_as(self) -> dict[str, Any]:
        """How :class:`DrawsForMetrics` differs from samples, apart from the classes' shares."""


# --- drawing


@runtime_checkable
class Truncates(Protocol):
    """``decode`` takes ``psi``, the distance from the mean latent."""

    @property
    def truncates(self) -> bool:
        """False if the family, as configured, ignores ``psi``."""


@runtime_checkable
class HasClasses(Protocol):
    """Sample number i is of class i modulo the number of classes."""

    @property
    def num_classes(self) -> int:
        """0 if the family, as configured, has no classes."""


@runtime_checkable
class AdjustsSampling(Protocol):
    """How samples are drawn can be changed after training."""

    def with_sampling(self, changes: Mapping[str, Any]) -> Family:
        """The same family, drawing otherwise; the networks are shared, and nothing is changed.

        Args:
            changes: ``steps``, ``sampler`` and ``guidance``, or some of them.

        Raises:
            UserError: a value is out of range, or means nothing to the family as configured.
        """


@runtime_checkable
class LimitsSampling(Protocol):
    """Of the changes of :class:`AdjustsSampling`, only some mean something to it."""

    @property
    def adjustable(self) -> frozenset[str]:
        """Which of ``steps``, ``sampler`` and ``guidance``, as the family is configured."""


@runtime_checkable
class AddsNoise(Protocol):
    """Noise may be added on the way, so that an image does not follow from its latent alone."""

    @property
    def without_noise(self) -> Mapping[str, Any]:
        """What ``with_sampling`` takes to add none."""


@runtime_checkable
class Reconstructs(Protocol):
    """It encodes images, and decodes what it encoded."""

    def reconstruct(self, networks: Networks, batch: Batch) -> Tensor | None:
        """Encode ``batch["image"]`` with the moving averages, and decode the result.

        Returns:
            (N, 3, R, R) float32 in [-1, 1]; None if there is no encoder.
        """


@runtime_checkable
class Varies(Protocol):
    """It generates images from features, and so others with the features of a photo."""

    def variations(
        self, networks: Networks, batch: Batch, indices: Tensor, seed: int
    ) -> Tensor | None:
        """Images with the features of those of a batch.

        Args:
            networks: the moving averages.
            batch: of N samples, with what ``inputs`` says but images.
            indices: (N,) int64 sample numbers: all but the features goes by them.
            seed: as in ``Family.sample``.

        Returns:
            (N, 3, R, R) float32 in [-1, 1]; None if the family, as configured, generates images
            from noise alone.
        """


@runtime_checkable
class HasCritic(Protocol):
    """A discriminator of its own says how real an image is."""

    def realism(self, images: Tensor) -> Tensor | None:
        """How real the family's own discriminator finds images (N, 3, R, R) in [-1, 1].

        Returns:
            (N,) float32, higher for more real; each value depends on its image alone. None if
            there is no discriminator.
        """


@runtime_checkable
class HasFirstLayer(Protocol):
    """The first layer multiplies the latent by a matrix."""

    def first_layer(self, networks: Networks) -> Tensor | None:
        """The matrix that multiplies the latent first, (out, z_dim).

        Its right singular vectors are the directions in which images change most (Shen and Zhou
        2021, "Closed-Form Factorization of Latent Semantics in GANs", section 3.2). None if
        there is no such matrix.
        """


@runtime_checkable
class MixesStyles(Protocol):
    """The lower resolutions of one sample can be joined with the higher ones of another."""

    def mix(
        self, networks: Networks, coarse: Tensor, fine: Tensor, indices: Tensor, seed: int
    ) -> Tensor | None:
        """Images that are ``coarse`` in their lower resolutions and ``fine`` in the others.

        Args:
            networks: the moving averages.
            coarse: (N, ...) latents.
            fine: latents of the same shape.
            indices: (N,) int64, as in ``Family.decode``.
            seed: as in ``Family.decode``.

        Returns:
            (N, 3, R, R) float32 in [-1, 1]; None if there are no styles to mix.
        """


@dataclass(frozen=True)
class LatentSpace:
    """Latents of one kind that a family makes images from.

    Attributes:
        name: ``z`` for those of ``Family.latents``; ``w``, ``w+`` and so on for others.
        shape: of one latent.
        per_layer: whether the first axis counts layers of the generator, each of which reads a
            row; such latents can be mixed by ranges of layers.
        normal: whether samples of it are standard normal.
        noise_sides: sides of the square maps of noise that the decoder takes with each latent; all
            their values are one row. Empty if it takes none.
    """

    name: str
    shape: tuple[int, ...]
    per_layer: bool = False
    normal: bool = False
    noise_sides: tuple[int, ...] = ()


@runtime_checkable
class HasLatentSpaces(Protocol):
    """Images can be made from more than the latents of ``Family.latents``."""

    @property
    def spaces(self) -> tuple[LatentSpace, ...]:
        """The further spaces, the one in which a photo is projected best last."""

    def to_space(
        self, networks: Networks, space: str, latents: Tensor, indices: Tensor, psi: float = 1.0
    ) -> Tensor:
        """Latents of a further space that give the images that ``Family.decode`` makes.

        Args:
            networks: the moving averages.
            space: name of one of ``spaces``.
            latents: (N, ...), as ``Family.latents`` draws them.
            indices: (N,) int64, as in ``Family.decode``.
            psi: as in ``Family.decode``.

        Returns:
            (N, *shape) of the space.
        """

    def decode_in(
        self, networks: Networks, space: str, latents: Tensor, noise: Tensor | None = None
    ) -> Tensor:
        """Images (N, 3, R, R) float32 of latents (N, *shape), differentiable; about [-1, 1].

        Args:
            networks: the moving averages.
            space: name of one of ``spaces``.
            latents: of that space.
            noise: (N, values of all maps of ``noise_sides``); None for the noise of samples.
        """

    def space_matrix(self, networks: Networks, space: str) -> Tensor | None:
        """What multiplies latents of the space first, (out, last axis of its shape); or None.

        See :class:`HasFirstLayer`, which is the same for ``z``.
        """


@runtime_checkable
class Inverts(Protocol):
    """It computes the latents of images, without a search."""

    @property
    def inverts_by(self) -> str:
        """How, in a few words for results."""

    @property
    def refines(self) -> bool:
        """Whether ``Family.decode`` passes gradients on, so that a search can go on from there."""

    def invert(self, networks: Networks, images: Tensor, indices: Tensor) -> Tensor:
        """Latents, as ``Family.latents`` draws them, of which ``Family.decode`` makes ``images``.

        Args:
            networks: the moving averages.
            images: (N, 3, R, R) in [-1, 1].
            indices: (N,) int64, as in ``Family.decode``.
        """


@runtime_checkable
class Conditional(Protocol):
    """Samples can be conditioned on text."""

    def condition(
        self, texts: Sequence[str], guidance: float, facts: Mapping[str, Any]
    ) -> Condition:
        """The condition with which ``Family.sample`` generates what prompts describe.

        Args:
            texts: one prompt or more; sample number i takes number i modulo their count.
            guidance: see :class:`Condition`.
            facts: what :class:`Describes` said in training.

        Raises:
            UserError: this run was not trained with text, or with a different CLIP.
        """


@runtime_checkable
class HasGraph(Protocol):
    """What makes its images, or a step towards them, is a graph of tensors but not G(z) alone."""

    def graph(self, networks: Networks) -> Graph | None:
        """What is exported of the moving averages; it shares their weights.

        Returns:
            None if G(latents) is all there is to it.
        """


# --- for callers that need an answer from every family


def facts_of(family: Family) -> dict[str, Any]:
    """What :class:`Describes` returns; empty for other families."""
    return family.describe() if isinstance(family, Describes) else {}


def new_parameters_of(family: Family, network: str) -> set[str]:
    """What :class:`Grows` adds to a network; empty for other families."""
    return family.new_parameters(network) if isinstance(family, Grows) else set()


def trained_parameters(family: Family, network: str, freeze: Mapping[str, int]) -> set[str]:
    """Names of the parameters that train now: all that the family trains, less frozen layers.

    Args:
        family: with the ability :class:`OrdersLayers`, if a layer is frozen.
        network: its name.
        freeze: number of layers that are frozen, by network, as in the config.

    Raises:
        ConfigError: ``freeze`` is for a network whose layers have no order, has more layers than
            the network, or leaves none that trains.
    """
    names = family.trainable(network)
    num = freeze.get(network, 0)
    if not num:
        return names
    key, name = f"freeze.{network}", family.config.family.name
    layers = family.layers(network) if isinstance(family, OrdersLayers) else ()
    if not layers:
        raise ConfigError(
            f"{key}: the layers of {network} of family {name} have no order from the image "
            "inwards: leave it out"
        )
    if num > len(layers):
        raise ConfigError(
            f"{key}: {num} layers, but {network} of family {name} at {family.stage.resolution} "
            f"pixels has {len(layers)} that can be frozen: use at most {len(layers)}"
        )
    return names.difference(*layers[:num])


def constants_of(family: Family) -> dict[str, float]:
    """What :class:`HasConstants` returns; empty for other families."""
    return family.constants() if isinstance(family, HasConstants) else {}


def fade(family: Family, networks: Networks, alpha: float, fading: bool) -> None:
    """Set how far the networks are faded in, if the family fades in."""
    if isinstance(family, FadesIn):
        family.set_fade(networks, alpha, fading)


def truncates(family: Family) -> bool:
    """Whether a family uses ``psi``."""
    return isinstance(family, Truncates) and family.truncates


def adjustable(family: Family) -> frozenset[str]:
    """What can be changed of how a family samples: of ``steps``, ``sampler`` and ``guidance``."""
    if isinstance(family, LimitsSampling):
        return family.adjustable
    return frozenset(["steps", "sampler", "guidance"] * isinstance(family, AdjustsSampling))


def num_classes_of(family: Family) -> int:
    """What :class:`HasClasses` says; 0 for other families."""
    return family.num_classes if isinstance(family, HasClasses) else 0


def graph_of(family: Family, networks: Networks) -> Graph | None:
    """What :class:`HasGraph` gives, else ``images = G(z)``.

    Returns:
        None for a family that decodes in its own way and has no graph.
    """
    if isinstance(family, HasGraph):
        if (found := family.graph(networks)) is not None:
            return found
    elif type(family).decode is not Family.decode:
        return None

    def inputs(indices: Tensor, seed: int) -> dict[str, Tensor]:
        return {"z": family.latents(indices, seed)}

    return Graph(networks[family.ema_networks[0]], inputs)


def spaces_of(family: Family) -> dict[str, LatentSpace]:
    """A family's latent spaces by name: ``z``, then those of :class:`HasLatentSpaces`."""
    shape = tuple(family.latents(torch.zeros(1, dtype=torch.int64), 0).shape[1:])
    further = family.spaces if isinstance(family, HasLatentSpaces) else ()
    return {one.name: one for one in (LatentSpace("z", shape, normal=True), *further)}


def to_space(
    family: Family,
    networks: Networks,
    space: str,
    latents: Tensor,
    indices: Tensor,
    psi: float = 1.0,
) -> Tensor:
    """Latents of ``Family.latents`` in one of :func:`spaces_of`; see :class:`HasLatentSpaces`."""
    if space == "z":
        return latents
    assert isinstance(family, HasLatentSpaces)
    return family.to_space(networks, space, latents, indices, psi)


def decode_in(
    family: Family,
    networks: Networks,
    space: str,
    latents: Tensor,
    indices: Tensor,
    noise: Tensor | None = None,
) -> Tensor:
    """Images of latents of one of :func:`spaces_of`; see :class:`HasLatentSpaces`."""
    if space == "z":
        return family.decode(networks, latents, indices, 0)
    assert isinstance(family, HasLatentSpaces)
    return family.decode_in(networks, space, latents, noise)


def condition_for(
    family: Family, texts: Sequence[str], guidance: float, facts: Mapping[str, Any]
) -> Condition:
    """What :class:`Conditional` makes of prompts.

    Raises:
        UserError: the family or the run does not use text, or CLIP differs from training's.
    """
    if not isinstance(family, Conditional):
        raise not_trained_with_text(family)
    return family.condition(texts, guidance, facts)
