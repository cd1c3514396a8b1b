"""Family `guided`: a generator trained on features of frozen networks, in one step from noise."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dinogen.batch import Batch, Features, Losses, Scalars
from dinogen.config import Config, ConfigError, StageConfig
from dinogen.distributed import rng
from dinogen.errors import UserError
from dinogen.families.base import (
    Condition,
    Family,
    Graph,
    Health,
    Inputs,
    Networks,
    Phase,
    classes_of,
    not_trained_with_text,
)
from dinogen.guidance.classes import ClassBatches
from dinogen.guidance.comparing import MAIN
from dinogen.guidance.conditioning import (
    Conditioning,
    LatentRows,
    Text,
    key_numbers,
    matching_clip,
)
from dinogen.guidance.discriminator import Adversary, AdversaryUpdates
from dinogen.guidance.guides import GuideSet, load_guides
from dinogen.guidance.options import (
    GuidedOptions,
    check_classes,
    check_distributions,
    check_views,
)
from dinogen.guidance.weighted import WeightedObjectives
from dinogen.losses.features import mean_pairwise_distance
from dinogen.networks.one_step import OneStepDiT, OneStepImages
from dinogen.networks.options import DiTOptions
from dinogen.networks.progressive import ConditionalGenerator, ProgressiveGenerator
from dinogen.transfer import to_device, to_device_together
from shards.read.dataset import Dataset

COLLAPSED_NEAR_FLOOR = 1.02
# Number of generated images that held-out ones are compared with.
_HELD_OUT = 64
# The purpose of random numbers for conditions. It and "bank" below are what earlier versions called
# it: other names would give other numbers.
_CONDITION = "ask"


class Guided(Family):
    """Compares features of generated images with those of real images, stored as pyramids.

    With the original objective, ``mse`` against a random real image, the best answer is the same
    for every z (see :func:`dinogen.losses.features.pyramid_mse`). So each curve is drawn with its
    floor, and each probe measures the remaining diversity. Objectives that compare distributions
    reach their minimum where generated images are distributed as real ones. A discriminator can be
    added.

    The generator is a progressive one of convolutions, or a transformer, which can have classes and
    a strength of guidance as an input (Deng et al. 2026, "Generative Modeling via Drifting").
    """

    class Options(GuidedOptions):
        """Keys of ``family:`` for ``name: guided``."""

    def __init__(self, config: Config, stage: StageConfig, device: torch.device) -> None:
        super().__init__(config, stage, device)
        self.options = self.Options(**config.family.options)
        self.levels = self.options.levels(stage, config.guides)
        check_distributions(self.options, stage.batch)
        check_classes(self.options, stage.batch)
        check_views(self.options, self.levels)
        if self.options.generator == "dit" and stage.fade_kimg:
            raise ConfigError(
                f"stages: fade_kimg {stage.fade_kimg}: generator: dit has no new block to fade in: "
                "leave it out"
            )
        kind = ConditionalGenerator if self.options.text else ProgressiveGenerator
        build = OneStepDiT if self.options.generator == "dit" else kind
        try:
            self.G: nn.Module = build(**self.arguments("G")).to(device)
        except ValueError as error:
            if self.options.generator == "dit":
                raise ConfigError(f"family.dit.{error}") from None
            raise
        self.adversary: Adversary | None = None
        chosen = self.options.discriminator
        if chosen is not None and not any(chosen.applies(s) for s in config.stages):
            raise ConfigError(
                f"family.discriminator.from_resolution: {chosen.from_resolution}, but all stages "
                "are smaller, so the discriminator would never be trained: set it lower"
            )
        if chosen is not None and chosen.applies(stage):
            self.adversary = Adversary(chosen, config.guide, stage, config.seed, device)
        self._training: GuidedTraining | None = None

    @property
    def networks(self) -> dict[str, nn.Module]:
        """G, and D if the stage has one."""
        return {"G": self.G} | ({"D": self.adversary.network} if self.adversary else {})

    @property
    def phases(self) -> tuple[Phase, ...]:
        """D, D's penalties every few steps, and G; none before :meth:`begin`."""
        return self._training.phases if self._training else ()

    @property
    def main_loss(self) -> str:
        """G's losses."""
        return "G"

    @property
    def inputs(self) -> Inputs:
        """The compared levels and the conditions; images only for a discriminator."""
        conditions = () if self.options.text is None else (self.options.text.level,)
        return Inputs(
            image_size=self.stage.resolution if self.adversary else None,
            levels=(*self.levels, *conditions),
            labels=self.num_classes > 0,
            reference_batch=self.options.reference_batch,
            per_class=self.options.samples_per_class if self.num_classes else 0,
        )

    def begin(self, data: Dataset) -> None:
        """Load the guides, check that they made these shards, and measure their diversity."""
        self._training = GuidedTraining(self, data)

    @property
    def training(self) -> GuidedTraining:
        """The objectives and phases for the data of :meth:`begin`.

        Raises:
            UserError: :meth:`begin` was not called.
        """
        if self._training is None:
            raise UserError(
                "family guided: its guides are not loaded: call begin(data) with the data of the "
                "run first"
            )
        return self._training

    @property
    def frozen(self) -> tuple[nn.Module, ...]:
        """The guides, and the discriminator's own one."""
        found: list[Any] = []  # a guide need not be a module
        if self._training is not None:
            found += self._training.guides.guides.values()
        if self.adversary is not None:
            found.append(self.adversary.guide)
        return tuple({id(one): one for one in found if isinstance(one, nn.Module)}.values())

    @property
    def num_classes(self) -> int:
        """0 if it was trained without labels."""
        return self.options.num_classes

    @property
    def adjustable(self) -> frozenset[str]:
        """Guidance, if the generator was told a strength."""
        return frozenset({"guidance"} if self.options.guided else ())

    def with_sampling(self, changes: Mapping[str, Any]) -> Guided:
        """``guidance`` to the class, within the strengths that were trained."""
        for name, value in changes.items():
            if name not in self.adjustable:
                raise UserError(
                    f"sampling: {name} means nothing to family guided as it was trained"
                )
            low, high = self.options.guidance_range
            if not low <= value <= high:
                raise UserError(
                    f"guidance {value:g}: this generator learnt strengths from {low:g} to {high:g}"
                )
        other = copy.copy(self)
        other.options = self.options.model_copy(update=dict(changes))
        return other

    @property
    def z_shape(self) -> tuple[int, ...]:
        """Of a latent."""
        if self.options.generator == "dit":
            return 3, self.stage.resolution, self.stage.resolution
        return (self.options.z_dim,)

    def latents(self, indices: Tensor, seed: int) -> Tensor:
        """z (N, z_dim), or noise (N, 3, R, R) of a transformer."""
        return rng.normal(seed, "sample", indices, self.z_shape, self.device)

    def decode(
        self, networks: Networks, latents: Tensor, indices: Tensor, seed: int, psi: float = 1.0
    ) -> Tensor:
        """See the base; with classes, number i is of class i % num_classes."""
        if self.options.generator != "dit":
            return super().decode(networks, latents, indices, seed)
        label = indices % self.num_classes if self.num_classes else None
        return self._made(networks, latents, label)

    def measured(
        self, networks: Networks, indices: Tensor, seed: int, shares: Sequence[float] | None
    ) -> Tensor:
        """Samples; with classes, as frequent as in the data."""
        if not self.num_classes or shares is None:
            return self.sample(networks, indices, seed)
        return self._made(networks, self.latents(indices, seed), classes_of(indices, shares))

    def _made(self, networks: Networks, latents: Tensor, label: Tensor | None) -> Tensor:
        """Images of a transformer, which are not bounded in training."""
        more = {} if label is None else {"label": label.to(self.device)}
        if self.options.guided:
            more["guidance"] = torch.full_like(latents[:, 0, 0, 0], self.options.guidance)
        images: Tensor = networks["G"](latents, **more)
        return images.clamp(-1, 1)

    def sample(
        self, networks: Networks, indices: Tensor, seed: int, condition: Condition | None = None
    ) -> Tensor:
        """See the base; with P embeddings, sample i is conditioned on embedding i modulo P."""
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
        """CLIP's embeddings of the texts, see the base."""
        if self.options.text is None:
            raise not_trained_with_text(self)
        text = self._training.text if self._training else None
        clip = text.clip if text else matching_clip(self.config, facts.get("clip", {}), self.device)
        return Condition(clip.captions(list(texts)), guidance)

    def graph(self, networks: Networks) -> Graph | None:
        """With text: z, embedding and guidance to images; guidance 0 is no text.

        Of a transformer: z, and label and guidance if it has them.
        """
        G = networks["G"]
        if isinstance(G, OneStepDiT):
            return self._one_step(G)
        if not isinstance(G, ConditionalGenerator):
            return None

        def inputs(indices: Tensor, seed: int) -> dict[str, Tensor]:
            z = self.latents(indices, seed)
            shape = (G.mapping.embed_dim,)
            embedding = rng.normal(seed, "sample/embedding", indices, shape, self.device)
            return {"z": z, "embedding": embedding, "guidance": z.new_tensor(1.5)}

        return Graph(_Guided(G), inputs, facts={"guidance": 1.0})

    def _one_step(self, G: OneStepDiT) -> Graph:
        own = self.options

        def inputs(indices: Tensor, seed: int) -> dict[str, Tensor]:
            z = self.latents(indices, seed)
            found = {"z": z}
            if own.num_classes:
                found["label"] = (indices % own.num_classes).to(self.device)
            if own.guided:
                found["guidance"] = z.new_tensor(own.guidance)
            return found

        facts: dict[str, Any] = {"num_classes": own.num_classes}
        if own.guided:
            facts |= {"guidance": own.guidance, "guidance_range": list(own.guidance_range)}
        return Graph(OneStepImages(G), inputs, facts=facts)

    def realism(self, images: Tensor) -> Tensor | None:
        """The discriminator's mean logit, if the stage has one."""
        return self.adversary.realism(images) if self.adversary else None

    def first_layer(self, networks: Networks) -> Tensor | None:
        """The dense layer to 4x4; None after a mapping network or in a transformer."""
        G = networks["G"]
        if isinstance(G, ConditionalGenerator | OneStepDiT):
            return None
        assert isinstance(G, ProgressiveGenerator)
        return G.dense.weight.detach()

    def arguments(self, network: str) -> dict[str, Any]:
        """Arguments of the class of G or D."""
        if network == "D" and self.adversary is not None:
            return self.adversary.arguments()
        if self.options.generator == "dit":
            return {
                "resolution": self.stage.resolution,
                **(self.options.dit or DiTOptions()).arguments(),
                "num_classes": self.num_classes,
                "guidance_input": self.options.guided,
            }
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
        """The block and ToRGB of the stage's resolution; all of D, which is new in each stage.

        None of a transformer: its patches have the same size at every resolution.
        """
        if network == "D":
            return set(self.networks["D"].state_dict())
        return self.G.new_parameters() if isinstance(self.G, ProgressiveGenerator) else set()

    def trainable(self, network: str) -> set[str]:
        """During the fade-in only the new parameters, then all that are in use."""
        if network == "D" or not isinstance(self.G, ProgressiveGenerator):
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
        """Update the spectral norms of D."""
        if self.adversary is not None:
            self.adversary.after_step()

    def constants(self) -> dict[str, float]:
        """The floor of the objectives, see :attr:`WeightedObjectives.floor`."""
        return self._training.constants if self._training else {}

    def probe(self, networks: Networks, loss: float | None) -> Health:
        """Diversity of samples: mean pairwise feature distance over that of real images."""
        return self.training.probe(networks, loss)

    def held_out(self, networks: Networks, batch: Batch) -> Scalars:
        """Compare with pyramids that were not trained on: each pair objective, and ``energy``."""
        return self.training.held_out(networks, batch)

    def describe(self) -> dict[str, Any]:
        """The guides of the run, its CLIP, and the guide of its discriminator."""
        found = self._training.guides.describe() if self._training else {}
        if self.adversary is not None and self.adversary.guide is not None:
            sha256 = self.adversary.guide.info.weights_sha256
            found["frozen"] = {"family.discriminator.guide": sha256}
        text = self._training.text if self._training else None
        return found | ({"clip": text.clip.info} if text else {})


class _Guided(nn.Module):
    """What :meth:`Guided.sample` does with a condition, with guidance as a tensor."""

    def __init__(self, G: ConditionalGenerator) -> None:
        super().__init__()
        self.G = G

    def forward(self, z: Tensor, embedding: Tensor, guidance: Tensor) -> Tensor:
        """z (B, z_dim), embedding (B, E), guidance () -> images (B, 3, R, R) in [-1, 1]."""
        w = torch.lerp(self.G.mapping(z), self.G.mapping(z, embedding), guidance)
        return ProgressiveGenerator.forward(self.G, w)


class GuidedTraining:
    """The objectives and phases of one stage of the guided family, and its measures.

    Args:
        family: its networks are trained.
        data: the training data.

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
        self.guides = GuideSet(
            load_guides(config, family.levels, self.device),
            data,
            family.levels,
            device=self.device,
            normalize=False,
            on_error=config.data.on_error,
        )
        split = config.data.split
        self.real_distance = self.guides.distances(
            self.guides.read_real(2 * options.probe_samples, split)
        )
        table, chosen = options.table, options.text
        self.rows = LatentRows(data, split, table.num_latents) if table is not None else None
        self.text = Text(chosen, config, data, self.device) if chosen is not None else None
        conditions = None
        if self.text is not None and self.text.options.joint_weight:
            conditions = partial(_conditions, self.text, options.reference_batch > 0)
        self.classes: ClassBatches | None = None
        self._shares: list[float] | None = None
        if options.num_classes:
            self.classes = ClassBatches(options, self.seed, stage.batch, family.start)
            counts = data.label_counts(split)
            self._shares = [float(counts.get(label, 0)) for label in range(options.num_classes)]
        self.objectives = WeightedObjectives(
            options.objectives,
            self.guides,
            self.seed,
            stage.batch,
            split,
            self._features,
            conditions,
            options.reference_batch,
            family.start,
            self.classes,
        )
        if self.adversary is not None:
            self.adversary.begin(self.guides.guides.get(MAIN))
        self.phases = self._phases()

    def _phases(self) -> tuple[Phase, ...]:
        before = self.objectives.global_batch.before if self.objectives.distributions else None
        phases = [Phase("G", "G", self._g_losses, before=before)]
        if self.adversary is not None:
            adversarial = AdversaryUpdates(self.adversary, self._images)
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
        floor = None if self.adversary or self.text else self.objectives.floor
        return {} if floor is None else {"floor": floor}

    def probe(self, networks: Networks, loss: float | None) -> Health:
        """See :meth:`Guided.probe`."""
        indices = torch.arange(self.options.probe_samples)
        features = self.guides(self.family.sample(networks, indices, self.seed))
        ratios = [
            mean_pairwise_distance(values.cpu()) / self.real_distance[level]
            for level, values in features.items()
        ]
        diversity = sum(ratios) / len(ratios)
        if loss is not None and not math.isfinite(loss):
            diversity = math.nan
        scalars: dict[str, float] = {}
        floor, near = self.constants.get("floor"), None
        # A loss near the floor of a distribution objective is a success and no sign of collapse.
        if loss is not None and floor is not None and not self.objectives.distributions:
            scalars["loss_over_floor"] = loss / floor
            if loss <= COLLAPSED_NEAR_FLOOR * floor:
                near = f"loss {loss:.4g} is within 2 % of the floor {floor:.4g}"
        return Health.of_diversity(diversity, self._remedy, scalars, near)

    @property
    def _remedy(self) -> str:
        """What to do about a collapse."""
        if self.objectives.distributions:
            return "start again with a larger stages.batch or family.reference_batch, or a lower lr"
        names = ", ".join(one.name for one in self.options.objectives)
        return (
            f"start again with family.objectives=[{{name: drift}}] in place of {names}, whose best "
            "answer may be one image for every z (docs/guided.md)"
        )

    def held_out(self, networks: Networks, batch: Batch) -> Scalars:
        """See :meth:`Guided.held_out`."""
        found: Scalars = {}
        # Held-out images are as they are: 1, or the least strength that was learnt.
        least, family = self.options.guidance_range[0], self.family
        plain = family.with_sampling({"guidance": least}) if self.options.guided else family
        if self.objectives.pairs:
            # No latents were learnt for held-out samples: theirs are random.
            own = self.objectives.paired and self.rows is None
            z = self._z(batch, "z/held-out", own)
            condition = None
            if self.text is not None:
                condition = self.text.conditioning(batch, f"{_CONDITION}/held-out", drop=False)
            features = self.guides(self._generate(networks["G"], z, batch, condition, least))
            found |= self.objectives.held_out_pairs(features, batch)
        # The same latents for every batch, so that the mean does not depend on the batches.
        numbers = torch.arange(_HELD_OUT)
        images = plain.measured(networks, numbers, self.seed, self._shares)
        features = self.guides(images)
        return found | self.objectives.held_out_distributions(features, batch)

    def _z(self, batch: Batch, purpose: str, paired: bool = False) -> Tensor:
        """Latents (B, ...): random ones by position or, if ``paired``, each sample's own."""
        positions = batch["position"]
        G = self.family.G
        if paired and self.rows is not None and isinstance(G.table, nn.Module):
            learnt: Tensor = G.table(to_device(self.rows(batch["key"]), self.device))
            return learnt
        if paired:
            purpose, positions = "paired", key_numbers(batch["key"])
        return rng.normal(self.seed, purpose, positions, self.family.z_shape, self.device)

    def _generate(
        self,
        G: nn.Module,
        z: Tensor,
        batch: Batch,
        condition: Conditioning | None,
        strength: float | None = None,
    ) -> Tensor:
        """An image for each sample, by its text, or its class and guidance; default: drawn."""
        images: Tensor
        if condition is not None:
            images = G(z, condition.embedding, condition.keep)
        elif self.classes is not None:
            guidance = None
            if self.options.guided:
                if strength is None:
                    drawn = self.classes.guidance(batch["position"])
                else:
                    drawn = torch.full((len(z),), strength)
                (guidance,) = to_device_together([drawn], self.device)
            images = G(z, batch["label"], guidance)
        else:
            images = G(z)
        return images

    def _images(self, batch: Batch, purpose: str) -> Tensor:
        """An image for each sample of a microbatch, conditioned as in training."""
        condition = self.text.conditioning(batch, _CONDITION) if self.text else None
        z = self._z(batch, purpose, self.objectives.paired)
        return self._generate(self.family.G, z, batch, condition)

    def _features(self, batch: Batch) -> Features:
        return self.guides(self._images(batch, "z"))

    def _g_losses(self, batch: Batch) -> Losses:
        condition = self.text.conditioning(batch, _CONDITION) if self.text else None
        z = self._z(batch, "z", self.objectives.paired)
        images = self._generate(self.family.G, z, batch, condition)
        losses, report = self.objectives.losses(
            batch, self.guides(images), condition.keep if condition else None
        )
        if self.text and condition and self.text.options.clip_weight:
            losses["clip"] = self.text.options.clip_weight * self.text.loss(images, condition)
        if self.adversary is not None:
            positions, size = batch["position"], self.family.stage.batch
            shown = (int(positions[0]) - self.family.start) // size * size
            more, values = self.adversary.g_losses(images, batch["image"], positions, shown)
            losses, report = losses | more, report | values
        return losses, report


def _conditions(text: Text, has_reference: bool, batch: Batch) -> Tensor:
    """Embeddings that the samples of a microbatch, or of its reference batch, are conditioned on.

    Args:
        text: returns them.
        has_reference: whether microbatches hold a reference batch.
        batch: one of both.
    """
    is_reference = has_reference and "reference_batch" not in batch
    return text.scaled(batch, f"{_CONDITION}/bank" if is_reference else _CONDITION)
