"""A discriminator beside a guided objective: its network, losses, penalties and ramped weight."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from dinogen.batch import Losses, Scalars
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


class Discriminating:
    """A discriminator, and what a family needs of it for the phases of D and G.

    All losses are means over samples and every draw goes by position, so nothing depends on how a
    batch is cut. Real and generated picture of one position are augmented and cropped alike: what
    tells them apart is then never the place they were cut from.

    Args:
        options: the section of the config.
        main: the run's own guide; only what is said of it is read here, see :meth:`begin`.
        stage: what is trained.
        seed: the run's seed.
        device: where the network lives.

    Raises:
        ConfigError: the stage's pictures leave a patch discriminator nothing to judge.
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
        """What the network's class is called with, JSON-ready."""
        own = self.options
        if own.kind == "projected":
            return {"num_channels": list(self._num_channels), "width": own.head_channels}
        return {
            "num_scales": own.patch_scales,
            "num_layers": own.patch_layers,
            "base_channels": own.patch_channels,
        }

    def begin(self, main: Guide | None) -> None:
        """Get the guide that projected heads look through: the run's own, or the options'.

        Args:
            main: the run's own; None to load it here if it is that one.

        Raises:
            ConfigError: its maps are not what the network was built for, or it takes no crops of
                the size asked for.
            GuideError: it cannot be loaded.
        """
        if self.options.kind == "patch":
            return
        shared = main if self.options.guide is None else None
        guide = shared or load_guide(self._guide_config, self.device)
        if guide.info.num_channels != sum(self._num_channels):
            raise ConfigError(
                f"discriminator.guide: {guide.info.label} has {guide.info.num_channels} channels "
                f"and not {sum(self._num_channels)}: is it what its name says?"
            )
        if self._crop is not None:
            sizes = [guide.input_size(grid) for grid in range(1, self._crop + 1)]
            if self._crop not in sizes:
                near = min(sizes, key=lambda size: abs(size - self._side))
                raise ConfigError(
                    f"discriminator.crop: {guide.info.name} takes no pictures of {self._crop} "
                    f"pixels: use {near}"
                )
        self._guide = guide

    @property
    def guide(self) -> Guide | None:
        """What projected heads look through, loaded where it was not yet; None for patches."""
        if self._guide is None:
            self.begin(None)
        return self._guide

    @property
    def lazy(self) -> bool:
        """Whether D needs a phase of its own for :meth:`penalty_losses`, each ``every`` steps."""
        return self.options.every > 1 and bool(self.options.r1 or self.options.r2)

    @property
    def optimizer_scale(self) -> float:
        """For ``Family.optimizer_scale``: k / (k + 1) with a lazy phase each k steps, else 1."""
        every = self.options.every
        return every / (every + 1) if self.lazy else 1.0

    def d_losses(self, real: Tensor, fake: Tensor, positions: Tensor) -> Losses:
        """D's loss over real and generated pictures of the same positions.

        Args:
            real: (B, 3, R, R) in [-1, 1].
            fake: as many; no gradient flows to them.
            positions: (B,) int64 on the CPU.
        """
        both = torch.cat([real, fake.detach()])
        logits = self._judge(both, "judge/D", positions.repeat(2))
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
        """gamma / 2 times R1 and R2 of D's mean logit, and times ``every``.

        In float32 but for a projected D's guide on a GPU, which stays in its own type.

        Differentiated to the pictures as they are, through augmentation, crop and guide, or to
        the guide's features. As :meth:`d_losses`; a penalty whose gamma is 0 is left out.
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
        """G's loss, times its weight at this place of the stage.

        Args:
            fake: (B, 3, R, R) in [-1, 1], with a gradient.
            real: as many of the same positions; only the relativistic loss reads them.
            positions: (B,) int64 on the CPU.
            nimg_in_stage: images that the stage had shown before this step, alike on all ranks.
        """
        fakes = self._judge(fake, "judge/G", positions)
        if self.options.loss == "relativistic":
            assert real is not None, "pairs need real pictures"
            with torch.no_grad():
                reals = self._judge(real, "judge/G", positions)
            found = [relativistic_g(*pair) for pair in zip(reals, fakes, strict=True)]
        else:
            found = [hinge_g(one) for one in fakes]
        weight = self.weight(nimg_in_stage)
        report = {
            "adversarial_weight": torch.tensor(weight, device=fake.device),
            "adversarial_fake": _mean([one.detach().mean() for one in fakes]),
        }
        return {"adversarial": weight * _mean(found)}, report

    def weight(self, nimg_in_stage: int) -> float:
        """Of G's loss: rises linearly from 0 over the first ``ramp_kimg`` of the stage."""
        ramp = self.options.ramp_kimg * 1000
        return self.options.weight * (min(1.0, nimg_in_stage / ramp) if ramp else 1.0)

    def after_step(self) -> None:
        """One power iteration of every spectral norm, however many forwards the step had."""
        update_spectral_norms(self.network)

    @torch.no_grad()
    def realism(self, images: Tensor) -> Tensor:
        """Mean logit (N,) float32 of pictures (N, 3, R, R), one by one and not augmented.

        Where D is trained on crops, the mean over parts that cover the picture.
        """
        found = []
        for image in images:
            parts = image[None] if self._crop is None else tiles(image, self._crop)
            found.append(_per_picture(self._logits(self._features(parts))).mean())
        return torch.stack(found)

    def _judge(self, images: Tensor, purpose: str, positions: Tensor) -> list[Tensor]:
        return self._logits(self._features(self._prepare(images, purpose, positions)))

    def _prepare(self, images: Tensor, purpose: str, positions: Tensor) -> Tensor:
        """Pictures as D is shown them: augmented, then cropped."""
        images = diff_augment(images, self.seed, purpose, positions, self.options.augment)
        if self._crop is None:
            return images
        return random_crops(images, self._crop, self.seed, purpose, positions)

    def _features(self, images: Tensor) -> Tensor:
        """What the network begins with: the guide's joined maps, or the pictures themselves."""
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

        def judge(features: Tensor) -> Tensor:
            return _per_picture(self._logits(features))

        if self.options.penalty_on == "features":
            return r1_penalty(judge, seen(images))
        return r1_penalty(lambda x: judge(seen(x)), images)

    def _check_patches(self) -> None:
        own = self.options
        coarsest = self._side >> (own.patch_scales - 1)
        if num_patches(coarsest, own.patch_layers) < 1:
            raise ConfigError(
                f"discriminator.patch_scales: {own.patch_scales} scales of {own.patch_layers} "
                f"halvings leave nothing of {self._side}x{self._side} pixels to judge: use fewer"
            )


def _mean(values: list[Tensor]) -> Tensor:
    """Each head or scale counts the same, however many places it judges."""
    return torch.stack(values).mean()


def _per_picture(logits: list[Tensor]) -> Tensor:
    """Mean over places, then over heads: (B,)."""
    return torch.stack([one.flatten(1).mean(1) for one in logits]).mean(0)


def random_crops(images: Tensor, size: int, seed: int, purpose: str, positions: Tensor) -> Tensor:
    """A part of each picture, anywhere in it, at a place drawn by the sample's position.

    Args:
        images: (B, C, R, R), R at least ``size``; of R itself the very same pictures come back.
        size: side of the parts, pixels.
        seed: the run's seed.
        purpose: what the pictures are for; other purposes give independent places.
        positions: (B,) int64 on the CPU, places of the samples in the global order.

    Returns:
        (B, C, size, size).
    """
    room = images.shape[-1] - size
    if not room:
        return images
    corners = rng.integers(seed, f"{purpose}/crop", positions, (2,), high=room + 1).tolist()
    parts = [
        image[:, y : y + size, x : x + size] for image, (y, x) in zip(images, corners, strict=True)
    ]
    return torch.stack(parts)


def tiles(image: Tensor, size: int) -> Tensor:
    """As few parts of one picture (C, R, R) as cover it, spread evenly: (N, C, size, size)."""
    side = image.shape[-1]
    starts = torch.linspace(0, side - size, math.ceil(side / size)).round().long().tolist()
    return torch.stack([image[:, y : y + size, x : x + size] for y in starts for x in starts])
