"""Keys of ``family:`` for ``name: guided``: objectives, ``discriminator:`` and ``text:``."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any, Literal

from pydantic import Field, FiniteFloat, PositiveInt, model_validator

from dinogen.config import ConfigError, GuideConfig, Section, StageConfig
from dinogen.guidance.comparing import MAIN, DistributionObjective, PairObjective, is_of
from dinogen.guidance.objectives import AnyObjective, Drift, Paired
from dinogen.guidance.sets import sets_of
from dinogen.networks.diffaugment import Transform
from dinogen.networks.options import DiTOptions
from shards.format.sample import level_grid

NATIVE_UP_TO = 16
POOLED = (16, 8, 4)
# Keys of ``family:`` in configs of earlier versions, and their names today.
EARLIER_KEYS = {"bank": "reference_batch"}


# Keys that only one kind reads.
_OF_KIND = {
    "projected": ("guide", "grid", "head_channels"),
    "patch": ("patch_scales", "patch_layers", "patch_channels"),
}


_OF_PROGRESSIVE = ("z_dim", "channel_base", "channel_max")


class DiscriminatorOptions(Section):
    """Keys of ``discriminator:``; ``optim.lr_scale: {D: ...}`` sets its learning rate."""

    kind: Literal["projected", "patch"] = Field(
        "projected",
        description="projected: heads on the layers of a frozen guide; patch: PatchGAN on pixels",
    )
    from_resolution: int = Field(
        64, ge=4, description="the first resolution whose stage has a discriminator"
    )
    weight: float = Field(0.1, gt=0, description="weight of G's adversarial loss")
    ramp_kimg: float = Field(
        10.0,
        ge=0,
        description="thousands of images from the stage's start over which the weight rises from 0",
    )
    loss: Literal["hinge", "relativistic"] = Field(
        "hinge",
        description="relativistic: on pairs of a real and a generated image; it needs r1 and r2",
    )
    r1: float = Field(
        0.0, ge=0, description="gamma; D's squared gradient at real images has weight gamma / 2"
    )
    r2: float = Field(0.0, ge=0, description="gamma; the same for generated images")
    penalty_on: Literal["pixels", "features"] = Field(
        "pixels", description="what r1 and r2 differentiate with respect to; features: the guide's"
    )
    every: int = Field(
        16, ge=1, description="steps between updates with r1 and r2; 1: they are part of D's loss"
    )
    augment: tuple[Transform, ...] = Field(
        ("color", "translation", "cutout"),
        description="random changes of real and generated images before D sees them",
    )
    crop: int | None = Field(
        None,
        ge=8,
        description="side in pixels of random crops that D sees at native size, a size that the "
        "guide takes (DINOv2: 14 * n); smaller images are not cropped",
    )
    guide: GuideConfig | None = Field(
        None, description="the network that projected heads are attached to; default: guide:"
    )
    grid: int = Field(
        16, ge=1, description="grid at which images that are not cropped go through the guide"
    )
    head_channels: int = Field(
        128, ge=8, multiple_of=8, description="channels inside each projected head"
    )
    patch_scales: int = Field(
        3, ge=1, description="number of PatchGANs, each at half the resolution of the one before"
    )
    patch_layers: int = Field(
        3, ge=1, le=5, description="their strided layers: 1, 2, 3 see patches of 16, 34, 70 pixels"
    )
    patch_channels: int = Field(
        64, ge=8, multiple_of=8, description="their channels after the first layer"
    )

    @model_validator(mode="after")
    def _fits_together(self) -> DiscriminatorOptions:
        if self.kind == "patch" and self.penalty_on == "features":
            raise ValueError("a patch discriminator has no features: set penalty_on: pixels")
        for kind, keys in _OF_KIND.items():
            given = [k for k in keys if getattr(self, k) != type(self).model_fields[k].default]
            if kind != self.kind and given:
                raise ValueError(
                    f"{given[0]} belongs to a {kind} discriminator, and this one is {self.kind}: "
                    f"leave out {given[0]}, or set kind: {kind}"
                )
        return self

    def applies(self, stage: StageConfig) -> bool:
        """Whether a stage has the discriminator."""
        return stage.resolution >= self.from_resolution


class TextOptions(Section):
    """Keys of ``text:``; the network is that of ``clip:``, which embedded the data too."""

    embed_dim: int = Field(
        512, ge=1, description="size of the embeddings of clip:; CLIP ViT-B: 512, ViT-L: 768"
    )
    condition: Literal["images", "captions"] = Field(
        "images",
        description="what training conditions on: the embedding of the real image (needs no "
        "captions), or that of its caption",
    )
    noise: float = Field(
        0.75,
        ge=0,
        description="length of the noise added to an image embedding, so that it is as far from "
        "the image as captions are",
    )
    dropout: float = Field(0.2, ge=0, lt=1, description="share of samples that are unconditional")
    clip_weight: float = Field(
        1.0,
        ge=0,
        description="weight of 1 - cos between the embedding of an image and its condition",
    )
    joint_weight: float = Field(
        1.0,
        ge=0,
        description="weight of the condition relative to the features in objectives that compare "
        "distributions: they compare the joint distribution of both; 0: features only",
    )
    mapping_layers: int = Field(2, ge=1, description="dense layers that combine z and embedding")

    @property
    def level(self) -> str:
        """The level that holds the conditions."""
        return "text" if self.condition == "captions" else "clip"


class GuidedOptions(Section):
    """Keys of ``family:`` for ``name: guided``."""

    objectives: tuple[AnyObjective, ...] = Field(
        (Drift(),),
        min_length=1,
        description="the losses that are summed, each with its options; default: drift",
    )
    reference_batch: int = Field(
        0,
        ge=0,
        description="number of further real samples per step for objectives that compare "
        "distributions; 0: compare with the real samples of the batch. With num_classes: real "
        "samples of any class, which guidance moves away from",
    )
    num_classes: int = Field(0, ge=0, description="labels are 0 to this less 1; 0: no labels")
    samples_per_class: int = Field(
        16,
        ge=2,
        description="with num_classes: generated samples of one class that a step compares with as "
        "many real ones of that class; stages.batch is a multiple",
    )
    guidance: float = Field(
        1.0, description="with num_classes: strength of guidance of samples, in guidance_range"
    )
    guidance_range: tuple[FiniteFloat, FiniteFloat] = Field(
        (1.0, 1.0),
        description="least and greatest strength of guidance to the class that the generator "
        "learns and is told, such as [1, 4]; 1 is the class as it is, and more moves away from "
        "what is not",
    )
    guidance_power: FiniteFloat = Field(
        3.0, ge=0, description="strength a is drawn with a density proportional to a^-power"
    )
    discriminator: DiscriminatorOptions | None = Field(
        None, description="trained together with the generator; default: none"
    )
    text: TextOptions | None = Field(
        None, description="condition the generator on CLIP embeddings; default: do not"
    )
    pyramid: Literal["native", "pooled"] = Field(
        "native",
        description="features up to 16x16: native, of the image shrunk to the grid, or pooled, of "
        "the full image; above 16x16 always pooled",
    )
    grids: dict[str, Annotated[tuple[PositiveInt, ...], Field(min_length=1)]] = Field(
        {},
        description="grids above 16x16, for main and each of guides:; default: 16, 8 and 4. Other "
        "grids, such as 32 of pixels, are native",
    )
    z_dim: int = Field(512, ge=1, description="size of the latent")
    channel_base: int = Field(16384, ge=4, description="channels at resolution R: base / R ...")
    channel_max: int = Field(512, ge=1, description="... and at most this")
    probe_samples: int = Field(64, ge=2, description="images per diversity probe")
    generator: Literal["progressive", "dit"] = Field(
        "progressive",
        description="convolutions that grow with the resolution, or a transformer with the "
        "keys of dit:, which makes an image of noise in one pass",
    )
    dit: DiTOptions | None = Field(
        None, description="size of the transformer of generator: dit; default: S, patches of 2"
    )

    @model_validator(mode="before")
    @classmethod
    def _earlier_keys(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        values = dict(values)
        # One objective, by its name alone.
        if "objective" in values and "objectives" not in values:
            values["objectives"] = [{"name": values.pop("objective")}]
        for key, today in EARLIER_KEYS.items():
            if key in values and today not in values:
                values[today] = values.pop(key)
        return values

    @model_validator(mode="after")
    def _one_table(self) -> GuidedOptions:
        if sum(isinstance(one, Paired) for one in self.objectives) > 1:
            raise ValueError("objectives: name paired at most once: it decides what z is")
        table = self.table
        if table and self.text is not None:
            raise ValueError(
                "objectives: learnt latents (num_latents) cannot be combined with text: leave out "
                "one of them"
            )
        if table and table.num_latents <= self.z_dim:
            raise ValueError(
                f"objectives: num_latents {table.num_latents} must be > z_dim {self.z_dim}: "
                "a Gaussian is fitted to the latents: use a smaller z_dim"
            )
        return self

    @model_validator(mode="after")
    def _text_is_trained(self) -> GuidedOptions:
        text = self.text
        if text is None or text.clip_weight:
            return self
        joint = text.joint_weight > 0
        # The real image of a pair is the one that the generated image is conditioned on.
        if not any(
            isinstance(one, PairObjective)
            or (isinstance(one, DistributionObjective) and "global" in one.views and joint)
            for one in self.objectives
        ):
            raise ValueError(
                "text: no loss depends on it, so the generator would learn to ignore it: set "
                "clip_weight, or joint_weight with an objective that has the view global"
            )
        return self

    @model_validator(mode="after")
    def _check_generator(self) -> GuidedOptions:
        if self.generator == "dit":
            if self.text is not None or self.table is not None:
                what = "text" if self.text is not None else "learnt latents (num_latents)"
                raise ValueError(f"generator: dit takes no {what}: leave one of them out")
        elif self.dit is not None:
            raise ValueError("dit: belongs to generator: dit: set it, or leave dit: out")
        elif self.num_classes:
            raise ValueError("num_classes: only generator: dit has classes: set it, or use 0")
        if self.num_classes and any(isinstance(one, Paired) for one in self.objectives):
            raise ValueError(
                "objectives: paired cannot be combined with num_classes, whose real samples are "
                "those of a class: leave out one of them"
            )
        for reader, keys, reads in (
            ("generator: progressive", _OF_PROGRESSIVE, self.generator == "progressive"),
            ("num_classes", ("samples_per_class",), self.num_classes > 0),
            ("guidance_range", ("guidance_power",), self.guided),
        ):
            # a config that was written whole has their defaults
            given = [k for k in keys if getattr(self, k) != type(self).model_fields[k].default]
            if given and not reads:
                raise ValueError(
                    f"{given[0]}: only {reader} reads it: leave it out, or set {reader}"
                )
        return self

    @property
    def guided(self) -> bool:
        """Whether the generator is told a strength of guidance."""
        return self.guidance_range[1] > 1

    @property
    def table(self) -> Paired | None:
        """The objective whose latents are learnt, if there is one."""
        found = (o for o in self.objectives if isinstance(o, Paired) and o.num_latents)
        return next(found, None)

    def levels(self, stage: StageConfig, further: Iterable[str]) -> tuple[str, ...]:
        """The levels that a stage compares: ``p8`` of the main guide, ``NAME.p8`` of others.

        Args:
            stage: its resolution decides.
            further: names of the other guides.

        Raises:
            ConfigError: an option names a guide that does not exist.
        """
        guides = (MAIN, *further)
        for name in (*self.grids, *(guide for one in self.objectives for guide in one.guides)):
            if name not in guides:
                raise ConfigError(
                    f"family: there is no guide {name}: use one of {', '.join(guides)}, or add it "
                    "to guides:"
                )
        found = []
        for name in guides:
            prefix = "" if name == MAIN else f"{name}."
            if stage.resolution <= NATIVE_UP_TO:
                found.append(f"{prefix}{self.pyramid[0]}{stage.resolution}")
            else:
                grids = self.grids.get(name, POOLED)
                found += [f"{prefix}{'p' if grid in POOLED else 'n'}{grid}" for grid in grids]
        return tuple(found)


def check_classes(options: GuidedOptions, batch: int) -> None:
    """Check what belongs to ``num_classes``.

    Args:
        options: of the run.
        batch: size of the global batch.

    Raises:
        ConfigError: naming the key.
    """
    (low, high), guided = options.guidance_range, options.guided
    if not 1 <= low <= high:
        raise ConfigError(
            f"family.guidance_range [{low}, {high}]: give two strengths from 1 on, the smaller one "
            "first, such as [1, 4]"
        )
    if not low <= options.guidance <= high:
        raise ConfigError(
            f"family.guidance {options.guidance} is not in guidance_range [{low}, {high}], which "
            "is what the generator learns: change one of them"
        )
    if not options.num_classes:
        if guided:
            raise ConfigError(
                "family.guidance_range needs classes to guide to: set num_classes, or leave it out"
            )
        return
    if batch % options.samples_per_class:
        raise ConfigError(
            f"stages: batch {batch} is not a multiple of family.samples_per_class "
            f"{options.samples_per_class}: change one of them"
        )
    found = [one for one in options.objectives if isinstance(one, DistributionObjective)]
    if not found:
        raise ConfigError(
            "family.num_classes: none of family.objectives compares distributions, and only they "
            "compare within classes: add {name: drift}"
        )
    if guided and not options.reference_batch:
        raise ConfigError(
            "family.reference_batch must be > 0 with guidance_range: samples are moved away from "
            "these real samples of any class. Try 32"
        )
    if options.reference_batch and not guided:
        raise ConfigError(
            "family.reference_batch: with num_classes only guidance reads it: set guidance_range, "
            "such as [1, 4], or leave it out"
        )
    fixed = [one.name for one in found if not one.repels]
    if guided and fixed:
        raise ConfigError(
            f"family.guidance_range: {fixed[0]} cannot be guided: use drift alone, or leave "
            "guidance_range out"
        )


def check_views(options: GuidedOptions, levels: Iterable[str]) -> None:
    """Check that every view fits the grids that are compared.

    Args:
        options: of the run.
        levels: of a stage.

    Raises:
        ConfigError: naming the level.
    """
    for level in levels:
        for one in options.objectives:
            if not isinstance(one, DistributionObjective) or not is_of(level, one.guides):
                continue
            for view in one.views:
                try:
                    sets_of(view, level_grid(level))
                except ValueError as error:
                    raise ConfigError(f"family.objectives: {one.name}, {level}: {error}") from None


def check_distributions(options: GuidedOptions, batch: int) -> None:
    """Check what objectives that compare distributions need.

    Args:
        options: of the run.
        batch: size of the global batch.

    Raises:
        ConfigError: naming the key.
    """
    found = [one.name for one in options.objectives if isinstance(one, DistributionObjective)]
    if not found:
        if options.reference_batch:
            raise ConfigError(
                "family.reference_batch: none of family.objectives compares distributions, so it "
                "has no effect: leave it out"
            )
        return
    if min(batch, options.reference_batch or batch) < 2:
        raise ConfigError(
            f"family.objectives: {found[0]} compares distributions: stages.batch and "
            "family.reference_batch must be >= 2"
        )
    paired = any(isinstance(one, Paired) for one in options.objectives)
    if not options.reference_batch and (paired or options.text is not None):
        raise ConfigError(
            f"family.reference_batch must be > 0 when a distribution loss ({found[0]}) is combined "
            f"with {'paired' if paired else 'text'}: otherwise each sample is pulled towards its "
            "own real image. Try 512."
        )
