"""The section ``cluster:`` of a config: what each SLURM job of a run requests."""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, model_validator

from dinogen.config.base import Section

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
