"""The schema of a dinogen YAML file, its overrides and its errors.

Every key of a config is declared here, with its unit and default. An unknown key is refused
together with the nearest valid name, because a misspelt option that is silently ignored costs a
cluster job. Options of one family live with the family (``Family.Options``) and are checked when
the family is built.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from dinogen.config_cluster import ClusterConfig
from dinogen.config_errors import describe_errors as describe_errors
from dinogen.config_file import override, read_mapping
from dinogen.config_prepare import PrepareConfig
from dinogen.config_section import Section as Section
from dinogen.errors import ConfigError as ConfigError


class GuideConfig(Section):
    """The frozen feature network."""

    name: Literal["dinov2", "inception"] = Field("dinov2", description="which encoder")
    path: str = Field(
        "facebook/dinov2-small", description="hub name, local checkpoint folder or weights file"
    )
    revision: str | None = Field(None, description="hub revision (commit, tag or branch)")
    layer: int = Field(-1, description="which layer's tokens; -1 is the last")


class DataConfig(Section):
    """Which shards are read, and how."""

    path: str = Field("data/faces", description="folder or fsspec URL of packed shards")
    split: Literal["train", "val", "test"] = Field("train", description="split trained on")
    num_lanes: int = Field(64, ge=1, description="lanes of the global order")
    window_shards: int = Field(4, ge=1, description="shards' worth of samples shuffled together")
    num_threads: int = Field(1, ge=0, le=16, description="reader threads; 0 reads in the step")
    on_error: Literal["stop", "skip"] = Field(
        "stop", description="a corrupt sample stops the run, or is replaced and counted"
    )
    cache_dir: Path | None = Field(None, description="where remote shards are kept")
    cache_gb: float | None = Field(
        None, gt=0, description="most that the cache of remote shards holds; the oldest used go"
    )


class FamilyConfig(BaseModel):
    """Which family; every other key belongs to the family's own Options."""

    model_config = ConfigDict(extra="allow")

    name: str = Field("guided", description="a file of dinogen/families")

    @property
    def options(self) -> dict[str, Any]:
        """The family's own keys, unchecked."""
        return dict(self.model_extra or {})


class StageConfig(Section):
    """One resolution of the progressive plan."""

    resolution: int = Field(..., ge=4, le=1024, description="pixels; 4, 8, 16, ...")
    kimg: float = Field(..., gt=0, description="thousands of images shown in the whole stage")
    fade_kimg: float = Field(0.0, ge=0, description="of these, while the new block fades in")
    batch: int = Field(64, ge=1, description="global batch, over all ranks")
    lr: float = Field(1e-3, gt=0, description="learning rate")

    @model_validator(mode="after")
    def _check(self) -> StageConfig:
        if self.resolution & (self.resolution - 1):
            raise ValueError(
                f"resolution {self.resolution} is not a power of two: use 4, 8, 16, ..."
            )
        if self.fade_kimg > self.kimg:
            raise ValueError(
                f"fade_kimg {self.fade_kimg} is longer than the stage's kimg {self.kimg}: "
                "shorten fade_kimg or lengthen kimg"
            )
        return self


class OptimConfig(Section):
    """The optimizer of every trained network."""

    name: Literal["adam", "adamw"] = "adam"
    betas: tuple[float, float] = Field((0.9, 0.99), description="Adam's decay rates")
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.0, ge=0)


class EngineConfig(Section):
    """How the step is computed."""

    name: Literal["auto", "single", "ddp", "deepspeed"] = Field(
        "auto", description="auto: ddp under torchrun with several ranks, else single"
    )
    zero: int = Field(
        1, description="for deepspeed: 0 nothing, 1 optimizer state, 2 gradients too are sharded"
    )
    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        "auto", description="auto: bf16 where the GPU has it, fp32 on CPU"
    )
    micro_batch: int | None = Field(
        None, ge=1, description="samples per forward and rank; the rest is accumulated"
    )
    clip_grad_norm: float | None = Field(None, gt=0, description="largest gradient norm")
    compile: bool = Field(False, description="torch.compile the trained networks")
    max_nonfinite: int = Field(
        20, ge=1, description="so many non-finite updates in a row end the run"
    )

    @field_validator("zero")
    @classmethod
    def _known_zero(cls, zero: int) -> int:
        if zero == 3:
            raise ValueError(
                "ZeRO 3 shards the weights themselves, which second derivatives (R1, path length) "
                "do not survive, and these networks fit into one GPU: use 0, 1 or 2"
            )
        if zero not in (0, 1, 2):
            raise ValueError(f"there is no ZeRO {zero}: use 0, 1 or 2")
        return zero


class EmaConfig(Section):
    """Moving average of the generator's weights."""

    halflife_kimg: float = Field(10.0, gt=0, description="half-life, thousands of images")
    rampup: float = Field(0.05, gt=0, description="half-life is at most this share of images seen")


class CheckpointConfig(Section):
    """When and how many checkpoints are kept."""

    every_kimg: float = Field(10.0, gt=0, description="thousands of images between checkpoints")
    keep_last: int = Field(2, ge=1, description="newest checkpoints that stay")
    keep_every_kimg: float | None = Field(
        None, gt=0, description="also keep one each so many thousand images, for good"
    )


class LogConfig(Section):
    """What is written for TensorBoard, stats.jsonl and the page."""

    every_kimg: float = Field(0.5, gt=0, description="thousands of images between log lines")
    probe_kimg: float = Field(5.0, gt=0, description="between probes of the family (diversity)")
    samples_kimg: float = Field(10.0, gt=0, description="between sample grids")
    num_samples: int = Field(64, ge=1, le=1024, description="pictures in a sample grid")


class Config(Section):
    """A whole run, from photos to pictures."""

    run: Path = Field(Path("runs/run"), description="folder of the run")
    seed: int = Field(0, ge=0, lt=2**63, description="seed of every derived draw")
    prepare: PrepareConfig = PrepareConfig()
    guide: GuideConfig = GuideConfig()
    data: DataConfig = DataConfig()
    family: FamilyConfig = FamilyConfig()
    stages: tuple[StageConfig, ...] = Field(
        (StageConfig(resolution=4, kimg=50),), min_length=1, description="trained in this order"
    )
    optim: OptimConfig = OptimConfig()
    engine: EngineConfig = EngineConfig()
    ema: EmaConfig = EmaConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()
    cluster: ClusterConfig = ClusterConfig()

    @model_validator(mode="after")
    def _stages_grow(self) -> Config:
        sizes = [stage.resolution for stage in self.stages]
        if any(b != 2 * a for a, b in itertools.pairwise(sizes)):
            raise ValueError(f"stages {sizes}: each stage has to double the resolution before it")
        if self.stages[0].fade_kimg:
            raise ValueError(
                f"stages.0: fade_kimg is {self.stages[0].fade_kimg}, but the first stage has none "
                "before it to fade in from: leave it out"
            )
        return self


def load_config(path: Path | str, overrides: list[str] | tuple[str, ...] = ()) -> Config:
    """Read a YAML file, apply ``key=value`` overrides, and check the result.

    Args:
        path: YAML file.
        overrides: ``a.b=value`` items; the value is parsed as YAML, list items are addressed by
            their number (``stages.0.kimg=2``).

    Raises:
        ConfigError: naming the file and key, with the nearest valid name or the mend.
    """
    return parse_config(read_mapping(Path(path)), overrides, source=str(path))


def parse_config(
    data: dict[str, Any], overrides: list[str] | tuple[str, ...] = (), source: str = "config"
) -> Config:
    """Check a mapping as :func:`load_config` does; ``source`` is named in errors.

    Raises:
        ConfigError: naming the key, with the nearest valid name or the mend.
    """
    if overrides:
        defaults = Config().model_dump(mode="json")
        for item in overrides:
            override(data, item, defaults)
    try:
        return Config.model_validate(data)
    except ValidationError as error:
        raise ConfigError(describe_errors(error, Config, source)) from None


def dump_config(config: Config) -> str:
    """The whole resolved config as YAML; reading it gives the same config again."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
