"""The section ``discriminator:`` of a guided run: which kind, its losses, what it is shown."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from dinogen.config import GuideConfig, Section, StageConfig
from dinogen.networks.diffaugment import Transform

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
