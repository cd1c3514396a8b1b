"""Family `guided`: a progressive generator taught by features of frozen networks."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dinogen.batch import Batch, Features, Losses, Scalars
from dinogen.config import Config, ConfigError, StageConfig
from dinogen.distributed import rng
from dinogen.errors import UserError
from dinogen.families.abilities import not_trained_with_text
from dinogen.families.base import Condition, Family, Inputs, Networks, Phase, Verdict
from dinogen.guidance.conditioning import Asked, Rows, Text, clip_of, numbers_of
from dinogen.guidance.discriminator import Discriminating
from dinogen.guidance.guides import Teacher
from dinogen.guidance.options import GuidedOptions, check_sets
from dinogen.guidance.weighted import Objective
from dinogen.losses.features import mean_pairwise_distance
from dinogen.networks.conditional import ConditionalGenerator
from dinogen.networks.progressive import ProgressiveGenerator
from shards.read.dataset import Dataset

COLLAPSING_BELOW = 0.5
COLLAPSED_BELOW = 0.1
COLLAPSED_NEAR_FLOOR = 1.02
# Generated images that held-out ones are compared with.
_HELD_OUT = 64


class Guided(Family):
    """Features of generated images are compared with those of real ones, stored as pyramids.

    With the original objective, ``mse`` against a random real image, the best answer is the same
    for every z (see :func:`dinogen.losses.features.pyramid_mse`), so each curve is drawn with its
    floor and each probe measures the diversity that is left. The objectives that compare
    distributions are least where generated images are distributed as real ones. A discriminator
    can be added beside them.
    """

    Options = GuidedOptions

    def __init__(self, config: Config, stage: StageConfig, device: torch.device) -> None:
        super().__init__(config, stage, device)
        self.options = self.Options(**config.family.options)
        kind = ConditionalGenerator if self.options.text else ProgressiveGenerator
        self.G = kind(**self.arguments("G")).to(device)
        self.levels = self.options.levels(stage, config.guides)
        check_sets(self.options, stage.batch)
        self.adversary: Discriminating | None = None
        chosen = self.options.discriminator
        if chosen is not None and not any(chosen.applies(s) for s in config.stages):
            raise ConfigError(
                f"family.discriminator.from_resolution: {chosen.from_resolution}, but no stage is "
                "as large: the discriminator would never be trained"
            )
        if chosen is not None and chosen.applies(stage):
            self.adversary = Discriminating(chosen, config.guide, stage, config.seed, device)
        self._training: GuidedTraining | None = None

    @property
    def networks(self) -> dict[str, nn.Module]:
        """G, and D where the stage has one."""
        return {"G": self.G} | ({"D": self.adversary.network} if self.adversary else {})

    @property
    def phases(self) -> tuple[Phase, ...]:
        """D, now and then its penalties, and G; none before there are data to train on."""
        return self._training.phases if self._training else ()

    @property
    def headline(self) -> str:
        """G's losses."""
        return "G"

    @property
    def inputs(self) -> Inputs:
        """The levels compared; images only for a discriminator."""
        size = self.stage.resolution if self.adversary else None
        asked = () if self.options.text is None else (self.options.text.level,)
        return Inputs(image_size=size, levels=(*self.levels, *asked), bank=self.options.bank)

    def begin(self, data: Dataset) -> None:
        """Load the guides, check that they made these shards, and measure how far reals differ."""
        self._training = GuidedTraining(self, data)

    @property
    def training(self) -> GuidedTraining:
        """What :meth:`begin` made of the data.

        Raises:
            UserError: it was not called, as for a family that only samples.
        """
        if self._training is None:
            raise UserError(
                "family guided: only what is trained or measured has its guides: call "
                "begin(data) with the data of the run"
            )
        return self._training

    def latents(self, indices: Tensor, seed: int) -> Tensor:
        """z (N, z_dim)."""
        return rng.normal(seed, "sample", indices, (self.options.z_dim,), self.device)

    def sample(
        self, networks: Networks, indices: Tensor, seed: int, condition: Condition | None = None
    ) -> Tensor:
        """As in the base; sample number i of P embeddings is conditioned on number i modulo P."""
        if condition is None:
            return super().sample(networks, indices, seed)
        rows = condition.embeddings
        own = rows[indices.to(rows.device) % len(rows)]
        z = self.latents(indices, seed)
        images: Tensor = networks["G"](z, own, guidance=condition.guidance)
        return images.float()

    def condition(
        self, texts: Sequence[str], guidance: float, facts: Mapping[str, Any]
    ) -> Condition:
        """CLIP's embeddings of the texts."""
        if self.options.text is None:
            raise not_trained_with_text(self)
        text = self._training.text if self._training else None
        clip = text.clip if text else clip_of(self.config, facts.get("clip", {}), self.device)
        return Condition(clip.captions(list(texts)), guidance)

    def realism(self, images: Tensor) -> Tensor | None:
        """The discriminator's mean logit, where the stage has one."""
        return self.adversary.realism(images) if self.adversary else None

    def first_layer(self, networks: Networks) -> Tensor | None:
        """The dense layer to 4x4; None behind a mapping, which is not linear."""
        G = networks["G"]
        if isinstance(G, ConditionalGenerator):
            return None
        assert isinstance(G, ProgressiveGenerator)
        return G.dense.weight.detach()

    def arguments(self, network: str) -> dict[str, Any]:
        """Of G or D."""
        if network == "D" and self.adversary is not None:
            return self.adversary.arguments()
        found: dict[str, Any] = {
            "resolution": self.stage.resolution,
            "z_dim": self.options.z_dim,
            "channel_base": self.options.channel_base,
            "channel_max": self.options.channel_max,
        }
        table, text = self.options.table, self.options.text
        if table is not None:
            found |= {"num_latents": table.num_latents, "latent_rate": table.latent_rate}
        if text is not None:
            found |= {"embed_dim": text.embed_dim, "num_mapping_layers": text.mapping_layers}
        return found

    def new_parameters(self, network: str) -> set[str]:
        """The block and ToRGB of the stage's resolution; all of a D, which is each stage's own."""
        if network == "D":
            return set(self.networks["D"].state_dict())
        return self.G.new_parameters()

    def trainable(self, network: str) -> set[str]:
        """While fading in only what is new; afterwards all that is in use."""
        if network == "D":
            return super().trainable(network)
        if self.G.fading:
            return self.G.new_parameters()
        return {name for name, _ in self.G.named_parameters()} - self.G.old_to_rgb()

    def set_fade(self, networks: Networks, alpha: float, fading: bool) -> None:
        """Set alpha in every copy of G."""
        for network in networks.values():
            if isinstance(network, ProgressiveGenerator):
                network.set_fade(alpha, fading)

    def optimizer_scale(self, network: str) -> float:
        """k / (k + 1) for a D with lazy penalties."""
        return self.adversary.optimizer_scale if network == "D" and self.adversary else 1.0

    def after_step(self, nimg: int) -> None:
        """Spectral norms of D follow its weights."""
        if self.adversary is not None:
            self.adversary.after_step()

    def constants(self) -> dict[str, float]:
        """The least that the objectives can reach, see :attr:`Objective.floor`."""
        return self._training.constants if self._training else {}

    def probe(self, networks: Networks, loss: float | None) -> Verdict:
        """Diversity of samples: mean pairwise feature distance over that of real images."""
        return self.training.probe(networks, loss)

    def held_out(self, networks: Networks, batch: Batch) -> Scalars:
        """Against pyramids that were not trained on: each ``mse``, and ``energy``."""
        return self.training.held_out(networks, batch)

    def describe(self) -> dict[str, Any]:
        """Which guides taught the run, and which CLIP; what a discriminator looks through."""
        found = self._training.teacher.describe() if self._training else {}
        if self.adversary is not None and self.adversary.guide is not None:
            sha256 = self.adversary.guide.info.weights_sha256
            found["frozen"] = {"family.discriminator.guide": sha256}
        text = self._training.text if self._training else None
        return found | ({"clip": text.clip.info} if text else {})


class GuidedTraining:
    """What one stage of the guided family is trained by, and measured with.

    Args:
        family: whose networks are trained.
        data: what they are trained on.

    Raises:
        ConfigError: the shards lack what the family reads, or were made by another guide.
    """

    def __init__(self, family: Guided, data: Dataset) -> None:
        config, options, stage = family.config, family.options, family.stage
        self.family = family
        self.options = options
        self.seed = config.seed
        self.device = family.device
        self.adversary = family.adversary
        self.teacher = Teacher(config, family.levels, data, self.device)
        split = config.data.split
        reals = self.teacher.reals(2 * options.probe_samples, split)
        self.real_distance = self.teacher.distances(reals)
        table, chosen = options.table, options.text
        self.rows = Rows(data, split, table.num_latents) if table is not None else None
        self.text = Text(chosen, config, data, self.device) if chosen is not None else None
        beside = None
        if self.text is not None and self.text.options.joint_weight:
            beside = partial(_conditions, self.text, options.bank)
        self.objective = Objective(
            options.objectives, self.teacher, self.seed, stage.batch, split, self._features, beside
        )
        if self.adversary is not None:
            self.adversary.begin(self.teacher.guides.get(""))
        self.phases = self._phases()

    def _phases(self) -> tuple[Phase, ...]:
        before = self.objective.joint.before if self.objective.sets else None
        phases = [Phase("G", "G", self._g_losses, before=before)]
        if self.adversary is not None:
            adversarial = _Adversarial(self.adversary, self._images)
            own = self.adversary.options
            if self.adversary.lazy:
                lazy = Phase("D_reg", "D", adversarial.penalties, own.every, second_order=True)
                phases.insert(0, lazy)
            penalised = bool(own.r1 or own.r2) and not self.adversary.lazy
            phases.insert(0, Phase("D", "D", adversarial.losses, second_order=penalised))
        return tuple(phases)

    @property
    def constants(self) -> dict[str, float]:
        """See :meth:`Guided.constants`."""
        floor = None if self.adversary or self.text else self.objective.floor
        return {} if floor is None else {"floor": floor}

    def probe(self, networks: Networks, loss: float | None) -> Verdict:
        """See :meth:`Guided.probe`."""
        indices = torch.arange(self.options.probe_samples)
        features = self.teacher.features(self.family.sample(networks, indices, self.seed))
        ratios = [
            mean_pairwise_distance(values.cpu()) / self.real_distance[level]
            for level, values in features.items()
        ]
        diversity = sum(ratios) / len(ratios)
        scalars = {"diversity": diversity}
        if not math.isfinite(diversity) or (loss is not None and not math.isfinite(loss)):
            return Verdict(scalars, "BROKEN", ("BROKEN: loss or samples are not finite",))
        share = f"samples differ {diversity:.1%} as much as real images"
        floor, near = self.constants.get("floor"), None
        # Of objectives between distributions it is what all would reach, and no sign of collapse.
        if loss is not None and floor is not None and not self.objective.sets:
            scalars["loss_over_floor"] = loss / floor
            if loss <= COLLAPSED_NEAR_FLOOR * floor:
                near = f"loss {loss:.4g} is within 2 % of the floor {floor:.4g}; {share}"
        if near is not None or diversity < COLLAPSED_BELOW:
            return Verdict(scalars, "COLLAPSED", (f"COLLAPSED: {near or share}",))
        if diversity < COLLAPSING_BELOW:
            return Verdict(scalars, "COLLAPSING", (f"COLLAPSING: {share}",))
        return Verdict(scalars)

    def held_out(self, networks: Networks, batch: Batch) -> Scalars:
        """See :meth:`Guided.held_out`."""
        found: Scalars = {}
        if self.objective.pairs:
            # No latent was learnt for these: theirs is any.
            own = self.objective.paired and self.rows is None
            z = self._z(batch, "z/held-out", own)
            asked = self.text.asked(batch, "ask/held-out", drop=False) if self.text else None
            features = self.teacher.features(_made(networks["G"], z, asked))
            found |= self.objective.held_out_pairs(features, batch)
        # The same for every part of the held-out ones, so that any parts have the same mean.
        z = self.family.latents(torch.arange(_HELD_OUT), self.seed)
        features = self.teacher.features(networks["G"](z))
        return found | self.objective.held_out_sets(features, batch)

    def _z(self, batch: Batch, purpose: str, paired: bool = False) -> Tensor:
        """Latents (B, z_dim) of samples: by their position or, ``paired``, their own."""
        positions = batch["position"]
        G = self.family.G
        if paired and self.rows is not None and G.table is not None:
            learnt: Tensor = G.table(self.rows(batch["key"]).to(self.device))
            return learnt
        if paired:
            purpose, positions = "paired", numbers_of(batch["key"])
        return rng.normal(self.seed, purpose, positions, (self.options.z_dim,), self.device)

    def _images(self, batch: Batch, purpose: str) -> Tensor:
        """An image for each sample of a microbatch, conditioned as in training."""
        asked = self.text.asked(batch, "ask") if self.text else None
        return _made(self.family.G, self._z(batch, purpose, self.objective.paired), asked)

    def _features(self, batch: Batch) -> Features:
        return self.teacher.features(self._images(batch, "z"))

    def _g_losses(self, batch: Batch) -> Losses:
        asked = self.text.asked(batch, "ask") if self.text else None
        images = _made(self.family.G, self._z(batch, "z", self.objective.paired), asked)
        losses, report = self.objective.losses(
            batch, self.teacher.features(images), asked.keep if asked else None
        )
        if self.text and asked and self.text.options.clip_weight:
            losses["clip"] = self.text.options.clip_weight * self.text.loss(images, asked)
        if self.adversary is not None:
            positions, size = batch["position"], self.family.stage.batch
            shown = (int(positions[0]) - self.family.start) // size * size
            more, said = self.adversary.g_losses(images, batch["image"], positions, shown)
            losses, report = losses | more, report | said
        return losses, report


class _Adversarial:
    """Losses of a stage's discriminator, over real and generated images of the same positions.

    Args:
        adversary: whose losses they are.
        images: generated ones of a microbatch, from latents of a purpose.
    """

    def __init__(self, adversary: Discriminating, images: Callable[[Batch, str], Tensor]) -> None:
        self.adversary = adversary
        self.images = images

    def losses(self, batch: Batch) -> Losses:
        """Of D."""
        images = self.images(batch, "z/D")
        return self.adversary.d_losses(batch["image"], images, batch["position"])

    def penalties(self, batch: Batch) -> Losses:
        """Of D's gradients."""
        images = self.images(batch, "z/D")
        return self.adversary.penalty_losses(batch["image"], images, batch["position"])


def _conditions(text: Text, bank: int, batch: Batch) -> Tensor:
    """What the samples of a microbatch or, if there is one, of the bank are conditioned on."""
    of_bank = bank and "bank" not in batch
    return text.beside(batch, "ask/bank" if of_bank else "ask")


def _made(G: nn.Module, z: Tensor, asked: Asked | None) -> Tensor:
    images: Tensor = G(z, asked.embedding, asked.keep) if asked else G(z)
    return images
