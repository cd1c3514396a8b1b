"""Family `guided`: a progressive generator taught by features of frozen networks."""

from __future__ import annotations

import hashlib
import math
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from dinogen import draws
from dinogen.config import Config, ConfigError, Section, StageConfig
from dinogen.families.base import Batch, Family, Inputs, Networks, Phase, Scalars, Verdict
from dinogen.guidance.discriminate import Discriminating
from dinogen.guidance.discriminator_options import DiscriminatorOptions
from dinogen.guidance.joint import Features
from dinogen.guidance.objective import Objective
from dinogen.guidance.teacher import Teacher
from dinogen.guidance.terms import MAIN, AnyTerm, Mse
from dinogen.losses.pyramid import mean_pairwise_distance
from dinogen.networks.progressive import ProgressiveGenerator
from shards.dataset import Dataset

NATIVE_UP_TO = 16
COLLAPSING_BELOW = 0.5
COLLAPSED_BELOW = 0.1
COLLAPSED_NEAR_FLOOR = 1.02
# Generated pictures, at least, beside each part of the held-out ones.
_HELD_OUT = 32


class Guided(Family):
    """Features of generated pictures are compared with those of real ones, stored as pyramids.

    With the original objective, ``mse`` against a random real picture, the best answer is the same
    for every z (see :func:`dinogen.losses.pyramid.pyramid_mse`), so each curve is drawn with its
    floor and each probe measures the diversity that is left. The objectives that compare
    distributions are least where generated pictures are distributed as real ones. A discriminator
    can be added beside them.
    """

    class Options(Section):
        """Keys of ``family:`` for ``name: guided``."""

        objectives: tuple[AnyTerm, ...] = Field(
            (Mse(),), min_length=1, description="what is summed: names, weights, options"
        )
        bank: int = Field(
            0,
            ge=0,
            description="so many further reals each step for objectives that compare "
            "distributions; 0: as many as are generated",
        )
        discriminator: DiscriminatorOptions | None = Field(
            None, description="trained beside them; none unless given"
        )
        pyramid: Literal["native", "pooled"] = Field(
            "native",
            description="targets up to 16x16: features of the shrunk picture, or pooled features "
            "of the full one; above 16x16 always pooled",
        )
        grids: dict[str, tuple[int, ...]] = Field(
            {},
            description="above 16x16, of main and of each of guides:; 16, 8 and 4 unless given",
        )
        z_dim: int = Field(512, ge=1, description="size of the latent")
        channel_base: int = Field(16384, ge=4, description="channels at R are base / R ...")
        channel_max: int = Field(512, ge=1, description="... and at most this")
        probe_samples: int = Field(64, ge=2, description="pictures per diversity probe")

        @model_validator(mode="before")
        @classmethod
        def _one_name(cls, values: Any) -> Any:
            # One objective by its name alone; so it was written once.
            if isinstance(values, dict) and "objective" in values and "objectives" not in values:
                values = dict(values)
                values["objectives"] = [{"name": values.pop("objective")}]
            return values

    def __init__(self, config: Config, stage: StageConfig, device: torch.device) -> None:
        super().__init__(config, stage, device)
        self.options = self.Options(**config.family.options)
        self.G = ProgressiveGenerator(**self.arguments("G")).to(device)
        self.levels = self._levels()
        self.objective = Objective(self.options.objectives, self.levels)
        if self.options.bank and not self.objective.sets:
            raise ConfigError(
                "family.bank: none of family.objectives compares distributions, so a bank of "
                "reals means nothing: leave it out"
            )
        self.adversary: Discriminating | None = None
        chosen = self.options.discriminator
        if chosen is not None and chosen.applies(stage):
            self.adversary = Discriminating(chosen, config.guide, stage, config.seed, device)
        self.teacher: Teacher | None = None
        self.real_distance: dict[str, float] = {}

    def _levels(self) -> tuple[str, ...]:
        """What is read and compared at this stage."""
        options, size = self.options, self.stage.resolution
        guides = (MAIN, *self.config.guides)
        for name in (*options.grids, *(g for term in options.objectives for g in term.guides)):
            if name not in guides:
                raise ConfigError(
                    f"family: there is no guide {name}: name one of {', '.join(guides)}, or add it "
                    "to guides:"
                )
        levels = []
        for name in guides:
            prefix = "" if name == MAIN else f"{name}."
            if size <= NATIVE_UP_TO:
                levels.append(f"{prefix}{options.pyramid[0]}{size}")
            else:
                levels += [f"{prefix}p{grid}" for grid in options.grids.get(name, (16, 8, 4))]
        return tuple(levels)

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
                phases.insert(0, Phase("D_reg", "D", self._d_penalties, every))
            phases.insert(0, Phase("D", "D", self._d_losses))
        return tuple(phases)

    @property
    def inputs(self) -> Inputs:
        """The levels compared; pictures only for a discriminator."""
        size = self.stage.resolution if self.adversary else None
        return Inputs(image_size=size, levels=self.levels, bank=self.options.bank)

    def begin(self, data: Dataset) -> None:
        """Load the guides, check that they made these shards, and measure how far reals differ."""
        self.teacher = Teacher(self.config, self.levels, data, self.device)
        split = self.config.data.split
        reals = self.teacher.reals(2 * self.options.probe_samples, split)
        self.real_distance = self.teacher.distances(reals)
        self.objective.begin(
            self.teacher, self.config.seed, self.stage.batch, split, self._features
        )
        if self.adversary is not None:
            self.adversary.begin(self.teacher.guides.get(""))

    def latents(self, indices: Tensor, seed: int) -> Tensor:
        """z (N, z_dim)."""
        return draws.normal(seed, "sample", indices, (self.options.z_dim,), self.device)

    def realism(self, images: Tensor) -> Tensor | None:
        """The discriminator's mean logit, where the stage has one."""
        return self.adversary.realism(images) if self.adversary else None

    def first_layer(self, networks: Networks) -> Tensor:
        """The dense layer to 4x4."""
        G = networks["G"]
        assert isinstance(G, ProgressiveGenerator)
        return G.dense.weight.detach()

    def arguments(self, network: str) -> dict[str, Any]:
        """Of G or D."""
        if network == "D":
            assert self.adversary is not None
            return self.adversary.arguments()
        return {
            "resolution": self.stage.resolution,
            "z_dim": self.options.z_dim,
            "channel_base": self.options.channel_base,
            "channel_max": self.options.channel_max,
        }

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
        floor = self.objective.floor
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
        if diversity < COLLAPSED_BELOW:
            return Verdict(scalars, "COLLAPSED", (f"COLLAPSED: {share}",))
        floor, alone = self.objective.floor, not (self.objective.sets or self.adversary)
        if loss is not None and floor is not None and alone:
            scalars["loss_over_floor"] = loss / floor
            if loss <= COLLAPSED_NEAR_FLOOR * floor:
                near = f"loss {loss:.4g} is within 2 % of the floor {floor:.4g}"
                return Verdict(scalars, "COLLAPSED", (f"COLLAPSED: {near}; {share}",))
        if diversity < COLLAPSING_BELOW:
            return Verdict(scalars, "COLLAPSING", (f"COLLAPSING: {share}",))
        return Verdict(scalars)

    def held_out(self, networks: Networks, batch: Batch) -> Scalars:
        """Against pyramids that were not trained on: each ``mse`` and, of sets, ``energy``."""
        assert self.teacher is not None, "begin() comes first"
        found: Scalars = {}
        if self.objective.pairs:
            z = self._z(batch, "z/held-out", self.objective.paired)
            features = self.teacher.features(networks["G"](z))
            found |= self.objective.held_out_pairs(features, batch)
        if self.objective.sets:
            num = math.ceil(_HELD_OUT / len(batch["key"]))
            z = torch.cat([self._z(batch, f"z/held-out/{i}") for i in range(num)])
            features = self.teacher.features(networks["G"](z))
            found |= self.objective.held_out_sets(features, batch)
        return found

    def describe(self) -> dict[str, Any]:
        """Which guides taught the run."""
        return self.teacher.describe() if self.teacher else {}

    def _z(self, batch: Batch, purpose: str, paired: bool = False) -> Tensor:
        """Latents (B, z_dim) of samples: by their position or, ``paired``, by their key."""
        positions = batch["position"]
        if paired:
            purpose, positions = "paired", torch.tensor([_number(key) for key in batch["key"]])
        shape = (self.options.z_dim,)
        return draws.normal(self.config.seed, purpose, positions, shape, self.device)

    def _features(self, batch: Batch) -> Features:
        """Of the pictures that a microbatch's samples stand for."""
        assert self.teacher is not None, "begin() comes first"
        return self.teacher.features(self.G(self._z(batch, "z", self.objective.paired)))

    def _g_losses(self, batch: Batch) -> tuple[Scalars, Scalars]:
        assert self.teacher is not None, "begin() comes first"
        images = self.G(self._z(batch, "z", self.objective.paired))
        losses, report = self.objective.losses(batch, self.teacher.features(images))
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
        fake = self.G(self._z(batch, "z/D", self.objective.paired))
        return batch["image"], fake, batch["position"]


def _number(key: str) -> int:
    """A number of 63 bits for a sample's key."""
    digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
