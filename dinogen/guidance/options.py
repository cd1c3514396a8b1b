"""Keys of ``family:`` for ``name: guided``: objectives, ``discriminator:`` and ``text:``."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any, Literal

from pydantic import Field, PositiveInt, model_validator

from dinogen.config import ConfigError, GuideConfig, Section, StageConfig
from dinogen.guidance.objectives import MAIN, AnyTerm, Mse, Paired, PairTerm, SetTerm
from dinogen.networks.diffaugment import Transform

NATIVE_UP_TO = 16
POOLED = (16, 8, 4)


class GuidedOptions(Section):
    """Keys of ``family:`` for ``name: guided``."""

    objectives: tuple[AnyTerm, ...] = Field(
        (Mse(),), min_length=1, description="what is summed: names, weights, options"
    )
    bank: int = Field(
        0,
        ge=0,
        description="so many further reals each step for objectives that compare distributions; "
        "0: as many as are generated",
    )
    discriminator: DiscriminatorOptions | None = Field(
        None, description="trained beside them; none unless given"
    )
    text: TextOptions | None = Field(
        None, description="pictures are asked for by CLIP embeddings; not unless given"
    )
    pyramid: Literal["native", "pooled"] = Field(
        "native",
        description="targets up to 16x16: features of the shrunk picture, or pooled features of "
        "the full one; above 16x16 always pooled",
    )
    grids: dict[str, Annotated[tuple[PositiveInt, ...], Field(min_length=1)]] = Field(
        {},
        description="above 16x16, of main and each of guides:; 16, 8 and 4 unless given. Others, "
        "such as 32 of pixels, are native",
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

    @model_validator(mode="after")
    def _one_table(self) -> GuidedOptions:
        if sum(isinstance(term, Paired) for term in self.objectives) > 1:
            raise ValueError("objectives: paired once at the most: it says what z is")
        table = self.table
        if table and self.text is not None:
            raise ValueError(
                "objectives: latents that are learnt (num_latents) know no text: leave out one"
            )
        if table and table.num_latents <= self.z_dim:
            raise ValueError(
                f"objectives: num_latents {table.num_latents} has to be more than z_dim "
                f"{self.z_dim}, for a Gaussian is fitted to the latents: a smaller z_dim will do"
            )
        return self

    @model_validator(mode="after")
    def _text_is_heard(self) -> GuidedOptions:
        text = self.text
        if text is None or text.clip_weight:
            return self
        # A pair's real picture is the one that was asked for.
        if not any(
            isinstance(term, PairTerm)
            or (isinstance(term, SetTerm) and "map" in term.views and text.joint_weight)
            for term in self.objectives
        ):
            raise ValueError(
                "text: nothing would teach the generator to heed it: set clip_weight, or "
                "joint_weight with an objective that has the view map"
            )
        return self

    @property
    def table(self) -> Paired | None:
        """The objective whose latents are learnt, if there is one."""
        found = (t for t in self.objectives if isinstance(t, Paired) and t.num_latents)
        return next(found, None)

    def levels(self, stage: StageConfig, further: Iterable[str]) -> tuple[str, ...]:
        """What a stage compares: ``p8`` of the main guide, ``NAME.p8`` of others.

        Args:
            stage: whose resolution decides.
            further: names of the other guides.

        Raises:
            ConfigError: an option names a guide that there is not.
        """
        guides = (MAIN, *further)
        for name in (*self.grids, *(guide for term in self.objectives for guide in term.guides)):
            if name not in guides:
                raise ConfigError(
                    f"family: there is no guide {name}: name one of {', '.join(guides)}, or add it "
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


def check_sets(options: GuidedOptions, batch: int) -> None:
    """Refuse what objectives that compare distributions cannot work with.

    Args:
        options: of the run.
        batch: size of the global batch.

    Raises:
        ConfigError: naming the key.
    """
    sets = [term.name for term in options.objectives if isinstance(term, SetTerm)]
    if not sets:
        if options.bank:
            raise ConfigError(
                "family.bank: none of family.objectives compares distributions, so a bank of "
                "reals means nothing: leave it out"
            )
        return
    if min(batch, options.bank or batch) < 2:
        raise ConfigError(
            f"family.objectives: {sets[0]} compares distributions, so stages.batch and family.bank "
            "have to be 2 at least"
        )
    paired = any(isinstance(term, Paired) for term in options.objectives)
    if not options.bank and (paired or options.text is not None):
        raise ConfigError(
            f"family.bank: {sets[0]} beside {'paired' if paired else 'text'} needs reals that are "
            "not those that the pictures are made for, or each would be drawn to its own: set it, "
            "to 512 say"
        )


# Keys that only one kind reads.
_OF_KIND = {
    "projected": ("guide", "grid", "head_channels"),
    "patch": ("patch_scales", "patch_layers", "patch_channels"),
}


class DiscriminatorOptions(Section):
    """Keys of ``discriminator:``; its learning rate is ``optim.lr_scale: {D: ...}``."""

    kind: Literal["projected", "patch"] = Field(
        "projected",
        description="projected: heads on the layers of a frozen guide; patch: PatchGAN on pixels",
    )
    from_resolution: int = Field(64, ge=4, description="stages from this resolution on have it")
    weight: float = Field(0.1, gt=0, description="of G's adversarial loss")
    ramp_kimg: float = Field(
        10.0,
        ge=0,
        description="thousands of images, from the stage's start, in which the weight rises from 0",
    )
    loss: Literal["hinge", "relativistic"] = Field(
        "hinge", description="relativistic: pairs of real and generated; wants r1 and r2 beside it"
    )
    r1: float = Field(0.0, ge=0, description="gamma: D's squared gradient at real pictures is ...")
    r2: float = Field(0.0, ge=0, description="... and at generated ones is weighed by gamma / 2")
    penalty_on: Literal["pixels", "features"] = Field(
        "pixels", description="what that gradient is taken to: features are the guide's"
    )
    every: int = Field(
        16, ge=1, description="steps between updates by r1 and r2; at 1 a part of D's own"
    )
    augment: tuple[Transform, ...] = Field(
        ("color", "translation", "cutout"),
        description="what is done to pictures, real and generated, before D sees them",
    )
    crop: int | None = Field(
        None,
        ge=8,
        description="side in pixels of random parts that are judged at native size, of the sizes "
        "that the guide takes (of DINOv2 14 * n); pictures no larger are judged whole",
    )
    guide: GuideConfig | None = Field(
        None, description="what projected heads look through; the run's own guide unless given"
    )
    grid: int = Field(
        16, ge=1, description="whole pictures go through the guide at the size of this grid"
    )
    head_channels: int = Field(
        128, ge=8, multiple_of=8, description="channels inside each projected head"
    )
    patch_scales: int = Field(3, ge=1, description="PatchGANs, each at half the size")
    patch_layers: int = Field(
        3, ge=1, le=5, description="their halvings: 1, 2, 3 judge patches of 16, 34, 70 pixels"
    )
    patch_channels: int = Field(
        64, ge=8, multiple_of=8, description="their channels behind the first layer"
    )

    @model_validator(mode="after")
    def _fits_together(self) -> DiscriminatorOptions:
        if self.kind == "patch" and self.penalty_on == "features":
            raise ValueError("a patch discriminator has no features: penalty_on has to be pixels")
        for kind, keys in _OF_KIND.items():
            given = [k for k in keys if getattr(self, k) != type(self).model_fields[k].default]
            if kind != self.kind and given:
                raise ValueError(
                    f"{given[0]} is of a {kind} discriminator, this one is {self.kind}: "
                    f"leave out {given[0]}, or set kind: {kind}"
                )
        return self

    def applies(self, stage: StageConfig) -> bool:
        """Whether a stage has the discriminator."""
        return stage.resolution >= self.from_resolution


class TextOptions(Section):
    """Keys of ``text:``; the network is that of ``clip:``, which has embedded the data as well."""

    embed_dim: int = Field(
        512, ge=1, description="size of the embeddings of clip: 512 of CLIP's ViT-B, 768 of ViT-L"
    )
    condition: Literal["images", "captions"] = Field(
        "images",
        description="what is asked for in training: each real picture's own embedding (needs no "
        "captions), or that of its caption",
    )
    noise: float = Field(
        0.75,
        ge=0,
        description="of images: length of the noise that makes their embeddings as far from "
        "themselves as captions are",
    )
    dropout: float = Field(
        0.2, ge=0, lt=1, description="share of samples that are asked for nothing"
    )
    clip_weight: float = Field(
        1.0,
        ge=0,
        description="weight of 1 - cos between the embedding of a picture and what was asked for",
    )
    joint_weight: float = Field(
        1.0,
        ge=0,
        description="how much, beside features, what was asked for counts in objectives between "
        "distributions: they compare what belongs together; 0: features alone",
    )
    mapping_layers: int = Field(2, ge=1, description="dense layers that join z and embedding")

    @property
    def level(self) -> str:
        """The level that holds what is asked for."""
        return "text" if self.condition == "captions" else "clip"
