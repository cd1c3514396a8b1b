"""The sections of a config that say how a run trains: stages, optimizer, engine, averages, logs."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from dinogen.config.base import Section


class StageConfig(Section):
    """One resolution of the progressive plan."""

    resolution: int = Field(..., ge=4, le=1024, description="pixels; 4, 8, 16, ...")
    kimg: float | None = Field(
        None, gt=0, description="thousands of images shown in the whole stage"
    )
    epochs: float | None = Field(
        None, gt=0, description="length in epochs of the data, if kimg is not given"
    )
    fade_kimg: float = Field(
        0.0, ge=0, description="first thousands of images, while the new block fades in"
    )
    batch: int = Field(64, ge=1, description="global batch, over all ranks")
    lr: float = Field(1e-3, gt=0, description="learning rate")
    warmup_kimg: float = Field(
        0.0, ge=0, description="first thousands of images, while lr rises from 0"
    )
    decay_kimg: float = Field(
        0.0, ge=0, description="last thousands of images, while lr falls to 0"
    )

    @model_validator(mode="after")
    def _check(self) -> StageConfig:
        if self.resolution & (self.resolution - 1):
            raise ValueError(
                f"resolution {self.resolution} is not a power of two: use 4, 8, 16, ..."
            )
        if self.kimg is None and self.epochs is None:
            raise ValueError(
                f"the stage of resolution {self.resolution} has no length: give it kimg or epochs"
            )
        if self.kimg is not None and self.fade_kimg > self.kimg:
            raise ValueError(
                f"fade_kimg {self.fade_kimg} is longer than the stage's kimg {self.kimg}: "
                "shorten fade_kimg or lengthen kimg"
            )
        if self.kimg is not None and self.warmup_kimg + self.decay_kimg > self.kimg:
            raise ValueError(
                f"warmup_kimg {self.warmup_kimg} and decay_kimg {self.decay_kimg} are longer than "
                f"the stage's kimg {self.kimg}: shorten them or lengthen kimg"
            )
        return self

    @property
    def num_images(self) -> int:
        """Images shown in the whole stage.

        Raises:
            ValueError: its length is in epochs, and the data have not been opened yet.
        """
        if self.kimg is None:
            raise ValueError(f"stage {self.resolution}: epochs of unknown data")
        return round(self.kimg * 1000)


class OptimConfig(Section):
    """The optimizer of every trained network."""

    name: Literal["adam", "adamw"] = Field(
        "adam", description="adamw: weight decay apart from the gradient"
    )
    betas: tuple[float, float] = Field((0.9, 0.99), description="Adam's decay rates")
    eps: float = Field(1e-8, gt=0, description="Adam's epsilon, added to the denominator")
    weight_decay: float = Field(0.0, ge=0, description="factor of the weights per step, times lr")
    lr_scale: dict[str, Annotated[float, Field(gt=0)]] = Field(
        {}, description="factor of a network's learning rate, by its name: {D: 2.0}"
    )


class EngineConfig(Section):
    """How the step is computed."""

    name: Literal["auto", "single", "ddp", "deepspeed"] = Field(
        "auto", description="auto: ddp under torchrun with several ranks, else single"
    )
    zero: int = Field(
        1, description="for deepspeed, what is sharded: 0 nothing, 1 optimizer state, 2 gradients"
    )
    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        "auto", description="auto: bf16 if the GPU supports it, fp32 on CPU"
    )
    micro_batch: int | None = Field(
        None, ge=1, description="samples per forward and rank; the rest is accumulated"
    )
    clip_grad_norm: float | None = Field(None, gt=0, description="largest gradient norm")
    compile: bool = Field(False, description="torch.compile the trained networks")
    max_nonfinite: int = Field(
        20, ge=1, description="number of non-finite updates in a row that ends the run"
    )

    @field_validator("zero")
    @classmethod
    def _known_zero(cls, zero: int) -> int:
        if zero == 3:
            raise ValueError(
                "ZeRO 3 shards the weights themselves, which second derivatives (R1, path length) "
                "do not support, and these networks fit into one GPU: use 0, 1 or 2"
            )
        if zero not in (0, 1, 2):
            raise ValueError(f"there is no ZeRO {zero}: use 0, 1 or 2")
        return zero


class EmaConfig(Section):
    """Moving average of the generator's weights."""

    halflife_kimg: float = Field(10.0, gt=0, description="half-life, thousands of images")
    rampup: float = Field(
        0.05, gt=0, description="half-life is at most this fraction of the images seen"
    )


class EvalConfig(Section):
    """How a run is measured while it trains, and when it is stopped early."""

    every_kimg: float | None = Field(
        None, gt=0, description="thousands of images between measurements; default: none are made"
    )
    every_epochs: float | None = Field(
        None, gt=0, description="the same in epochs, if every_kimg is not given"
    )
    split: Literal["val", "test"] = Field("val", description="split that is measured on")
    num_samples: int = Field(
        1024, ge=1, description="largest number of its samples, spread over the split"
    )
    generated: tuple[str, ...] = Field(
        (), description="metrics of generated images that are measured too, such as fid"
    )
    num_generated: int = Field(1024, ge=2, description="number of these images, over all ranks")
    metric: str | None = Field(
        None,
        description="metric that decides, such as mse or fid; default: the first of the family's "
        "own, or of generated if it has none",
    )
    patience: int | None = Field(
        None, ge=1, description="stop after this many measurements without a new best"
    )

    @model_validator(mode="after")
    def _check(self) -> EvalConfig:
        if self.patience is not None and self.every_kimg is None and self.every_epochs is None:
            raise ValueError("patience needs measurements: give every_kimg or every_epochs too")
        return self


class AugmentConfig(Section):
    """Augmentation of each training image; off by default."""

    flip: float = Field(0.0, ge=0, le=1, description="probability of a mirror image")
    rotate: float = Field(0.0, ge=0, le=45, description="largest rotation, degrees")
    brightness: float = Field(0.0, ge=0, lt=1, description="times 1 - b to 1 + b")
    contrast: float = Field(0.0, ge=0, lt=1, description="times 1 - c to 1 + c, about mean grey")
    saturation: float = Field(0.0, ge=0, lt=1, description="times 1 - s to 1 + s, about grey")


class CheckpointConfig(Section):
    """When and how many checkpoints are kept."""

    every_kimg: float = Field(10.0, gt=0, description="thousands of images between checkpoints")
    keep_last: int = Field(2, ge=1, description="number of newest checkpoints that are kept")
    keep_every_kimg: float | None = Field(
        None, gt=0, description="also keep one every this many thousand images, permanently"
    )


class LogConfig(Section):
    """What is written to TensorBoard, stats.jsonl and the page."""

    every_kimg: float = Field(0.5, gt=0, description="thousands of images between log lines")
    probe_kimg: float = Field(5.0, gt=0, description="between probes of the family (diversity)")
    samples_kimg: float = Field(10.0, gt=0, description="between sample grids")
    num_samples: int = Field(64, ge=1, le=1024, description="images in a sample grid")
