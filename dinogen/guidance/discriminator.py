"""The optional discriminator of the guided family: network, losses, penalties, ramped weight."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from dinogen.batch import Batch, Losses, Scalars
from dinogen.config import ConfigError, GuideConfig, StageConfig
from dinogen.distributed import rng
from dinogen.features.base import Guide
from dinogen.features.load import layer_channels, load_guide
from dinogen.features.pyramid import to_guide
from dinogen.guidance.options import DiscriminatorOptions
from dinogen.losses.adversarial import hinge_d, hinge_g, r1_penalty, relativistic_d, relativistic_g
from dinogen.networks.diffaugment import diff_augment
from dinogen.networks.layers import update_spectral_norms
from dinogen.networks.patchgan import MultiScalePatchDiscriminator, num_patches
from dinogen.networks.projected import ProjectedHeads
from dinogen.transfer import to_device_together


class Adversary:
    """A discriminator, and what a family needs of it for the phases of D and G.

    All losses are means over samples and random numbers depend on positions, so nothing depends on
    how a batch is cut. The real and the generated image of one position get the same augmentation
    and the same crop, so D cannot tell them apart by these.

    Args:
        options: the section of the config.
        main: the run's own guide; only its number of channels is needed here, see :meth:`begin`.
        stage: the stage that is trained.
        seed: the run's seed.
        device: where the network lives.

    Raises:
        ConfigError: the stage's images are too small for a patch discriminator.
        GuideError: the guide's number of channels cannot be known.
    """

    network: nn.Module

    def __init__(
        self,
        options: DiscriminatorOptions,
        main: GuideConfig,
        stage: StageConfig,
        seed: int,
        device: torch.device,
    ) -> None:
        self.options = options
        self.seed = seed
        self.device = device
        self._guide_config = options.guide or main
        self._guide: Guide | None = None
        crops = options.crop is not None and options.crop < stage.resolution
        self._crop = options.crop if crops else None
        self._side = self._crop or stage.resolution
        if options.kind == "patch":
            self._check_patches()
            self._num_channels: tuple[int, ...] = ()
            self.network = MultiScalePatchDiscriminator(**self.arguments()).to(device)
        else:
            self._num_channels = layer_channels(self._guide_config)
            self.network = ProjectedHeads(**self.arguments()).to(device)

    def arguments(self) -> dict[str, Any]:
        """Arguments of the network's class, JSON-ready."""
        own = self.options
        if own.kind == "projected":
            return {"num_channels": list(self._num_channels), "width": own.head_channels}
        return {
            "num_scales": own.patch_scales,
            "num_layers": own.patch_layers,
            "base_channels": own.patch_channels,
        }

    def begin(self, main: Guide | None) -> None:
        """Set the guide of projected heads: the run's own, or the one in the options.

        Args:
            main: the run's own; None to load it here if it is needed.

        Raises:
            ConfigError: its maps are not what the network was built for, or it does not take crops
                of the requested size.
            GuideError: it cannot be loaded.
        """
        if self.options.kind == "patch":
            return
        shared = main if self.options.guide is None else None
        guide = shared or load_guide(self._guide_config, self.device)
        if guide.info.num_channels != sum(self._num_channels):
            raise ConfigError(
                f"discriminator.guide: {guide.info.label} has {guide.info.num_channels} channels "
                f"instead of {sum(self._num_channels)}: check that it is the network that its name "
                "says"
            )
        if self._crop is not None:
            sizes = [guide.input_size(grid) for grid in range(1, self._crop + 1)]
            if self._crop not in sizes:
                near = min(sizes, key=lambda size: abs(size - self._side))
                raise ConfigError(
                    f"discriminator.crop: {guide.info.name} does not take images of {self._crop} "
                    f"pixels: use {near}"
                )
        self._guide = guide

    @property
    def guide(self) -> Guide | None:
        """The guide of projected heads, loaded on first use; None for patches."""
        if self._guide is None:
            self.begin(None)
        return self._guide

    @property
    def lazy(self) -> bool:
        """Whether :meth:`penalty_losses` needs a phase of its own, every ``every`` steps."""
        return self.options.every > 1 and bool(self.options.r1 or self.options.r2)

    @property
    def optimizer_scale(self) -> float:
        """For ``optimizer_scale``: k / (k + 1) with a lazy phase every k steps, otherwise 1."""
        every = self.options.every
        return every / (every + 1) if self.lazy else 1.0

    def d_losses(self, real: Tensor, fake: Tensor, positions: Tensor) -> Losses:
        """D's loss over real and generated images of the same positions.

        Args:
            real: (B, 3, R, R) in [-1, 1].
            fake: the same shape; no gradient flows to them.
            positions: (B,) int64 on the CPU.
        """
        both = torch.cat([real, fake.detach()])
        logits = self._scores(both, "judge/D", positions.repeat(2))
        halves = [one.chunk(2) for one in logits]
        loss = relativistic_d if self.options.loss == "relativistic" else hinge_d
        losses: Scalars = {self.options.loss: _mean([loss(*pair) for pair in halves])}
        report = {
            "real": _mean([real.detach().mean() for real, _ in halves]),
            "fake": _mean([fake.detach().mean() for _, fake in halves]),
        }
        if (self.options.r1 or self.options.r2) and not self.lazy:
            penalties, sizes = self.penalty_losses(real, fake, positions)
            return losses | penalties, report | sizes
        return losses, report

    def penalty_losses(self, real: Tensor, fake: Tensor, positions: Tensor) -> Losses:
        """R1 and R2 of D's mean logit, times gamma / 2 and ``every``.

        The gradients are with respect to the images before augmentation, crop and guide, or with
        respect to the guide's features. They are computed in float32, except in a projected D's
        guide on a GPU, which keeps its own type. A penalty whose gamma is 0 is left out. The
        arguments are those of :meth:`d_losses`.
        """
        own = self.options
        losses, report = {}, {}
        for name, gamma, images in (("r1", own.r1, real), ("r2", own.r2, fake)):
            if not gamma:
                continue
            penalty = self._penalty(images.detach(), positions)
            losses[name] = gamma / 2 * own.every * penalty
            report[f"{name}_penalty"] = penalty.detach()
        return losses, report

    def g_losses(
        self, fake: Tensor, real: Tensor | None, positions: Tensor, nimg_in_stage: int
    ) -> Losses:
        """G's loss, times its weight at this point of the stage.

        Args:
            fake: (B, 3, R, R) in [-1, 1], with a gradient.
            real: those of the same positions; only the relativistic loss reads them.
            positions: (B,) int64 on the CPU.
            nimg_in_stage: images that the stage had shown before this step, the same on all ranks.
        """
        fakes = self._scores(fake, "judge/G", positions)
        if self.options.loss == "relativistic":
            assert real is not None, "the relativistic loss needs real images"
            with torch.no_grad():
                reals = self._scores(real, "judge/G", positions)
            found = [relativistic_g(*pair) for pair in zip(reals, fakes, strict=True)]
        else:
            found = [hinge_g(one) for one in fakes]
        weight = self.weight(nimg_in_stage)
        report = {
            "adversarial_weight": torch.full((), weight, device=fake.device),
            "adversarial_fake": _mean([one.detach().mean() for one in fakes]),
        }
        return {"adversarial": weight * _mean(found)}, report

    def weight(self, nimg_in_stage: int) -> float:
        """Weight of G's loss; it rises linearly from 0 over the stage's first ``ramp_kimg``."""
        ramp = self.options.ramp_kimg * 1000
        return self.options.weight * (min(1.0, nimg_in_stage / ramp) if ramp else 1.0)

    def after_step(self) -> None:
        """One power iteration of every spectral norm, once per step."""
        update_spectral_norms(self.network)

    @torch.no_grad()
    def realism(self, images: Tensor) -> Tensor:
        """Mean logit (N,) float32 of images (N, 3, R, R), one at a time and not augmented.

        If D is trained on crops, it is the mean over crops that cover the image.
        """
        found = []
        for image in images:
            parts = image[None] if self._crop is None else tiles(image, self._crop)
            found.append(_per_image(self._logits(self._features(parts))).mean())
        return torch.stack(found)

    def _scores(self, images: Tensor, purpose: str, positions: Tensor) -> list[Tensor]:
        return self._logits(self._features(self._prepare(images, purpose, positions)))

    def _prepare(self, images: Tensor, purpose: str, positions: Tensor) -> Tensor:
        """Images as D sees them: augmented, then cropped."""
        images = diff_augment(images, self.seed, purpose, positions, self.options.augment)
        if self._crop is None:
            return images
        return random_crops(images, self._crop, self.seed, purpose, positions)

    def _features(self, images: Tensor) -> Tensor:
        """The network's input: the guide's concatenated maps, or the images themselves."""
        guide = self.guide
        if guide is None:
            return images
        return guide(to_guide(images, self._crop or guide.input_size(self.options.grid)))

    def _logits(self, features: Tensor) -> list[Tensor]:
        """Logits (B, P, P) of each head or scale."""
        maps = features.split(self._num_channels, 1) if self._num_channels else features
        logits: list[Tensor] = self.network(maps)
        return logits

    def _penalty(self, images: Tensor, positions: Tensor) -> Tensor:
        def seen(x: Tensor) -> Tensor:
            return self._features(self._prepare(x, "judge/D", positions))

        def mean_logit(features: Tensor) -> Tensor:
            return _per_image(self._logits(features))

        if self.options.penalty_on == "features":
            return r1_penalty(mean_logit, seen(images))
        return r1_penalty(lambda x: mean_logit(seen(x)), images)

    def _check_patches(self) -> None:
        own = self.options
        coarsest = self._side >> (own.patch_scales - 1)
        if num_patches(coarsest, own.patch_layers) < 1:
            raise ConfigError(
                f"discriminator.patch_scales: {self._side}x{self._side} pixels are too small for "
                f"{own.patch_scales} scales of {own.patch_layers} layers: use fewer"
            )


def _mean(values: list[Tensor]) -> Tensor:
    """Each head or scale counts the same, regardless of its number of locations."""
    return torch.stack(values).mean()


def _per_image(logits: list[Tensor]) -> Tensor:
    """Mean over locations, then over heads: (B,)."""
    return torch.stack([one.flatten(1).mean(1) for one in logits]).mean(0)


def random_crops(images: Tensor, size: int, seed: int, purpose: str, positions: Tensor) -> Tensor:
    """A random crop of each image; where it is depends on the sample's position.

    Args:
        images: (B, C, R, R), R at least ``size``; if they are equal, the images are returned.
        size: side of the crops in pixels.
        seed: the run's seed.
        purpose: what the images are for; other purposes give independent crops.
        positions: (B,) int64 on the CPU, of the samples in the global order.

    Returns:
        (B, C, size, size).
    """
    room = images.shape[-1] - size
    if not room:
        return images
    corners = rng.integers(seed, f"{purpose}/crop", positions, (2,), high=room + 1)
    y, x = (corners[:, :, None] + torch.arange(size)).unbind(1)
    y, x = to_device_together([y * images.shape[-1], x], images.device)
    index = (y[:, :, None] + x[:, None]).flatten(1)[:, None].expand(-1, images.shape[1], -1)
    crops: Tensor = images.flatten(2).gather(2, index).unflatten(2, (size, size))
    return crops


def tiles(image: Tensor, size: int) -> Tensor:
    """The fewest crops that cover an image (C, R, R), spread evenly: (N, C, size, size)."""
    side = image.shape[-1]
    starts = torch.linspace(0, side - size, math.ceil(side / size)).round().long().tolist()
    return torch.stack([image[:, y : y + size, x : x + size] for y in starts for x in starts])


class AdversaryUpdates:
    """Losses of a stage's discriminator, over real and generated images of the same positions.

    Args:
        adversary: the discriminator.
        images: generates the images of a microbatch, from latents of a purpose.
    """

    def __init__(self, adversary: Adversary, images: Callable[[Batch, str], Tensor]) -> None:
        self.adversary = adversary
        self.images = images

    def losses(self, batch: Batch) -> Losses:
        """Losses of D."""
        images = self.images(batch, "z/D")
        return self.adversary.d_losses(batch["image"], images, batch["position"])

    def penalties(self, batch: Batch) -> Losses:
        """Penalties on D's gradients."""
        images = self.images(batch, "z/D")
        return self.adversary.penalty_losses(batch["image"], images, batch["position"])
