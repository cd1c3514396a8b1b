"""The weighted sum of a config's objectives: its losses, its floor, its held-out figures."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dinogen.batch import Batch, Features, Losses, Scalars
from dinogen.guidance.gradient_cache import JointObjective, is_of, real_features
from dinogen.guidance.guides import Teacher
from dinogen.guidance.objectives import AnyTerm, Energy, Mse, Paired, PairTerm, SetTerm, titles
from dinogen.losses.features import collapse_floor, pyramid_mse

# Real pictures from which the floors of objectives between distributions are worked out.
_NUM_REALS = 512


class Objective:
    """What a generator is taught by features, of one stage.

    Args:
        terms: as the config names them.
        teacher: of the run; its levels are compared.
        seed: of the run.
        batch: size of the global batch.
        split: of the reals that the floors are worked out from.
        features: of a microbatch's generated images.
        beside: what its samples are conditioned on, see :class:`JointObjective`.
    """

    def __init__(
        self,
        terms: Sequence[AnyTerm],
        teacher: Teacher,
        seed: int,
        batch: int,
        split: str,
        features: Callable[[Batch], Features],
        beside: Callable[[Batch], Tensor] | None = None,
    ) -> None:
        named = dict(zip(titles(terms), terms, strict=True))
        self.levels = teacher.levels
        self.pairs = {name: term for name, term in named.items() if isinstance(term, PairTerm)}
        self.sets = {name: term for name, term in named.items() if isinstance(term, SetTerm)}
        self.scales = teacher.scales()
        self.joint = JointObjective(self.sets, self.scales, seed, batch, features, beside)
        # One measure for all of them, so that runs with different objectives can be compared.
        self.judge = JointObjective({"energy": Energy()}, self.scales, seed, batch, features)
        self.floors = {
            name: term.weight * self._collapse_floor(term, teacher)
            for name, term in self.pairs.items()
            if isinstance(term, Mse)
        }
        if self.sets and beside is None:
            self.floors |= self.joint.floors(teacher.reals(_NUM_REALS, split))

    @property
    def paired(self) -> bool:
        """Whether z has to be a function of the sample's key."""
        return any(isinstance(term, Paired) for term in self.pairs.values())

    @property
    def floor(self) -> float | None:
        """The least that the summed losses can reach, where it is known.

        Of ``mse`` it is the collapse floor, which one answer for every z reaches; of objectives
        between distributions it is what reals reach against other reals.
        """
        known = len(self.floors) == len(self.pairs) + len(self.sets)
        return sum(self.floors.values()) if known else None

    def losses(self, batch: Batch, features: Features, keep: Tensor | None = None) -> Losses:
        """Weighted losses and what else is worth a curve, as ``Phase.losses`` gives them.

        Args:
            batch: a microbatch, with the stored features of its real pictures.
            features: of its generated pictures.
            keep: (B,) bool, which of them were asked to be their real pictures; all without it.
        """
        losses: Scalars = {}
        report: Scalars = {}
        if self.pairs:
            real = self.real(batch)
            for name, term in self.pairs.items():
                losses[name] = term.weight * self._pair(
                    term, features, real, self._taught(term, keep)
                )
        if self.sets:
            joint, report = self.joint.losses(batch, features)
            losses |= joint
        return losses, report

    def held_out_pairs(self, features: Features, batch: Batch) -> Scalars:
        """Mean squared errors of samples that were not trained on, by name."""
        real = self.real(batch)
        return {name: self._pair(term, features, real) for name, term in self.pairs.items()}

    def held_out_sets(self, features: Features, batch: Batch) -> Scalars:
        """Energy distance between generated samples, two at least, and those of ``batch``: a mean
        over these.
        """

        def none(size: int, number: int) -> Tensor:
            raise AssertionError("energy has no directions")

        return {"energy": self.judge.compare(features, self.real(batch), none).losses["energy"]}

    def real(self, batch: Batch) -> Features:
        """Stored features of a batch's real pictures, by level."""
        return {level: real_features(batch, level).float() for level in self.levels}

    def _taught(self, term: PairTerm, keep: Tensor | None) -> Tensor | None:
        # Against a real picture that neither words nor z tell it to be, a sample's best answer is
        # the mean: objectives between distributions know better, where they look at the same.
        compared = all(
            any(is_of(level, other.guides) for other in self.sets.values())
            for level in self.levels
            if is_of(level, term.guides)
        )
        return keep if compared and not isinstance(term, Paired) else None

    def _pair(
        self, term: PairTerm, generated: Features, real: Features, keep: Tensor | None = None
    ) -> Tensor:
        sides: list[Features] = []
        for features in (generated, real):
            own = {k: v for k, v in features.items() if is_of(k, term.guides)}
            sides.append({k: v * self.scales[k] for k, v in own.items()} if term.normalize else own)
        return pyramid_mse(sides[0], sides[1], keep)

    def _collapse_floor(self, term: PairTerm, teacher: Teacher) -> float:
        floors = []
        for level in self.levels:
            if not is_of(level, term.guides):
                continue
            if term.normalize:
                variance = torch.from_numpy(teacher.data.level_variance(level))
                scale = self.scales[level].cpu()
                floors.append(float((variance * scale.square()).mean()))
            else:
                floors.append(teacher.data.total_variance(level))
        return collapse_floor(floors)
