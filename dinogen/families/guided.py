"""Family `guided`: a progressive generator taught by features of frozen networks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dinogen.config import Config, ConfigError, StageConfig
from dinogen.distributed import rng
from dinogen.families.base import Batch, Family, Inputs, Networks, Phase, Scalars, Verdict
from dinogen.guidance.conditioning import Asked, Rows, Text, clip_of, numbers_of
from dinogen.guidance.discriminator import Discriminating
from dinogen.guidance.gradient_cache import Features
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
# Generated pictures that held-out ones are compared with.
_HELD_OUT = 64


class Guided(Family):
    """Features of generated pictures are compared with those of real ones, stored as pyramids.

    With the original objective, ``mse`` against a random real picture, the best answer is the same
    for every z (see :func:`dinogen.losses.features.pyramid_mse`), so each curve is drawn with its
    floor and each probe measures the diversity that is left. The objectives that compare
    distributions are least where generated pictures are distributed as real ones. A discriminator
    can be added beside them.
    """

    Options = GuidedOptions

    def __init__(self, config: Config, stage: StageConfig, device: torch.device) -> None:
        super().__init__(config, stage, device)
        self.options = self.Options(**config.family.options)
        kind = ConditionalGenerator if self.options.text else ProgressiveGenerator
        self.G = kind(**self.arguments("G")).to(device)
        self.levels = self.options.levels(stage, config.guides)
        self.objective = Objective(self.options.objectives, self.levels)
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
        self.rows: Rows | None = None
        self.teacher: Teacher | None = None
        self.text: Text | None = None
        self.prompts: tuple[Tensor, float] | None = None
        self.real_distance: dict[str, float] = {}

    @property
    def networks(self) -> dict[str, nn.Module]:
        """G, and D where the stage has one."""
        return {"G": self.G} | ({"D": self.adversary.network} if self.adversary else {})

    @property
    def phases(self) -> tuple[Phase, ...]:
        """D, now and then its penalties, and G."""
        before = self.objective.joint.before if self.teacher and self.objective.sets else None
        phases = [Phase("G", "G", self._g_losses, before=before)]
        if self.adversary is not None:
            if self.adversary.lazy:
                every = self.adversary.options.every
                phases.insert(0, Phase("D_reg", "D", self._d_penalties, every, second_order=True))
            own = self.adversary.options
            penalised = bool(own.r1 or own.r2) and not self.adversary.lazy
            phases.insert(0, Phase("D", "D", self._d_losses, second_order=penalised))
        return tuple(phases)

    @property
    def inputs(self) -> Inputs:
        """The levels compared; pictures only for a discriminator."""
        size = self.stage.resolution if self.adversary else None
        asked = () if self.options.text is None else (self.options.text.level,)
        return Inputs(image_size=size, levels=(*self.levels, *asked), bank=self.options.bank)

    def begin(self, data: Dataset) -> None:
        """Load the guides, check that they made these shards, and measure how far reals differ."""
        self.teacher = Teacher(self.config, self.levels, data, self.device)
        split = self.config.data.split
        reals = self.teacher.reals(2 * self.options.probe_samples, split)
        self.real_distance = self.teacher.distances(reals)
        table = self.options.table
        if table is not None:
            self.rows = Rows(data, split, table.num_latents)
        chosen = self.options.text
        if chosen is not None:
            self.text = Text(chosen, self.config, data, self.device)
        beside = self._beside if chosen is not None and chosen.joint_weight else None
        self.objective.begin(
            self.teacher, self.config.seed, self.stage.batch, split, self._features, beside
        )
        if self.adversary is not None:
            self.adversary.begin(self.teacher.guides.get(""))

    def latents(self, indices: Tensor, seed: int) -> Tensor:
        """z (N, z_dim)."""
        return rng.normal(seed, "sample", indices, (self.options.z_dim,), self.device)

    def decode(
        self, networks: Networks, latents: Tensor, indices: Tensor, seed: int, psi: float = 1.0
    ) -> Tensor:
        """Pictures of latents; sample number i of P prompts is asked for number i mod P."""
        if self.prompts is None:
            return super().decode(networks, latents, indices, seed, psi)
        embedding, guidance = self.prompts
        asked = embedding[indices.to(embedding.device) % len(embedding)]
        images: Tensor = networks["G"](latents, asked, guidance=guidance)
        return images.float()

    def ask(self, texts: Sequence[str], guidance: float, facts: Mapping[str, Any]) -> None:
        """As in the base, by CLIP's embeddings of the texts."""
        if self.options.text is None:
            super().ask(texts, guidance, facts)
        self.prompts = None
        if texts:
            made_by = facts.get("clip", {})
            clip = self.text.clip if self.text else clip_of(self.config, made_by, self.device)
            self.prompts = (clip.captions(list(texts)), guidance)

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
        if network == "D":
            assert self.adversary is not None
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
        floor = None if self.adversary or self.text else self.objective.floor
        return {} if floor is None else {"floor": floor}

    def probe(self, networks: Networks, loss: float | None) -> Verdict:
        """Diversity of samples: mean pairwise feature distance over that of real pictures."""
        assert self.teacher is not None, "begin() comes first"
        indices = torch.arange(self.options.probe_samples)
        features = self.teacher.features(self.sample(networks, indices, self.config.seed))
        ratios = [
            mean_pairwise_distance(values.cpu()) / self.real_distance[level]
            for level, values in features.items()
        ]
        diversity = sum(ratios) / len(ratios)
        scalars = {"diversity": diversity}
        if not math.isfinite(diversity) or (loss is not None and not math.isfinite(loss)):
            return Verdict(scalars, "BROKEN", ("BROKEN: loss or samples are not finite",))
        share = f"samples differ {diversity:.1%} as much as real pictures"
        floor, near = self.constants().get("floor"), None
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
        """Against pyramids that were not trained on: each ``mse``, and ``energy``."""
        assert self.teacher is not None, "begin() comes first"
        found: Scalars = {}
        if self.objective.pairs:
            # No latent was learnt for these: theirs is any.
            own = self.objective.paired and self.rows is None
            z = self._z(batch, "z/held-out", own)
            asked = self.text.asked(batch, "ask/held-out", drop=False) if self.text else None
            features = self.teacher.features(_made(networks["G"], z, asked))
            found |= self.objective.held_out_pairs(features, batch)
        # The same for every part of the held-out ones, so that any parts have the same mean.
        z = self.latents(torch.arange(_HELD_OUT), self.config.seed)
        features = self.teacher.features(networks["G"](z))
        return found | self.objective.held_out_sets(features, batch)

    def describe(self) -> dict[str, Any]:
        """Which guides taught the run, and which CLIP; what a discriminator looks through."""
        found = self.teacher.describe() if self.teacher else {}
        if self.adversary is not None and self.adversary.guide is not None:
            sha256 = self.adversary.guide.info.weights_sha256
            found["frozen"] = {"family.discriminator.guide": sha256}
        return found | ({"clip": self.text.clip.info} if self.text else {})

    def _z(self, batch: Batch, purpose: str, paired: bool = False) -> Tensor:
        """Latents (B, z_dim) of samples: by their position or, ``paired``, their own."""
        positions = batch["position"]
        if paired and self.rows is not None:
            assert isinstance(self.G, ProgressiveGenerator) and self.G.table is not None
            learnt: Tensor = self.G.table(self.rows(batch["key"]).to(self.device))
            return learnt
        if paired:
            purpose, positions = "paired", numbers_of(batch["key"])
        shape = (self.options.z_dim,)
        return rng.normal(self.config.seed, purpose, positions, shape, self.device)

    def _asked(self, batch: Batch, purpose: str) -> Asked | None:
        return self.text.asked(batch, purpose) if self.text else None

    def _images(self, batch: Batch, purpose: str) -> Tensor:
        """Pictures that a microbatch's samples stand for, made as they are asked to be."""
        z = self._z(batch, purpose, self.objective.paired)
        return _made(self.G, z, self._asked(batch, "ask"))

    def _features(self, batch: Batch) -> Features:
        assert self.teacher is not None, "begin() comes first"
        return self.teacher.features(self._images(batch, "z"))

    def _beside(self, batch: Batch) -> Tensor:
        assert self.text is not None, "begin() comes first"
        of_bank = self.options.bank and "bank" not in batch
        return self.text.beside(batch, "ask/bank" if of_bank else "ask")

    def _g_losses(self, batch: Batch) -> tuple[Scalars, Scalars]:
        assert self.teacher is not None, "begin() comes first"
        asked = self._asked(batch, "ask")
        images = _made(self.G, self._z(batch, "z", self.objective.paired), asked)
        losses, report = self.objective.losses(
            batch, self.teacher.features(images), asked.keep if asked else None
        )
        if self.text and asked and self.text.options.clip_weight:
            losses["clip"] = self.text.options.clip_weight * self.text.loss(images, asked)
        if self.adversary is not None:
            positions, size = batch["position"], self.stage.batch
            shown = (int(positions[0]) - self.start) // size * size
            more, said = self.adversary.g_losses(images, batch["image"], positions, shown)
            losses, report = losses | more, report | said
        return losses, report

    def _d_losses(self, batch: Batch) -> tuple[Scalars, Scalars]:
        assert self.adversary is not None
        return self.adversary.d_losses(*self._shown(batch))

    def _d_penalties(self, batch: Batch) -> tuple[Scalars, Scalars]:
        assert self.adversary is not None
        return self.adversary.penalty_losses(*self._shown(batch))

    def _shown(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Real pictures, generated ones, their positions."""
        return batch["image"], self._images(batch, "z/D"), batch["position"]


def _made(G: nn.Module, z: Tensor, asked: Asked | None) -> Tensor:
    images: Tensor = G(z, asked.embedding, asked.keep) if asked else G(z)
    return images
