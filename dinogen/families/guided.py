"""Family `guided`: a progressive generator taught by features of frozen networks."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from dinogen import draws
from dinogen.config import Config, ConfigError, Section, StageConfig
from dinogen.families.base import Batch, Family, Inputs, Networks, Phase, Scalars, Verdict
from dinogen.guidance.joint import Features, JointObjective, is_of, real_features
from dinogen.guidance.teacher import Teacher
from dinogen.guidance.terms import MAIN, AnyTerm, Energy, Mse, Paired, PairTerm, SetTerm, titles
from dinogen.losses.pyramid import collapse_floor, mean_pairwise_distance, pyramid_mse
from dinogen.networks.progressive import ProgressiveGenerator
from shards.dataset import Dataset

NATIVE_UP_TO = 16
COLLAPSING_BELOW = 0.5
COLLAPSED_BELOW = 0.1
COLLAPSED_NEAR_FLOOR = 1.02
# Real pictures from which the floors are worked out.
_NUM_REALS = 512
# Generated pictures, at least, beside each part of the held-out ones.
_HELD_OUT = 32


class Guided(Family):
    """Features of generated pictures are compared with those of real ones, stored as pyramids.

    With the original objective, ``mse`` against a random real picture, the best answer is the same
    for every z (see :func:`dinogen.losses.pyramid.pyramid_mse`), so each curve is drawn with its
    floor and each probe measures the diversity that is left. The objectives that compare
    distributions are least where generated pictures are distributed as real ones.
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
        terms = dict(zip(titles(self.options.objectives), self.options.objectives, strict=True))
        self.pairs = {title: term for title, term in terms.items() if isinstance(term, PairTerm)}
        self.sets = {title: term for title, term in terms.items() if isinstance(term, SetTerm)}
        self.teacher: Teacher | None = None
        self.floors: dict[str, float] = {}
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
        """G alone."""
        return {"G": self.G}

    @property
    def phases(self) -> tuple[Phase, ...]:
        """One update of G."""
        return (Phase("G", "G", self._losses, before=self._before if self.sets else None),)

    @property
    def inputs(self) -> Inputs:
        """Only the levels compared; no picture is decoded."""
        return Inputs(image_size=None, levels=self.levels, bank=self.options.bank)

    def begin(self, data: Dataset) -> None:
        """Load the guides, check that they made these shards, and measure how far reals differ."""
        self.teacher = Teacher(self.config, self.levels, data, self.device)
        self.scales = self.teacher.scales()
        settings = (self.scales, self.config.seed, self.stage.batch, self._features)
        self.joint = JointObjective(self.sets, *settings)
        self.judge = JointObjective({"energy": Energy()}, *settings)
        split, on_error = self.config.data.split, self.config.data.on_error
        reals = self.teacher.reals(2 * self.options.probe_samples, split, on_error)
        self.real_distance = self.teacher.distances(reals)
        self.floors = {
            title: self._collapse_floor(term, data)
            for title, term in self.pairs.items()
            if isinstance(term, Mse)
        }
        if self.sets:
            self.floors |= self.joint.floors(self.teacher.reals(_NUM_REALS, split, on_error))

    def latents(self, indices: Tensor, seed: int) -> Tensor:
        """z (N, z_dim)."""
        return draws.normal(seed, "sample", indices, (self.options.z_dim,), self.device)

    def first_layer(self, networks: Networks) -> Tensor:
        """The dense layer to 4x4."""
        G = networks["G"]
        assert isinstance(G, ProgressiveGenerator)
        return G.dense.weight.detach()

    def arguments(self, network: str) -> dict[str, Any]:
        """Of G."""
        return {
            "resolution": self.stage.resolution,
            "z_dim": self.options.z_dim,
            "channel_base": self.options.channel_base,
            "channel_max": self.options.channel_max,
        }

    def new_parameters(self, network: str) -> set[str]:
        """The block and ToRGB of the stage's resolution."""
        return self.G.new_parameters()

    def trainable(self, network: str) -> set[str]:
        """While fading in only what is new; afterwards all that is in use."""
        if self.G.fading:
            return self.G.new_parameters()
        return {name for name, _ in self.G.named_parameters()} - self.G.old_to_rgb()

    def set_fade(self, networks: Networks, alpha: float, fading: bool) -> None:
        """Set alpha in every copy of G."""
        for network in networks.values():
            if isinstance(network, ProgressiveGenerator):
                network.set_fade(alpha, fading)

    def constants(self) -> dict[str, float]:
        """The least that the summed losses can reach, where it is known.

        Of ``mse`` it is the collapse floor, which one answer for every z reaches; of objectives
        that compare distributions what reals reach against other reals.
        """
        if len(self.floors) < len(self.pairs) + len(self.sets):
            return {}
        return {"floor": sum(self.floors.values())}

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
        floor = self.constants().get("floor")
        if not math.isfinite(diversity) or (loss is not None and not math.isfinite(loss)):
            return Verdict(scalars, "BROKEN", ("BROKEN: loss or samples are not finite",))
        share = f"samples differ {diversity:.1%} as much as real pictures"
        if diversity < COLLAPSED_BELOW:
            return Verdict(scalars, "COLLAPSED", (f"COLLAPSED: {share}",))
        if loss is not None and floor is not None and not self.sets:
            scalars["loss_over_floor"] = loss / floor
            if loss <= COLLAPSED_NEAR_FLOOR * floor:
                near = f"loss {loss:.4g} is within 2 % of the floor {floor:.4g}"
                return Verdict(scalars, "COLLAPSED", (f"COLLAPSED: {near}; {share}",))
        if diversity < COLLAPSING_BELOW:
            return Verdict(scalars, "COLLAPSING", (f"COLLAPSING: {share}",))
        return Verdict(scalars)

    def held_out(self, networks: Networks, batch: Batch) -> Scalars:
        """Against pyramids that were not trained on: ``mse`` and, of sets, ``energy``."""
        assert self.teacher is not None, "begin() comes first"
        real = {level: real_features(batch, level).float() for level in self.levels}
        found: Scalars = {}
        if self.pairs:
            z = self._z(batch, "z/held-out", self.pairs)
            features = self.teacher.features(networks["G"](z))
            found |= {title: self._pair(term, features, real) for title, term in self.pairs.items()}
        if self.sets:
            num = math.ceil(_HELD_OUT / len(batch["key"]))
            z = torch.cat([self._z(batch, f"z/held-out/{i}", {}) for i in range(num)])
            features = self.teacher.features(networks["G"](z))
            found["energy"] = self.judge.compare(features, real, self._no_directions).losses[
                "energy"
            ]
        return found

    def describe(self) -> dict[str, Any]:
        """Which guides taught the run."""
        return self.teacher.describe() if self.teacher else {}

    def _z(self, batch: Batch, purpose: str, terms: Mapping[str, PairTerm]) -> Tensor:
        """Latents (B, z_dim) of samples: by their keys if a term is paired, else by position."""
        positions = batch["position"]
        if any(isinstance(term, Paired) for term in terms.values()):
            purpose, positions = "paired", torch.tensor([_number(key) for key in batch["key"]])
        return draws.normal(
            self.config.seed, purpose, positions, (self.options.z_dim,), self.device
        )

    def _features(self, batch: Batch) -> Features:
        """Of generated pictures."""
        assert self.teacher is not None, "begin() comes first"
        return self.teacher.features(self.G(self._z(batch, "z", self.pairs)))

    def _before(self, micros: Sequence[tuple[Batch, int]]) -> None:
        self.joint.before(micros)

    def _losses(self, batch: Batch) -> tuple[Scalars, Scalars]:
        features = self._features(batch)
        losses: Scalars = {}
        report: Scalars = {}
        for title, term in self.pairs.items():
            real = {level: real_features(batch, level) for level in self.levels}
            losses[title] = term.weight * self._pair(term, features, real)
        if self.sets:
            joint, report = self.joint.losses(batch, features)
            losses |= joint
        return losses, report

    def _pair(self, term: PairTerm, generated: Features, real: Features) -> Tensor:
        """Mean squared error of the levels that a term compares."""
        levels = [level for level in self.levels if is_of(level, term.guides)]
        sides = []
        for features in (generated, real):
            scales = self.scales if term.normalize else {}
            sides.append(
                {k: features[k] * scales[k] if k in scales else features[k] for k in levels}
            )
        return pyramid_mse(*sides)

    def _collapse_floor(self, term: PairTerm, data: Dataset) -> float:
        """Of a term, with its weight."""
        floors = []
        for level in self.levels:
            if not is_of(level, term.guides):
                continue
            if term.normalize:
                variance = torch.from_numpy(data.level_variance(level)).to(self.device)
                floors.append(float((variance * self.scales[level].square()).mean()))
            else:
                floors.append(data.total_variance(level))
        return term.weight * collapse_floor(floors)

    @staticmethod
    def _no_directions(size: int, number: int) -> Tensor:
        raise AssertionError("energy has no directions")


def _number(key: str) -> int:
    """A number of 63 bits for a sample's key."""
    digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
