"""Family `ddpm`: diffusion with a U-Net that predicts eps, v or x0; with classes or without."""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from pydantic import Field, ValidationError, model_validator
from torch import Tensor, nn

from dinogen.batch import Batch, Losses, Scalars
from dinogen.config import Config, ConfigError, Section, StageConfig, describe_errors
from dinogen.diffusion.process import Schedule, invert, q_sample, sample, target, time_steps
from dinogen.distributed import rng
from dinogen.errors import UserError
from dinogen.families.base import Family, Graph, Inputs, Networks, Phase, classes_of
from dinogen.networks.denoising import Drop
from dinogen.networks.unet import UNet
from dinogen.transfer import to_device, to_device_together

# Ho and Salimans 2022, "Classifier-Free Diffusion Guidance", section 4.2 tries 0.1 to 0.5
DROP_LABEL = 0.1


class UNetOptions(Section):
    """What a U-Net that was trained elsewhere does otherwise; the defaults are what ours do."""

    norm_groups: int | None = Field(
        None, ge=1, description="groups of every norm; default: at most 32, of at least 4 channels"
    )
    norm_eps: float = Field(1e-5, gt=0, description="added to the variance of a group")
    scale: bool = Field(
        True, description="the time embedding scales and shifts; false: it is added, no more"
    )
    num_heads: int | None = Field(
        None, ge=1, description="heads of every attention, in place of head_channels"
    )
    middle_norm: bool = Field(True, description="the attention in the middle has a norm")
    resampling: Literal["conv", "block"] = Field(
        "conv", description="sides are halved and doubled by a convolution, or a residual block"
    )
    downsample_padding: Literal["all", "end"] = Field(
        "all", description="where a halving convolution adds zeros; end: right and bottom alone"
    )
    last_frequency: Literal["near", "exact"] = Field(
        "near", description="the time embedding ends near a frequency of 1/10000, or exactly there"
    )
    time_scale: float = Field(1.0, gt=0, description="factor of time steps before the embedding")
    time_channels: int | None = Field(
        None, ge=2, description="size of the time embedding; default: base_channels"
    )


class Ddpm(Family):
    """Ho et al. 2020, "Denoising Diffusion Probabilistic Models": a network learns to take noise
    out of images, at every strength of noise; sampling starts from noise alone.

    The loss is the plain mean squared error of what is predicted (equation 14 for epsilon). With
    ``num_classes`` it learns p(x | label) and, where the label is left out, p(x), and ``guidance``
    weighs the two (Ho and Salimans 2022, equation 6, whose w is ``guidance`` less 1).
    """

    class Options(Section):
        """Keys of ``family:`` for ``name: ddpm``."""

        schedule: Literal["linear", "cosine"] = Field(
            "cosine", description="how noise grows with the time step"
        )
        prediction: Literal["epsilon", "v", "x0"] = Field(
            "v", description="what the network predicts: the noise, v, or the image"
        )
        num_steps: int = Field(1000, ge=2, description="time steps of the schedule")
        base_channels: int = Field(128, ge=2, description="channels at full resolution")
        channel_multipliers: tuple[int, ...] = Field(
            (1, 2, 3, 4), description="channels of each level over the base; each halves the side"
        )
        num_blocks: int = Field(2, ge=1, description="residual blocks per level")
        attention_resolutions: tuple[int, ...] = Field(
            (16, 8), description="sides at which blocks have self-attention"
        )
        head_channels: int = Field(64, ge=1, description="width of an attention head")
        unet: UNetOptions | None = Field(
            None,
            description="details of a U-Net that was trained elsewhere, as `dinogen import` writes "
            "them; default: ours",
        )
        dropout: float = Field(
            0.0,
            ge=0,
            lt=1,
            description="share of a residual block's activations that a step leaves out; Ho et al. "
            "take 0.1 for small data sets",
        )
        sampler: Literal["ddim", "ddpm"] = Field(
            "ddim", description="ddim adds no noise on the way; ddpm is ancestral"
        )
        sample_steps: int = Field(100, ge=1, description="time steps that sampling visits")
        num_classes: int = Field(0, ge=0, description="labels are 0 to this less 1; 0: no labels")
        guidance: float = Field(
            1.0, ge=0, description="pull towards the class: 0 none, 1 as learnt, more exaggerates"
        )

        @model_validator(mode="after")
        def _check(self) -> Ddpm.Options:
            if self.sample_steps > self.num_steps:
                raise ValueError(
                    f"sample_steps {self.sample_steps} are more than num_steps {self.num_steps}: "
                    "sample in fewer"
                )
            if self.guidance != 1 and not self.num_classes:
                raise ValueError(
                    f"guidance {self.guidance} needs classes to pull to: set num_classes, or leave "
                    "guidance out"
                )
            return self

    def __init__(self, config: Config, stage: StageConfig, device: torch.device) -> None:
        super().__init__(config, stage, device)
        self.options = self.Options(**config.family.options)
        self.schedule = Schedule(self.options.schedule, self.options.num_steps)
        try:
            self.G = UNet(**self.arguments("G")).to(device)
        except ValueError as error:
            raise ConfigError(f"family.{error}") from None

    @property
    def num_classes(self) -> int:
        """0 if it was trained without labels."""
        return self.options.num_classes

    def with_sampling(self, changes: Mapping[str, Any]) -> Ddpm:
        """``steps`` of the schedule, ``sampler`` ddim or ddpm, ``guidance`` to the class."""
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
        """The U-Net alone; as G, as what makes images is called everywhere."""
        return {"G": self.G}

    @property
    def phases(self) -> tuple[Phase, ...]:
        """One update of G."""
        return (Phase("G", "G", self._losses),)

    @property
    def inputs(self) -> Inputs:
        """Images, and labels if there are classes."""
        return Inputs(image_size=self.stage.resolution, labels=self.options.num_classes > 0)

    def arguments(self, network: str) -> dict[str, Any]:
        """Of G."""
        arguments = {"resolution": self.stage.resolution} | self.options.model_dump(
            mode="json",
            include={
                "base_channels",
                "channel_multipliers",
                "num_blocks",
                "attention_resolutions",
                "head_channels",
                "num_classes",
            },
        )
        unet = self.options.unet
        return arguments if unet is None else arguments | {"variant": unet.model_dump(mode="json")}

    def latents(self, indices: Tensor, seed: int) -> Tensor:
        """The noise that sampling starts from, (N, 3, R, R)."""
        return rng.normal(seed, "sample", indices, self._shape, device=self.device)

    def decode(
        self, networks: Networks, latents: Tensor, indices: Tensor, seed: int, psi: float = 1.0
    ) -> Tensor:
        """The walk from noise to images; with classes, number i is of class i % num_classes.

        DDPM's noise on the way goes by ``indices``, so it too follows from the arguments.
        """
        num_classes = self.options.num_classes
        label = indices % num_classes if num_classes else None
        return self._walk(networks["G"], latents, indices, seed, label)

    def measured(
        self, networks: Networks, indices: Tensor, seed: int, shares: Sequence[float] | None
    ) -> Tensor:
        """As in the base: with classes, as frequent as in the data."""
        if not self.options.num_classes or shares is None:
            return self.sample(networks, indices, seed)
        label = classes_of(indices, shares)
        return self._walk(networks["G"], self.latents(indices, seed), indices, seed, label)

    refines = False  # the walk has too many steps to pass gradients through

    @property
    def inverts_by(self) -> str:
        """DDIM from the image to noise."""
        return f"DDIM run backwards in {self.options.sample_steps} steps"

    def invert(self, networks: Networks, images: Tensor, indices: Tensor) -> Tensor:
        """The noise from which DDIM walks to the images, in as many steps as samples take.

        Raises:
            UserError: samples are drawn by DDPM, which adds noise of its own on the way.
        """
        if self.options.sampler != "ddim":
            raise UserError(
                "family.sampler: ddpm adds noise on the way, so an image has no one latent: sample "
                "with ddim"
            )
        num_classes = self.options.num_classes
        label = (indices % num_classes).to(self.device) if num_classes else None

        def predict(x: Tensor, t: Tensor) -> Tensor:
            return self._guided(networks["G"], x, t.to(self.device), label)

        steps = self.options.sample_steps
        return invert(predict, self.schedule, self.options.prediction, images, steps)

    def _walk(
        self, G: nn.Module, latents: Tensor, indices: Tensor, seed: int, label: Tensor | None
    ) -> Tensor:
        if label is not None:
            label = label.to(self.device)

        def noise(t: int) -> Tensor:
            return rng.normal(seed, f"sample/{t}", indices, self._shape, device=self.device)

        def predict(x: Tensor, t: Tensor) -> Tensor:
            return self._guided(G, x, t.to(self.device), label)

        return sample(
            predict,
            self.schedule,
            self.options.prediction,
            latents,
            self.options.sample_steps,
            eta={"ddim": 0.0, "ddpm": 1.0}[self.options.sampler],
            noise=noise,
        )

    def graph(self, networks: Networks) -> Graph:
        """One prediction: noisy images x, time steps t, and label if there are classes.

        The walk is a loop around it, with the noise of the time steps in ``facts``.
        """
        own = self.options
        visited = time_steps(self.schedule.num_steps, own.sample_steps)

        def inputs(indices: Tensor, seed: int) -> dict[str, Tensor]:
            t = torch.tensor(visited)[indices % len(visited)].to(self.device)
            found = {"x": self.latents(indices, seed), "t": t}
            if not own.num_classes:
                return found
            return found | {"label": (indices % own.num_classes).to(self.device)}

        facts = {
            "time_steps": visited,
            "alpha_bar": [float(self.schedule.alpha_bar[t]) for t in visited],
            "guidance": own.guidance,
            "num_classes": own.num_classes,
        }
        return Graph(networks["G"], inputs, own.prediction, facts)

    def held_out(self, networks: Networks, batch: Batch) -> Scalars:
        """The loss on images that were not trained on, with random numbers of its own."""
        return self._mse(networks["G"], batch, "/held-out")

    def _drop(self, h: Tensor, block: int, position: Tensor) -> Tensor:
        """Inverted dropout (Srivastava et al. 2014) of a block's activations, by position."""
        shape, rate = tuple(h.shape[1:]), self.options.dropout
        drawn = rng.uniform(self.config.seed, f"dropout/{block}", position, shape, h.device)
        return h * ((drawn >= rate) / (1 - rate)).to(h.dtype)

    @property
    def _shape(self) -> tuple[int, int, int]:
        """Of an image."""
        return 3, self.stage.resolution, self.stage.resolution

    def _losses(self, batch: Batch) -> Losses:
        drop = None
        if self.options.dropout:
            drop = functools.partial(self._drop, position=to_device(batch["position"], self.device))
        return self._mse(self.G, batch, "", drop), {}

    def _mse(self, G: nn.Module, batch: Batch, kind: str, drop: Drop | None = None) -> Scalars:
        """Mean squared error of the prediction at one time step drawn per sample."""
        seed, position, x0 = self.config.seed, batch["position"], batch["image"]
        num_classes, prediction = self.options.num_classes, self.options.prediction
        t = rng.integers(seed, f"t{kind}", position, high=self.schedule.num_steps)
        eps = rng.normal(seed, f"eps{kind}", position, tuple(x0.shape[1:]), device=x0.device)
        small = [t, *self.schedule.signal_noise(t, x0)]
        if num_classes:
            small.append(rng.uniform(seed, f"label{kind}", position) < DROP_LABEL)
        t, signal, noise, *dropped = to_device_together(small, self.device)
        label = torch.where(dropped[0], num_classes, batch["label"]) if dropped else None
        output = G(q_sample(x0, eps, signal, noise), t, label, drop)
        wanted = target(prediction, x0, eps, signal, noise)
        return {prediction: (output.float() - wanted).square().mean()}

    def _guided(self, G: nn.Module, x: Tensor, t: Tensor, label: Tensor | None) -> Tensor:
        """What G says of x, drawn towards or beyond the class."""
        guidance = self.options.guidance
        if label is None or guidance == 1:
            with_class: Tensor = G(x, t, label)
            return with_class
        no_class = torch.full_like(label, self.options.num_classes)
        without: Tensor = G(x, t, no_class)
        if guidance == 0:
            return without
        return torch.lerp(without, G(x, t, label), guidance)
