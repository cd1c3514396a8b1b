"""What `ddpm` and `flow` share: a network that takes noise out of images, and how it is used.

One training step and one walk. A family says how images get their noise (:meth:`Denoiser._noised`)
and how noise becomes images (:meth:`Denoiser._integrate`); all else is here.
"""

from __future__ import annotations

import copy
import functools
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pydantic import Field, ValidationError, model_validator
from torch import Tensor, nn

from dinogen.batch import Batch, Losses, Scalars
from dinogen.config import Config, ConfigError, StageConfig, describe_errors
from dinogen.distributed import rng
from dinogen.errors import UserError
from dinogen.families.base import Family, Graph, Inputs, Networks, Phase, classes_of
from dinogen.families.latent import LatentOptions, Latents
from dinogen.guidance.alignment import Repa, RepaOptions
from dinogen.guidance.representation import Representation, RepresentationOptions
from dinogen.networks.denoising import DenoisingNetwork, Drop, LatentScale, NoSuchLayer
from dinogen.networks.dit import DiT
from dinogen.networks.options import NetworkOptions
from dinogen.networks.representation import Embedded, RepresentationMLP
from dinogen.networks.unet import UNet
from dinogen.transfer import to_device, to_device_together
from shards.format.sample import level_guide
from shards.read.dataset import Dataset

# Ho and Salimans 2022, "Classifier-Free Diffusion Guidance", section 4.2 tries 0.1 to 0.5
DROP_LABEL = 0.1
RGB = 3
ROUNDING = 1e-6  # of shares of a walk

# (x (N, C, R, R), time of the network (N,), share of the walk that is done) -> what it says
Predict = Callable[[Tensor, Tensor, float], Tensor]


class DenoiserOptions(NetworkOptions):
    """Keys of ``family:`` that `ddpm` and `flow` have."""

    prediction: str = Field("v", description="what the network predicts")
    dropout: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="share of a residual block's activations that a step leaves out; Ho et al. "
        "take 0.1 for small data sets",
    )
    sample_steps: int = Field(100, ge=1, description="steps from noise to an image")
    num_classes: int = Field(0, ge=0, description="labels are 0 to this less 1; 0: no labels")
    guidance: float = Field(
        1.0, ge=0, description="pull towards the class: 0 none, 1 as learnt, more exaggerates"
    )
    guidance_interval: tuple[float, float] | None = Field(
        None,
        description="part of the walk that guidance acts in, as shares: 0 is noise, 1 the image; "
        "default: all of it",
    )
    repa: RepaOptions | None = Field(
        None, description="align hidden tokens with stored features; default: do not"
    )
    representation: RepresentationOptions | None = Field(
        None,
        description="generate a global feature first, and the image from it (RCG); default: do not",
    )
    latent: LatentOptions | None = Field(
        None, description="train on latents of an autoencoder in place of pixels; default: pixels"
    )

    @model_validator(mode="after")
    def _check_guidance(self) -> DenoiserOptions:
        features = self.representation
        conditional = self.num_classes > 0 or features is not None
        if self.guidance != 1 and not conditional:
            raise ValueError(
                f"guidance {self.guidance} needs classes to pull to, or features: set num_classes "
                "or representation, or leave guidance out"
            )
        if self.guidance != 1 and features is not None and not features.dropout:
            raise ValueError(
                f"guidance {self.guidance} weighs what is learnt with and without features: set "
                "representation.dropout above 0, or leave guidance out"
            )
        if self.guidance_interval is None:
            return self
        low, high = self.guidance_interval
        if not 0 <= low < high <= 1:
            raise ValueError(
                f"guidance_interval [{low}, {high}]: give two shares of the walk between 0 and 1, "
                "the smaller one first, such as [0.2, 0.8]"
            )
        if not conditional:
            raise ValueError(
                "guidance_interval needs classes to pull to, or features: set num_classes or "
                "representation, or leave it out"
            )
        return self


class Conditions(NamedTuple):
    """What each image of a batch is conditioned on.

    Attributes:
        label: (B,) int64; ``num_classes`` means no class. None if there are no classes.
        embedding: (B, E) float32, the normalised global feature; None for the network's null
            vector, or if it has none.
    """

    label: Tensor | None = None
    embedding: Tensor | None = None


@dataclass(frozen=True)
class Noised:
    """What a training step shows the network, and what it should say.

    Attributes:
        x: (B, C, R, R), images with noise.
        t: (B,) time, as the network takes it.
        target: of the shape of ``x``.
        weight: (B,) float32 weights of the losses; None: all 1.
    """

    x: Tensor
    t: Tensor
    target: Tensor
    weight: Tensor | None = None

    def loss(self, output: Tensor) -> Tensor:
        """The (weighted) mean squared error of what the network said."""
        errors = (output.float() - self.target).square()
        if self.weight is None:
            return errors.mean()
        return (errors.flatten(1).mean(1) * self.weight).mean()


class Denoiser(Family):
    """A network G that takes noise out of images, at every strength of noise.

    With ``num_classes`` it learns p(x | label) and, where the label is left out, p(x), and
    ``guidance`` weighs the two (Ho and Salimans 2022, equation 6, whose w is ``guidance`` less 1),
    within ``guidance_interval`` alone if there is one (Kynkaanniemi et al. 2024, "Applying Guidance
    in a Limited Interval Improves Sample and Distribution Quality in Diffusion Models", equation
    6, by shares of the walk instead of sigma).

    With ``representation`` a second network R generates a global feature of an image first, and G
    the image from it (Li et al. 2024, "Return of Unconditional Generation: A Self-supervised
    Representation Generation Method"). G learns without the feature, and without the class, for a
    share of the images, and ``guidance`` weighs with and without.

    A family defines the abstract methods; its loss is named by ``options.prediction``.
    """

    Options = DenoiserOptions

    options: DenoiserOptions

    def __init__(self, config: Config, stage: StageConfig, device: torch.device) -> None:
        super().__init__(config, stage, device)
        self.options = self.Options(**config.family.options)
        aligned = self.options.repa
        self.repa = None if aligned is None else Repa(aligned, config)
        self.representation: Representation | None = None
        if self.options.representation is not None:
            self.representation = Representation(self.options.representation, config.seed, device)
            self.R = RepresentationMLP(**self.arguments("R")).to(device)
        chosen = self.options.latent
        self.latent = None if chosen is None else Latents(chosen, config, stage, device)
        build = {"unet": UNet, "dit": DiT}[self.options.network]
        try:
            self.G: DenoisingNetwork = build(**self.arguments("G")).to(device)
        except NoSuchLayer as error:
            raise ConfigError(f"family.repa.{error}") from None
        except ValueError as error:
            section = "dit." if self.options.network == "dit" else ""
            raise ConfigError(f"family.{section}{error}") from None
        if self.repa is not None:
            self.repa.check(self.G)
            if self.representation is not None:
                self.representation.check_beside(self.repa.levels)

    @property
    def num_classes(self) -> int:
        """0 if it was trained without labels."""
        return self.options.num_classes

    def with_sampling(self, changes: Mapping[str, Any]) -> Denoiser:
        """``steps`` of the walk, ``sampler``, ``guidance`` to class and feature."""
        keys = {"steps": "sample_steps"}
        wanted = {keys.get(name, name): value for name, value in changes.items()}
        try:
            options = self.Options(**self.options.model_dump() | wanted)
        except ValidationError as error:
            raise UserError(describe_errors(error, self.Options, "sampling")) from None
        other = copy.copy(self)
        other.options = options
        return other

    @property
    def networks(self) -> dict[str, nn.Module]:
        """The denoising network G, and R if there is ``representation``."""
        return {"G": self.G} | ({} if self.representation is None else {"R": self.R})

    @property
    def phases(self) -> tuple[Phase, ...]:
        """One update of R, if there is one, and one of G."""
        phases = (Phase("G", "G", self._losses),)
        if self.representation is None:
            return phases
        return (Phase("R", "R", self._losses_of_R), *phases)

    @property
    def ema_networks(self) -> tuple[str, ...]:
        """All."""
        return tuple(self.networks)

    @property
    def inputs(self) -> Inputs:
        """Images or their latents, labels of classes, and levels of all that reads features."""
        parts = (self.latent, self.repa, self.representation)
        levels = [level for one in parts if one is not None for level in one.levels]
        return Inputs(
            image_size=self.stage.resolution if self.latent is None else None,
            levels=tuple(dict.fromkeys(levels)),
            labels=self.options.num_classes > 0,
        )

    def check_data(self, data: Dataset) -> None:
        """Whether the data hold the latents and features that are read."""
        for part in (self.latent, self.repa, self.representation):
            if part is not None:
                part.check_data(data)

    def begin(self, data: Dataset) -> None:
        """Name the guide of ``repa``, measure ``representation``, learn the latents' scale."""
        self.check_data(data)
        if self.repa is not None:
            self.repa.begin(data)
        if self.latent is not None:
            self.latent.begin(data, _scale_of(self.G))
        if self.representation is not None:
            where = self.config.data
            self.representation.begin(self.R, data, where.split, where.on_error)

    def describe(self) -> dict[str, Any]:
        """The guides of these features, and the autoencoder of the latents."""
        parts = (self.representation, self.repa, self.latent)
        facts = [one.describe() for one in parts if one is not None]
        found = {name: value for one in facts for name, value in one.items()}
        if any(one.get("random_guide") for one in facts):
            found["random_guide"] = True
        return found | self._guides()

    def _guides(self) -> dict[str, Any]:
        """The guides of features of several, in the form of ``GuideSet.describe``."""
        parts = (self.repa, self.representation)
        facts = {level_guide(one.options.level): one.describe() for one in parts if one is not None}
        told = {name: one for name, one in facts.items() if "guide" in one}
        if len(told) < 2:
            return {}
        main, *others = sorted(told, key=bool)  # that of the config's guide: has no name
        labels = [one["guide_label"] for one in told.values() if "guide_label" in one]
        return {
            "guide": told[main]["guide"],
            "guides": {name: told[name]["guide"] for name in others},
            "guide_label": ", ".join(labels),
        }

    def recall(self, facts: Mapping[str, Any], folder: Path) -> None:
        """Which autoencoder decodes."""
        if self.latent is not None:
            self.latent.recall(facts, folder)

    def arguments(self, network: str) -> dict[str, Any]:
        """Of G or R."""
        own, features = self.options, self.representation
        if network == "R" and features is not None:
            return features.arguments(own.num_classes)
        channels, side, _ = self._shape
        arguments = {"resolution": side} | own.network_arguments()
        if channels != RGB:
            arguments["in_channels"] = channels
        if self.repa is not None:
            arguments["align"] = self.repa.arguments
        if features is not None:
            arguments["embed_dim"] = features.options.channels
        if self.latent is not None:
            arguments["scaled_latents"] = True
        return arguments | {"num_classes": own.num_classes}

    # --- sampling

    def latents(self, indices: Tensor, seed: int) -> Tensor:
        """The noise that sampling starts from, (N, 3, R, R), or (N, C, s, s) of latents.

        With ``representation`` it is one vector for each image: this noise, and that of R.
        """
        noise = rng.normal(seed, "sample", indices, self._shape, device=self.device)
        if self.representation is None:
            return noise
        return torch.cat([noise.flatten(1), self.representation.noise(indices, seed)], 1)

    def decode(
        self, networks: Networks, latents: Tensor, indices: Tensor, seed: int, psi: float = 1.0
    ) -> Tensor:
        """The walk from noise to images; with classes, number i is of class i % num_classes.

        Noise that is added on the way goes by ``indices``, so it too follows from the arguments.
        """
        return self._walk(networks, latents, self._classes(indices), indices, seed)

    def measured(
        self, networks: Networks, indices: Tensor, seed: int, shares: Sequence[float] | None
    ) -> Tensor:
        """As in the base: with classes, as frequent as in the data."""
        label = self._classes(indices, shares)
        return self._walk(networks, self.latents(indices, seed), label, indices, seed)

    def variations(
        self, networks: Networks, batch: Batch, indices: Tensor, seed: int
    ) -> Tensor | None:
        """Other images with the features of some; None without ``representation``."""
        if self.representation is None:
            return None
        embedding = self.representation.embedding(networks, batch)
        label = to_device(batch["label"], self.device) if self.options.num_classes else None
        x = rng.normal(seed, "sample", indices, self._shape, device=self.device)
        return self._walk_from(networks["G"], x, Conditions(label, embedding), indices, seed)

    refines = False  # the walk has too many steps to pass gradients through

    def invert(self, networks: Networks, images: Tensor, indices: Tensor) -> Tensor:
        """The noise from which the sampler walks to the images, in as many steps.

        Raises:
            UserError: the sampler adds noise of its own on the way, or images are generated from
                features.
        """
        if self.representation is not None:
            raise UserError(
                "family.representation: an image has no latent where it is generated from features "
                "that are generated themselves: train without it to project photos"
            )
        predict = functools.partial(self._guided, networks["G"], Conditions(self._classes(indices)))
        return self._invert(predict, self._encoded(networks["G"], images))

    def graph(self, networks: Networks) -> Graph:
        """One prediction: noisy images x, times t, embedding of R, label if there are classes.

        The walk is a loop around it; ``facts`` say what is needed to write it.
        """
        own = self.options
        visited, facts = self._visited()

        def inputs(indices: Tensor, seed: int) -> dict[str, Tensor]:
            t = visited[indices % len(visited)].to(self.device)
            label = self._classes(indices)
            x, conditions = self._parted(networks, self.latents(indices, seed), label)
            found = {"x": x, "t": t}
            if conditions.embedding is not None:
                found["embedding"] = conditions.embedding
            if conditions.label is not None:
                found["label"] = conditions.label
            return found

        facts |= {"guidance": own.guidance, "num_classes": own.num_classes}
        if own.guidance_interval is not None:
            facts["guidance_interval"] = list(own.guidance_interval)
        if self.latent is not None:
            facts |= self.latent.facts(_scale_of(networks["G"]))
        if self.representation is None:
            return Graph(networks["G"], inputs, own.prediction, facts)
        facts |= self.representation.facts(networks)
        return Graph(Embedded(networks["G"]), inputs, own.prediction, facts)

    def _walk(
        self,
        networks: Networks,
        latents: Tensor,
        label: Tensor | None,
        indices: Tensor,
        seed: int,
    ) -> Tensor:
        """Images of latents."""
        x, conditions = self._parted(networks, latents, label)
        return self._walk_from(networks["G"], x, conditions, indices, seed)

    def _walk_from(
        self, G: nn.Module, x: Tensor, conditions: Conditions, indices: Tensor, seed: int
    ) -> Tensor:
        """Images of noise (N, C, R, R) and of what they are conditioned on."""
        predict = functools.partial(self._guided, G, conditions)
        return self._decoded(G, self._integrate(predict, x, indices, seed))

    def _classes(self, indices: Tensor, shares: Sequence[float] | None = None) -> Tensor | None:
        """Of samples (N,); ``shares`` are those of the classes, None cycles. None without any."""
        num_classes = self.options.num_classes
        if not num_classes:
            return None
        label = indices % num_classes if shares is None else classes_of(indices, shares)
        return label.to(self.device)

    def _parted(
        self, networks: Networks, latents: Tensor, label: Tensor | None
    ) -> tuple[Tensor, Conditions]:
        """The noise of images (N, C, R, R), and what they are conditioned on."""
        if self.representation is None:
            return latents, Conditions(label)
        channels = self.representation.options.channels
        x, noise = latents.split([latents.shape[1] - channels, channels], 1)
        embedding = self.representation.generate(networks, noise, label)
        return x.unflatten(1, self._shape), Conditions(label, embedding)

    def _guided(
        self, G: nn.Module, conditions: Conditions, x: Tensor, t: Tensor, share: float
    ) -> Tensor:
        """What G says of x, drawn towards or beyond its conditions; a :data:`Predict`."""
        guidance, interval = self.options.guidance, self.options.guidance_interval
        outside = interval is not None and not (
            interval[0] - ROUNDING <= share <= interval[1] + ROUNDING
        )
        if guidance == 1 or outside or all(one is None for one in conditions):
            return self._said(G, x, t, conditions)
        without = self._said(G, x, t, self._unconditional(conditions))
        if guidance == 0:
            return without
        return torch.lerp(without, self._said(G, x, t, conditions), guidance)

    def _unconditional(self, conditions: Conditions) -> Conditions:
        """No class and no embedding."""
        label = conditions.label
        return Conditions(
            None if label is None else torch.full_like(label, self.options.num_classes)
        )

    # --- training

    def held_out(self, networks: Networks, batch: Batch) -> Scalars:
        """The losses on images that were not trained on, with random numbers of their own.

        With ``repa``, its negative mean cosine too.
        """
        losses, cosine = self._compared(networks, batch, "/held-out")
        if cosine is not None:
            losses["repa"] = -cosine
        return losses | self._representation_loss(batch, "/held-out", networks)

    def _losses(self, batch: Batch) -> Losses:
        """The loss of one time drawn per sample."""
        drop = None
        if self.options.dropout:
            drop = functools.partial(self._drop, position=to_device(batch["position"], self.device))
        losses, cosine = self._compared(self.networks, batch, "", drop)
        if self.repa is None or cosine is None:
            return losses, {}
        # of the step, the same on every rank and in every microbatch
        nimg = int(batch["position"][0])
        nimg -= (nimg - self.start) % self.stage.batch
        return losses | {"repa": -self.repa.weight(nimg) * cosine}, {"cos": cosine.detach()}

    def _compared(
        self, networks: Networks, batch: Batch, kind: str, drop: Drop | None = None
    ) -> tuple[Scalars, Tensor | None]:
        """The loss of what G says; and how its tokens are aligned, where they are."""
        G = networks["G"]
        noised = self._noised(self._clean(G, batch, kind), batch["position"], kind)
        conditions = self._conditions(batch, kind, networks)
        if self.repa is None:
            output = self._said(G, noised.x, noised.t, conditions, drop)
            return {self.options.prediction: noised.loss(output)}, None
        assert isinstance(G, DenoisingNetwork)
        output, tokens = G.with_tokens(
            noised.x, noised.t, conditions.label, drop, conditions.embedding
        )
        return {self.options.prediction: noised.loss(output)}, self.repa.cosine(tokens, batch)

    def _losses_of_R(self, batch: Batch) -> Losses:
        """The loss of features at one time drawn per sample."""
        return self._representation_loss(batch, "", self.networks), {}

    def _representation_loss(self, batch: Batch, kind: str, networks: Networks) -> Scalars:
        """That of R, with the labels of the batch; nothing without ``representation``."""
        if self.representation is None:
            return {}
        label = batch["label"] if self.options.num_classes else None
        return self.representation.losses(networks, batch, label, kind)

    def _conditions(self, batch: Batch, kind: str, networks: Networks) -> Conditions:
        """What a batch is conditioned on in training, left out for some of it."""
        num_classes, features = self.options.num_classes, self.representation
        if features is not None:
            keep = features.keep(batch["position"], kind)
            null: Tensor = networks["G"].get_parameter("null_embedding")
            embedding = features.embedding(networks, batch)
            return Conditions(
                torch.where(keep, batch["label"], num_classes) if num_classes else None,
                torch.where(keep[:, None], embedding, null),
            )
        if not num_classes:
            return Conditions()
        drawn = rng.uniform(self.config.seed, f"label{kind}", batch["position"]) < DROP_LABEL
        (dropped,) = to_device_together([drawn], self.device)
        return Conditions(torch.where(dropped, num_classes, batch["label"]))

    def _said(
        self, G: nn.Module, x: Tensor, t: Tensor, conditions: Conditions, drop: Drop | None = None
    ) -> Tensor:
        """What G says, (B, C, R, R) float32."""
        output: Tensor = G(x, t, conditions.label, drop, conditions.embedding)
        return output

    def _drop(self, h: Tensor, block: int, position: Tensor) -> Tensor:
        """Inverted dropout (Srivastava et al. 2014) of a block's activations, by position."""
        shape, rate = tuple(h.shape[1:]), self.options.dropout
        drawn = rng.uniform(self.config.seed, f"dropout/{block}", position, shape, h.device)
        return h * ((drawn >= rate) / (1 - rate)).to(h.dtype)

    # --- what is walked to: images, or latents of an autoencoder

    @property
    def _shape(self) -> tuple[int, int, int]:
        """Of what noise is added to, (C, R, R)."""
        if self.latent is not None:
            return self.latent.shape
        return RGB, self.stage.resolution, self.stage.resolution

    @property
    def _bounded(self) -> bool:
        """Whether its values lie in [-1, 1]; latents have deviation 1 and no bound."""
        return self.latent is None

    def _clean(self, G: nn.Module, batch: Batch, kind: str) -> Tensor:
        """What a training step adds noise to, (B, C, R, R) on the device."""
        if self.latent is not None:
            return self.latent.drawn(batch, _scale_of(G), kind)
        return batch["image"]

    def _decoded(self, G: nn.Module, x: Tensor) -> Tensor:
        """Images (N, 3, R, R) in [-1, 1] of the end of a walk."""
        if self.latent is not None:
            return self.latent.decoded(x, _scale_of(G))
        return x.clamp(-1, 1)

    def _encoded(self, G: nn.Module, images: Tensor) -> Tensor:
        """The inverse of :meth:`_decoded`; of latents the means of the posteriors."""
        if self.latent is not None:
            return self.latent.encoded(images, _scale_of(G))
        return images

    # --- what a family defines

    @abstractmethod
    def _noised(self, x0: Tensor, position: Tensor, kind: str) -> Noised:
        """A noisy version of each sample, at a time drawn by position.

        Args:
            x0: (B, C, R, R) on the device.
            position: (B,) int64 on the CPU.
            kind: end of the purposes of draws; empty in training.
        """

    @abstractmethod
    def _integrate(self, predict: Predict, latents: Tensor, indices: Tensor, seed: int) -> Tensor:
        """Walk from standard normal noise to what :meth:`_decoded` takes."""

    @abstractmethod
    def _invert(self, predict: Predict, x: Tensor) -> Tensor:
        """Walk back, from what :meth:`_integrate` returns to the noise it started from."""

    @abstractmethod
    def _visited(self) -> tuple[Tensor, dict[str, Any]]:
        """Of each step of the walk: times (S,) as the network takes them, and facts to export."""


def _scale_of(G: nn.Module) -> LatentScale:
    """What brings latents to mean 0 and deviation 1."""
    assert isinstance(G, DenoisingNetwork) and G.latent_scale is not None
    return G.latent_scale
