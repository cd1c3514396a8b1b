"""The weighted sum of a config's objectives, also of those over the whole global batch.

The latter are cached gradients (Gao et al. 2021, "Scaling Deep Contrastive Learning Batch Size
under Memory Limited Setup", section 3.2): the loss is first differentiated with respect to the
features of all samples; then each microbatch goes through the generator with its part of that
gradient. So thousands of samples are compared in the memory of one microbatch, and the gradient is
that of the whole batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from dinogen.batch import Batch, Features, GradientCache, Losses, Scalars
from dinogen.distributed import rng
from dinogen.distributed.process_group import Ranks
from dinogen.guidance.classes import ClassBatches
from dinogen.guidance.comparing import (
    Directions,
    DistributionObjective,
    PairObjective,
    is_of,
    with_gradients,
)
from dinogen.guidance.guides import GuideSet, stored_features
from dinogen.guidance.objectives import AnyObjective, Energy, Mse, Paired, titles
from dinogen.guidance.sets import Conditions, Groups, Spread
from dinogen.losses.features import collapse_floor
from shards.read.order import share_sizes


class GlobalBatchObjective:
    """The weighted sum of objectives between distributions, over all ranks and microbatches.

    Args:
        objectives: by their titles.
        scales: per level, factors (C,) of the channels.
        seed: of directions.
        batch: size of the global batch.
        features: returns the features of a microbatch's generated images.
        conditions: returns the embeddings (B, E) that the samples of a microbatch or of a reference
            batch are conditioned on, in standard deviations of all dimensions together; view
            ``global`` then compares joint distributions of features and embeddings.
        reference_batch: number of samples of the reference batches of all ranks; 0: there are none.
        start: position of the first sample of the stage.
        classes: how a batch is cut into classes, which are compared separately; the reference
            batch then holds samples to move away from.
    """

    def __init__(
        self,
        objectives: Mapping[str, DistributionObjective],
        scales: Features,
        seed: int,
        batch: int,
        features: Callable[[Batch], Features],
        conditions: Callable[[Batch], Tensor] | None = None,
        reference_batch: int = 0,
        start: int = 0,
        classes: ClassBatches | None = None,
    ) -> None:
        self.objectives = objectives
        self.scales = scales
        self.seed = seed
        self.batch = batch
        self.features = features
        self.conditions = conditions
        self.reference_batch = reference_batch
        self.start = start
        self.classes = classes
        self.ranks = Ranks()

    def before(self, micros: Sequence[tuple[Batch, int]]) -> None:
        """Compute the gradients of all features first, if there are several microbatches.

        It is the ``before`` of a :class:`dinogen.families.base.Phase`. The generator then runs
        twice, so nothing in it may depend on how often it ran.
        """
        if len(micros) == 1:
            return
        parts = [
            {level: values[:num] for level, values in self.features(micro).items()}
            for micro, num in micros
        ]
        own = {level: torch.cat([part[level] for part in parts]) for level in parts[0]}
        del parts  # the largest thing here, in a batch of thousands
        counted: list[Batch] = [{**micro, **_cut(micro, num)} for micro, num in micros]
        found = self._find(own, counted)
        first = 0
        for micro, num in micros:
            # A part that repeats a sample counts 0, but has to have a gradient.
            end = max(first + num, 1)
            micro["gradient_cache"] = found.rows(end - max(num, 1), end)
            first += num

    def losses(self, batch: Batch, features: Features) -> Losses:
        """Losses of the whole batch, with the gradient of this microbatch.

        On several ranks, each computes a part of the losses and other values. It returns its part
        times the inverse of its share of the batch, so that means weighed by shares are right.

        Args:
            batch: the microbatch.
            features: of its generated images, with gradients.
        """
        found = batch.get("gradient_cache") or self._find(
            {level: values.detach() for level, values in features.items()}, [batch]
        )
        # The engine weighs a microbatch's loss, a mean over its n samples, by n over B.
        share = self.batch / len(batch["key"])
        losses = dict(found.losses)
        first = next(iter(losses))
        losses[first] = with_gradients(losses[first], features, found.gradients, share)
        return losses, found.report

    def compare(
        self,
        generated: Features,
        real: Features,
        directions: Directions,
        conditions: Conditions | None = None,
        spread: Spread | None = None,
        groups: Groups | None = None,
    ) -> GradientCache:
        """Losses and gradients for two sets of samples.

        Args:
            generated: (N, locations, C) by level.
            real: (M, locations, C) by level.
            directions: see :class:`SlicedWasserstein`.
            conditions: embeddings that both are conditioned on, (N, E) and (M, E).
            spread: over ranks, see :meth:`DistributionObjective.loss_and_gradients`.
            groups: see there.
        """
        scales = self.scales
        # a product with float32 scales is float32, of stored features as well
        generated = {level: values * scales[level] for level, values in generated.items()}
        real = {level: real[level] * scales[level] for level in generated}
        if groups is not None and groups.negatives is not None:
            negatives = {level: groups.negatives[level] * scales[level] for level in generated}
            groups = replace(groups, negatives=negatives)
        gradients: Features = {}
        losses: Scalars = {}
        report: Scalars = {}
        for title, objective in self.objectives.items():
            losses[title], found, values = objective.loss_and_gradients(
                generated, real, directions, conditions, spread, groups
            )
            for level, gradient in found.items():
                known = gradients.get(level)
                gradients[level] = gradient if known is None else known + gradient
            report |= {f"{title}.{name}": value for name, value in values.items()}
        gradients = {level: gradient * scales[level] for level, gradient in gradients.items()}
        return GradientCache(gradients, losses, report)

    def directions(self, micros: Sequence[Batch], device: torch.device) -> Directions:
        """The random directions of a step, the same on all ranks.

        Args:
            micros: this rank's microbatches.
            device: where they are drawn.
        """
        drawn: dict[tuple[int, int], Tensor] = {}

        def draw(size: int, number: int) -> Tensor:
            shape = (size, number)
            if shape not in drawn:
                # filled there: nothing is copied
                at = torch.full((1,), self._first(micros), device=device)
                drawn[shape] = rng.normal(self.seed, "slices", at, shape, device)[0]
            return drawn[shape]

        return draw

    def floors(self, real: Features) -> dict[str, float]:
        """The losses that a perfect generator reaches, by title, where they are known.

        Args:
            real: (M, locations, C) by level, of real samples.
        """
        found = {name: one.floor(real, self.scales) for name, one in self.objectives.items()}
        return {title: floor for title, floor in found.items() if floor is not None}

    def _first(self, micros: Sequence[Batch]) -> int:
        """Position of the first sample of the global batch, of which this rank has a part."""
        position = int(torch.cat([micro["position"] for micro in micros])[0])
        return self.start + (position - self.start) // self.batch * self.batch

    def _find(self, own: Features, micros: Sequence[Batch]) -> GradientCache:
        """Compare the samples of all ranks, and return the gradients of this rank's.

        Each rank compares all samples at its share of the locations. So ranks exchange features
        once in each direction, and what a rank computes and holds is 1/W of the whole.
        """
        ranks = self.ranks
        device = next(iter(own.values())).device
        directions = self.directions(micros, device)
        reference = micros[0].get("reference_batch")
        groups, negatives = None, None
        if self.classes is not None:
            if reference is not None:
                counts = share_sizes(self.reference_batch, ranks.num)
                negatives = {
                    level: ranks.to_locations(stored_features(reference, level), counts)
                    for level in own
                }
            groups = self.classes.groups(self._first(micros), negatives, device)
            reference = None
        conditions = None
        if self.conditions is not None:
            ours = theirs = torch.cat([self.conditions(micro) for micro in micros])
            if reference is not None:
                theirs = self.conditions(reference)
            conditions = (ours, theirs)
        real = {level: _real(micros, level, reference) for level in own}
        if ranks.num == 1:
            return self.compare(own, real, directions, conditions, groups=groups)
        counts = real_counts = share_sizes(self.batch, ranks.num)
        if reference is not None:
            real_counts = share_sizes(self.reference_batch, ranks.num)
        sizes = {level: values.shape[1] for level, values in own.items()}
        num_conditions = 0
        if conditions is not None:
            num_conditions = conditions[0].shape[1]
            ours, theirs = (
                ranks.to_locations(given[:, :, None], each)[..., 0]
                for given, each in zip(conditions, (counts, real_counts), strict=True)
            )
            conditions = (ours, theirs)
        found = self.compare(
            {level: ranks.to_locations(values, counts) for level, values in own.items()},
            {level: ranks.to_locations(real[level], real_counts) for level in own},
            directions,
            conditions,
            Spread(ranks, sizes, num_conditions),
            groups,
        )
        gradients = {
            level: ranks.to_samples(values, counts, sizes[level])
            for level, values in found.gradients.items()
        }
        share = counts[ranks.rank] / self.batch
        losses = {name: value / share for name, value in found.losses.items()}
        report = {name: value / share for name, value in found.report.items()}
        return GradientCache(gradients, losses, report)


def _real(micros: Sequence[Batch], level: str, reference: Batch | None) -> Tensor:
    """Real features of this rank: of its reference batch or, without one, of its microbatches."""
    if reference is not None:
        return stored_features(reference, level)
    parts = [stored_features(micro, level) for micro in micros]
    # they may be stored in a half precision that autocast does not know
    with torch.autocast(parts[0].device.type, enabled=False):
        return torch.cat(parts)


def _cut(batch: Batch, num: int) -> Batch:
    """The first samples of a batch, with the fields that are compared."""
    cut: Batch = {"position": batch["position"][:num]}
    if "clip" in batch:
        cut["clip"] = batch["clip"][:num]
    if "text" in batch:
        cut["text"] = batch["text"][:num]
    if "pyramid" in batch:
        cut["pyramid"] = {grid: values[:num] for grid, values in batch["pyramid"].items()}
    if "guides" in batch:
        cut["guides"] = {
            name: {grid: values[:num] for grid, values in pyramid.items()}
            for name, pyramid in batch["guides"].items()
        }
    return cut


# Real images from which the floors of objectives between distributions are estimated.
_NUM_REALS = 512


class WeightedObjectives:
    """The objectives of one stage, over all microbatches and ranks.

    Args:
        objectives: as the config names them.
        guides: of the run; their levels are compared. They do not normalize features: each
            objective has its own way.
        seed: of the run.
        batch: size of the global batch.
        split: of the real images that the floors are estimated from.
        features: returns the features of a microbatch's generated images.
        conditions: see :class:`GlobalBatchObjective`.
        reference_batch: see there.
        start: see there.
        classes: see there.
    """

    def __init__(
        self,
        objectives: Sequence[AnyObjective],
        guides: GuideSet,
        seed: int,
        batch: int,
        split: str,
        features: Callable[[Batch], Features],
        conditions: Callable[[Batch], Tensor] | None = None,
        reference_batch: int = 0,
        start: int = 0,
        classes: ClassBatches | None = None,
    ) -> None:
        named = dict(zip(titles(objectives), objectives, strict=True))
        self.pairs = {name: one for name, one in named.items() if isinstance(one, PairObjective)}
        self.distributions = {
            name: one for name, one in named.items() if isinstance(one, DistributionObjective)
        }
        self.guides = guides
        self.global_batch = GlobalBatchObjective(
            self.distributions,
            guides.scales,
            seed,
            batch,
            features,
            conditions,
            reference_batch,
            start,
            classes,
        )
        # The same measure for every run, so that runs with different objectives can be compared.
        self.energy = GlobalBatchObjective(
            {"energy": Energy()}, guides.scales, seed, batch, features
        )
        self.floors = {
            name: one.weight * self._collapse_floor(one)
            for name, one in self.pairs.items()
            if isinstance(one, Mse)
        }
        if self.distributions and conditions is None and classes is None:
            self.floors |= self.global_batch.floors(guides.read_real(_NUM_REALS, split))

    @property
    def paired(self) -> bool:
        """Whether z has to be a function of the sample's key."""
        return any(isinstance(one, Paired) for one in self.pairs.values())

    @property
    def floor(self) -> float | None:
        """The least value of the summed losses, where it is known.

        For ``mse`` it is the collapse floor, which the same image for every z reaches; for
        objectives between distributions it is what real images reach against other real images.
        """
        known = len(self.floors) == len(self.pairs) + len(self.distributions)
        return sum(self.floors.values()) if known else None

    def losses(self, batch: Batch, features: Features, keep: Tensor | None = None) -> Losses:
        """Weighted losses and other values to plot, as ``Phase.losses`` returns them.

        Args:
            batch: a microbatch, with the stored features of its real images.
            features: of its generated images.
            keep: (B,) bool, which of them are conditioned on their real images; default: all.
        """
        losses: Scalars = {}
        report: Scalars = {}
        if self.pairs:
            real = self.guides.real(batch)
            for name, one in self.pairs.items():
                kept = self._kept(one, keep)
                losses[name] = one.weight * one.error(features, real, self.guides.scales, kept)
        if self.distributions:
            more, report = self.global_batch.losses(batch, features)
            losses |= more
        return losses, report

    def held_out_pairs(self, features: Features, batch: Batch) -> Scalars:
        """Mean squared errors of samples that were not trained on, by name."""
        real = self.guides.real(batch)
        scales = self.guides.scales
        return {name: one.error(features, real, scales) for name, one in self.pairs.items()}

    def held_out_distributions(self, features: Features, batch: Batch) -> Scalars:
        """Energy distance between at least two generated samples and those of ``batch``.

        It is a mean over the samples of ``batch``.
        """

        def none(size: int, number: int) -> Tensor:
            raise AssertionError("energy has no directions")

        found = self.energy.compare(features, self.guides.real(batch), none)
        return {"energy": found.losses["energy"]}

    def _kept(self, one: PairObjective, keep: Tensor | None) -> Tensor | None:
        # Without a condition or a z of its own, a sample's best answer to its real image is the
        # mean. It is left to objectives between distributions, if they compare the same levels.
        compared = all(
            any(is_of(level, other.guides) for other in self.distributions.values())
            for level in self.guides.levels
            if is_of(level, one.guides)
        )
        return keep if compared and not isinstance(one, Paired) else None

    def _collapse_floor(self, one: PairObjective) -> float:
        floors, data = [], self.guides.data
        for level in self.guides.levels:
            if not is_of(level, one.guides):
                continue
            if one.normalize:
                variance = torch.from_numpy(data.level_variance(level))
                scale = self.guides.scales[level].cpu()
                floors.append(float((variance * scale.square()).mean()))
            else:
                floors.append(data.total_variance(level))
        return collapse_floor(floors)
