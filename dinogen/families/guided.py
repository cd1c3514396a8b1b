"""Family `guided`: a progressive generator trained on features of frozen networks."""

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
from dinogen.families.base import Condition, Family, Graph, Health, Inputs, Networks, Phase
from dinogen.guidance.comparing import MAIN
from dinogen.guidance.conditioning import (
    Conditioning,
    LatentRows,
    Text,
    key_numbers,
    matching_clip,
)
from dinogen.guidance.discriminator import Adversary
from dinogen.guidance.guides import GuideSet, load_guides
from dinogen.guidance.options import GuidedOptions, check_distributions
from dinogen.guidance.weighted import WeightedObjectives
from dinogen.losses.features import mean_pairwise_distance
from dinogen.networks.progressive import ConditionalGenerator, ProgressiveGenerator
from dinogen.transfer import to_device
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
    """

    Options = GuidedOptions

    def __init__(self, config: Config, stage: StageConfig, device: torch.device) -> None:
        super().__init__(config, stage, device)
        self.options = self.Options(**config.family.options)
        kind = ConditionalGenerator if self.options.text else ProgressiveGenerator
        self.G = kind(**self.arguments("G")).to(device)
        self.levels = self.options.levels(stage, config.guides)
        check_distributions(self.options, stage.batch)
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
            reference_batch=self.options.reference_batch,
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

    def latents(self, indices: Tensor, seed: int) -> Tensor:
        """z (N, z_dim)."""
        return rng.normal(seed, "sample", indices, (self.options.z_dim,), self.device)

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
        """With text: z, embedding and guidance to images; guidance 0 is no text."""
        G = networks["G"]
        if not isinstance(G, ConditionalGenerator):
            return None

        def inputs(indices: Tensor, seed: int) -> dict[str, Tensor]:
            z = self.latents(indices, seed)
            shape = (G.mapping.embed_dim,)
            embedding = rng.normal(seed, "sample/embedding", indices, shape, self.device)
            return {"z": z, "embedding": embedding, "guidance": z.new_tensor(1.5)}

        return Graph(_Guided(G), inputs, facts={"guidance": 1.0})

    def realism(self, images: Tensor) -> Tensor | None:
        """The discriminator's mean logit, if the stage has one."""
        return self.adversary.realism(images) if self.adversary else None

    def first_layer(self, networks: Networks) -> Tensor | None:
        """The dense layer to 4x4; None after a mapping network, which is not linear."""
        G = networks["G"]
        if isinstance(G, ConditionalGenerator):
            return None
        assert isinstance(G, ProgressiveGenerator)
        return G.dense.weight.detach()

    def arguments(self, network: str) -> dict[str, Any]:
        """Arguments of the class of G or D."""
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
        """The block and ToRGB of the stage's resolution; all of D, which is new in each stage."""
        if network == "D":
            return set(self.networks["D"].state_dict())
        return self.G.new_parameters()

    def trainable(self, network: str) -> set[str]:
        """During the fade-in only the new parameters, then all that are in use."""
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
        )
        if self.adversary is not None:
            self.adversary.begin(self.guides.guides.get(MAIN))
        self.phases = self._phases()

    def _phases(self) -> tuple[Phase, ...]:
        before = self.objectives.global_batch.before if self.objectives.distributions else None
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
        if self.objectives.pairs:
            # No latents were learnt for held-out samples: theirs are random.
            own = self.objectives.paired and self.rows is None
            z = self._z(batch, "z/held-out", own)
            condition = None
            if self.text is not None:
                condition = self.text.conditioning(batch, f"{_CONDITION}/held-out", drop=False)
            features = self.guides(_generate(networks["G"], z, condition))
            found |= self.objectives.held_out_pairs(features, batch)
        # The same latents for every batch, so that the mean does not depend on the batches.
        z = self.family.latents(torch.arange(_HELD_OUT), self.seed)
        features = self.guides(networks["G"](z))
        return found | self.objectives.held_out_distributions(features, batch)

    def _z(self, batch: Batch, purpose: str, paired: bool = False) -> Tensor:
        """Latents (B, z_dim): random ones by position or, if ``paired``, each sample's own."""
        positions = batch["position"]
        G = self.family.G
        if paired and self.rows is not None and G.table is not None:
            learnt: Tensor = G.table(to_device(self.rows(batch["key"]), self.device))
            return learnt
        if paired:
            purpose, positions = "paired", key_numbers(batch["key"])
        return rng.normal(self.seed, purpose, positions, (self.options.z_dim,), self.device)

    def _images(self, batch: Batch, purpose: str) -> Tensor:
        """An image for each sample of a microbatch, conditioned as in training."""
        condition = self.text.conditioning(batch, _CONDITION) if self.text else None
        return _generate(self.family.G, self._z(batch, purpose, self.objectives.paired), condition)

    def _features(self, batch: Batch) -> Features:
        return self.guides(self._images(batch, "z"))

    def _g_losses(self, batch: Batch) -> Losses:
        condition = self.text.conditioning(batch, _CONDITION) if self.text else None
        images = _generate(self.family.G, self._z(batch, "z", self.objectives.paired), condition)
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


class _Adversarial:
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


def _conditions(text: Text, has_reference: bool, batch: Batch) -> Tensor:
    """Embeddings that the samples of a microbatch, or of its reference batch, are conditioned on.

    Args:
        text: returns them.
        has_reference: whether microbatches hold a reference batch.
        batch: one of both.
    """
    is_reference = has_reference and "reference_batch" not in batch
    return text.scaled(batch, f"{_CONDITION}/bank" if is_reference else _CONDITION)


def _generate(G: nn.Module, z: Tensor, condition: Conditioning | None) -> Tensor:
    images: Tensor = G(z, condition.embedding, condition.keep) if condition else G(z)
    return images
