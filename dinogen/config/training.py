"""The sections of a config about a run: its data, its training, its metrics, and its jobs."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

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


@dataclass(frozen=True)
class StagePlan:
    """A stage on the clock of the run.

    Attributes:
        stage: its config.
        start: nimg at which it begins, where the stage before ended.
    """

    stage: StageConfig
    start: int

    @property
    def end(self) -> int:
        """nimg from which on it is done."""
        return self.start + self.stage.num_images

    @property
    def fade_end(self) -> int:
        """nimg from which on everything trains."""
        return self.start + round(self.stage.fade_kimg * 1000)

    def fading(self, nimg: int) -> bool:
        """Whether only the new block trains."""
        return nimg < self.fade_end

    def alpha(self, nimg: int) -> float:
        """Share of the new block in the image, 0 to 1."""
        return (nimg - self.start) / (self.fade_end - self.start) if self.fading(nimg) else 1.0

    def lr_factor(self, nimg: int) -> float:
        """Share of the learning rate that the step which begins at ``nimg`` takes.

        Linear at both ends: the first step of a warm-up takes a batch's share of it, and the last
        of a decay too.
        """
        warmup, decay = self.stage.warmup_kimg * 1000, self.stage.decay_kimg * 1000
        rise = (nimg - self.start + self.stage.batch) / warmup if warmup else 1.0
        fall = (self.end - nimg) / decay if decay else 1.0
        return min(1.0, rise, fall)


def due(before: int, now: int, every_kimg: float) -> bool:
    """Whether a multiple of ``every_kimg`` thousand images lies in (before, now]."""
    every = every_kimg * 1000
    return int(now // every) > int(before // every)


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
    compile: bool = Field(
        False,
        description="torch.compile the trained networks and the frozen ones, such as guides; "
        "phases with second derivatives stay as they are",
    )
    tf32: bool = Field(
        True, description="on GPUs, float32 products with the 10-bit mantissa of TensorFloat-32"
    )
    cudnn_benchmark: bool = Field(
        True, description="on GPUs, try cuDNN's convolutions out and take the fastest"
    )
    channels_last: bool = Field(
        True, description="on GPUs, convolutions with the channels of a pixel side by side"
    )
    deterministic: bool = Field(
        False,
        description="on GPUs, algorithms that give the same bits in every run, which are slower; "
        "without cudnn_benchmark",
    )
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
    rampup: float | None = Field(
        0.05,
        gt=0,
        description="half-life is at most this fraction of the images seen; null: no limit, for "
        "averages that init_from has loaded",
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


class ProfileConfig(Section):
    """A trace of a few steps of a run, for TensorBoard, chrome://tracing and Perfetto."""

    at_kimg: float = Field(
        ..., ge=0, description="thousands of images of the run after which it begins"
    )
    steps: int = Field(5, ge=1, le=100, description="number of steps that are traced")


class LogConfig(Section):
    """How often a run writes to stats.jsonl, its page and what ``logging`` names."""

    every_kimg: float = Field(0.5, gt=0, description="thousands of images between log lines")
    probe_kimg: float = Field(5.0, gt=0, description="between probes of the family (diversity)")
    samples_kimg: float = Field(10.0, gt=0, description="between sample grids")
    num_samples: int = Field(64, ge=1, le=1024, description="images in a sample grid")
    profile: ProfileConfig | None = Field(
        None, description="a trace of a few steps; default: none is made"
    )


def _one_mapping_each(value: Any) -> Any:
    """``tensorboard``, ``[tensorboard, {wandb: {project: faces}}]`` -> names with their options."""
    if isinstance(value, str):
        value = [value]
    if not isinstance(value, (list, tuple)):
        return value
    found: dict[str, Any] = {}
    name: str
    options: Any
    for item in value:
        if isinstance(item, str):
            name, options = item, None
        elif isinstance(item, dict) and len(item) == 1:
            name, options = next(iter(item.items()))
        else:
            raise ValueError(
                f"{item!r}: give a name, or a name with its options, such as "
                "{wandb: {project: faces}}"
            )
        if name in found:
            raise ValueError(f"{name} occurs twice: keep one")
        if options is not None and not isinstance(options, dict):
            raise ValueError(
                f"{name}: {options!r} are no options: write {{{name}: {{key: value}}}}"
            )
        found[str(name)] = options or {}
    return tuple({name: options} if options else name for name, options in found.items())


# Which sinks there are, and what options each has, training/logging/sinks knows.
Sinks = Annotated[tuple[str | dict[str, dict[str, Any]], ...], BeforeValidator(_one_mapping_each)]


class MixConfig(Section):
    """One of several datasets that are mixed."""

    path: str = Field(..., min_length=1, description="folder or fsspec URL of packed shards")
    weight: float = Field(
        ..., gt=0, allow_inf_nan=False, description="its share of the samples, relative to others"
    )


class DataConfig(Section):
    """Which shards are read, and how."""

    path: str = Field(
        "data/faces",
        description="folder or fsspec URL of packed shards, hf://datasets/user/name too; empty if "
        "mix is given",
    )
    mix: tuple[MixConfig, ...] = Field(
        (), description="several datasets instead of path, mixed by weight"
    )
    split: Literal["train", "val", "test"] = Field("train", description="split trained on")
    num_lanes: int = Field(64, ge=1, description="lanes of the global order")
    window_shards: int = Field(4, ge=1, description="samples shuffled together, in shards")
    num_threads: int = Field(1, ge=0, le=16, description="reader threads; 0 reads in the step")
    on_error: Literal["stop", "skip"] = Field(
        "stop", description="a corrupt sample stops the run, or is replaced and counted"
    )
    cache_dir: Path | None = Field(None, description="where remote shards are kept")
    cache_gb: float | None = Field(
        None, gt=0, description="size limit of that cache, GB; the least recently used are evicted"
    )

    @model_validator(mode="before")
    @classmethod
    def _no_path_beside_a_mix(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("mix") and "path" not in values:
            return {**values, "path": ""}
        return values

    @model_validator(mode="after")
    def _one_of_both(self) -> DataConfig:
        if self.mix and self.path:
            raise ValueError(f"path {self.path} and mix are both given: leave one of them out")
        if len(self.mix) == 1:
            raise ValueError("mix: give two or more datasets, or the single one as path")
        if not self.mix and not self.path:
            raise ValueError("path is empty: give the folder or URL of packed shards")
        return self

    @property
    def location(self) -> str:
        """The path, or the paths of a mix."""
        return self.path or " + ".join(one.path for one in self.mix)


class MetricsConfig(Section):
    """How generated images are measured; docs/metrics.md explains each metric."""

    names: tuple[str, ...] = Field((), description="which metrics: fid, kid, ...; all if empty")
    num_samples: int = Field(5000, ge=2, description="number of generated images")
    num_reference: int = Field(
        5000, ge=2, description="largest number of real images, spread over reference_split"
    )
    reference_split: Literal["train", "val", "test"] = Field(
        "val", description="split of the real images that they are compared with"
    )
    num_bootstrap: int = Field(
        10, ge=0, description="resamplings of the generated images that the spread is taken over"
    )
    inception: str | None = Field(
        None,
        description="file of FID's InceptionV3, in torch-fidelity's format; default: the copy in "
        "torch's hub cache",
    )
    inception768: str | None = Field(
        None,
        description="file of FID's InceptionV3 up to Mixed_6e: torch-fidelity's, or safetensors "
        "with batch norm folded",
    )
    dinov2: str | None = Field(None, description="hub name or checkpoint folder of a DINOv2")
    onet: str | None = Field(
        None, description="file of MTCNN's O-Net; default: the one in facenet-pytorch's wheel"
    )
    clip: str | None = Field(
        None, description="hub name or checkpoint folder of the CLIP that scores prompts"
    )
    prompts: Path | None = Field(
        None, description="text file of prompts for text-conditional runs, one per line"
    )
    guidance: float = Field(
        1.0, ge=0, description="guidance scale of prompts: 1 as trained, more exaggerates"
    )
    lpips: Literal["alex", "vgg", "squeeze"] = Field("alex", description="network of LPIPS")
    lpips_backbone: str | None = Field(
        None, description="file of its weights; default: torchvision's in torch's hub cache"
    )
    cache: Path | None = Field(
        None, description="folder of reference statistics; default: ~/.cache/dinogen/metrics"
    )


class ClipConfig(Section):
    """CLIP; if it is set, ``dinogen prepare`` stores its embeddings of every sample."""

    path: str = Field(description="hub name, hf://user/name, or local checkpoint folder")
    revision: str | None = Field(None, description="hub revision (commit, tag or branch)")


_TIME = re.compile(r"(\d+-\d+(:\d+){0,2}|\d+(:\d+){0,2}|UNLIMITED|INFINITE)")


def _check_time(value: Any) -> Any:
    """SLURM's notation; YAML has turned an unquoted 12:00:00 into the number 43200."""
    if isinstance(value, int):
        raise ValueError(
            f"{value} is not a time: YAML reads 12:00:00 as a number, so write it in quotes, as in "
            "'12:00:00' or '2-00:00:00' (days-hours:minutes:seconds)"
        )
    if isinstance(value, str) and not _TIME.fullmatch(value):
        raise ValueError(f"'{value}' is not a time: write it as '12:00:00' or '2-00:00:00'")
    return value


Time = Annotated[str, BeforeValidator(_check_time)]


class JobConfig(Section):
    """What one kind of job requests instead of the values above."""

    nodes: int | None = Field(None, ge=1, description="number of nodes")
    gpus_per_node: int | None = Field(None, ge=0, description="GPUs on each node")
    processes_per_node: int | None = Field(None, ge=1, description="processes on each node")
    cpus_per_process: int | None = Field(None, ge=1, description="cores of each process")
    mem: str | None = Field(None, description="memory per node, such as 64G")
    time: Time | None = Field(None, description="time limit, such as '12:00:00'")
    partition: str | None = Field(None, description="partition to queue it in")
    sbatch: tuple[str, ...] | None = Field(None, description="further flags of sbatch")


class StageJobConfig(JobConfig):
    """What the job of one stage requests."""

    resolution: int = Field(..., ge=4, le=1024, description="which stage")


class ClusterConfig(Section):
    """SLURM resources of the jobs of a run, as ``dinogen launch --on slurm`` submits them."""

    nodes: int = Field(1, ge=1, description="nodes of the largest stages")
    gpus_per_node: int = Field(1, ge=0, description="GPUs that a job uses on a node; 0: CPUs only")
    processes_per_node: int | None = Field(
        None, ge=1, description="processes on a node; default: one per GPU, or one without GPUs"
    )
    gpu_type: str | None = Field(None, description="type of the GPUs, such as h100")
    cpus_per_process: int = Field(4, ge=1, description="cores of each process")
    mem: str | None = Field(None, description="memory per node, such as 64G; default: SLURM's own")
    time: Time = Field("1-00:00:00", description="time limit; training is requeued after it")
    partition: str | None = Field(None, description="partition of all jobs; default: SLURM's own")
    account: str | None = Field(None, description="account that is charged")
    qos: str | None = Field(None, description="quality of service")
    constraint: str | None = Field(None, description="features that a node must have")
    sbatch: tuple[str, ...] = Field((), description="further flags of sbatch, such as --exclusive")
    setup: tuple[str, ...] = Field(
        (), description="shell lines before the work: module load cuda, export NCCL_...=..."
    )
    signal_seconds: int = Field(
        180, ge=30, le=65535, description="how long before its time limit a job is told to save"
    )
    max_restarts: int = Field(
        2, ge=0, description="how often torchrun restarts failed processes within a job"
    )
    min_nodes: int | None = Field(
        None, ge=1, description="fewest nodes to continue on when others are lost; default: all"
    )
    faces: JobConfig = Field(JobConfig(), description="photos to faces: one process")
    pyramids: JobConfig = Field(JobConfig(), description="features of the faces: one whole node")
    pack: JobConfig = Field(JobConfig(), description="shards: one process, no GPU")
    evaluate: JobConfig = Field(JobConfig(), description="metrics at the end: one whole node")
    stages: tuple[StageJobConfig, ...] = Field((), description="stages with other requests")

    @model_validator(mode="after")
    def _stages_once(self) -> ClusterConfig:
        sizes = [stage.resolution for stage in self.stages]
        if twice := {size for size in sizes if sizes.count(size) > 1}:
            raise ValueError(f"stages: resolution {min(twice)} occurs twice: keep one")
        return self
