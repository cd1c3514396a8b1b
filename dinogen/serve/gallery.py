"""Draws images of a run one at a time: its stages, the limits of a request, the PNG."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

import torch
from pydantic import Field, model_validator
from safetensors import SafetensorError

from dinogen.config import Config, ConfigError, Section
from dinogen.errors import UserError
from dinogen.families.abilities import truncates
from dinogen.hub import cached_name, local_weights
from dinogen.report.images import png_bytes, to_uint8
from dinogen.runs.layout import is_exported, stage_name
from dinogen.training.checkpointing.checkpoint import Checkpoint, NewestCheckpoints
from dinogen.training.checkpointing.exported import open_exported
from dinogen.training.checkpointing.snapshot import Snapshot, load_snapshot, run_config
from dinogen.visualize.drawings import spherical

log = logging.getLogger(__name__)

# the largest integer that a browser represents exactly
MAX_SEED = 2**53 - 1
MAX_NUMBER = 999_999
# stages kept in memory, so that two can be compared
_NUM_OPEN = 2


class Query(Section):
    """The parameters of an image; values out of range are rejected."""

    stage: int | None = Field(None, ge=4, le=1024, description="the largest unless given")
    seed: int = Field(0, ge=0, le=MAX_SEED)
    number: int = Field(0, ge=0, le=MAX_NUMBER, description="of the image with this seed")
    psi: float = Field(
        1.0, ge=0, le=1, allow_inf_nan=False, description="0: the mean, 1: unchanged"
    )
    to: int | None = Field(None, ge=0, le=MAX_SEED, description="seed to walk to")
    at: float = Field(0.0, ge=0, le=1, allow_inf_nan=False, description="how far to walk, with to")

    @model_validator(mode="after")
    def _goes_somewhere(self) -> Query:
        if self.at and self.to is None:
            raise ValueError(f"at is {self.at}, but there is no seed to walk to: give to as well")
        return self


@dataclass(frozen=True)
class Stage:
    """A stage with a checkpoint: the newest at the start of the server.

    Attributes:
        resolution: of its images.
        nimg: number of images seen.
        guide: label of its guide; None without one.
        random_guide: whether the guide had random weights: images then say nothing about quality.
    """

    resolution: int
    nimg: int
    guide: str | None
    random_guide: bool


def _newest(run: Path, config: Config) -> Iterator[tuple[int, Checkpoint]]:
    """Resolution and newest checkpoint of each stage that has one, the largest first."""
    if is_exported(run):
        file = open_exported(run)
        yield file.info["resolution"], file
        return
    newest = NewestCheckpoints(run)
    for stage in reversed(config.stages):
        if (checkpoint := newest.of(stage.resolution)) is not None:
            yield stage.resolution, checkpoint


class Gallery:
    """Draws images of a run on demand; not thread-safe.

    Args:
        run: folder of the run, a file of ``dinogen export``, or an address of the hub.

    Raises:
        ConfigError: ``run`` is no run, or has no complete checkpoint.
        DistError: this machine does not have the run's device.
    """

    def __init__(self, run: Path) -> None:
        run = local_weights(run)
        config = run_config(run)
        self.run = run = run if is_exported(run) else config.run
        self.family = config.family.name
        self.stages = {
            resolution: Stage(
                resolution,
                checkpoint.state["progress"]["nimg"],
                checkpoint.state["facts"].get("guide_label"),
                bool(checkpoint.state["facts"].get("random_guide")),
            )
            for resolution, checkpoint in _newest(run, config)
        }
        if not self.stages:
            raise ConfigError(f"{run}: no stage has a complete checkpoint: train it first")
        self._snapshot = lru_cache(maxsize=_NUM_OPEN)(load_snapshot)
        self.truncates = truncates(self._first_sound().family)

    def _first_sound(self) -> Snapshot:
        """The snapshot of the largest stage that can be loaded; stages that cannot are dropped.

        Raises:
            ConfigError: none can.
        """
        reasons = []
        for stage in list(self.stages.values()):
            try:
                return self._snapshot(self.run, stage.resolution, stage.nimg)
            except (UserError, KeyError, RuntimeError, OSError, SafetensorError) as error:
                del self.stages[stage.resolution]
                size = f"stage {stage_name(stage.resolution)}"
                reasons.append(f"{self.run}: {size} cannot be drawn from: {error}")
                log.warning("%s", reasons[-1])
        raise ConfigError("\n".join(reasons))

    def stage(self, query: Query) -> Stage:
        """The stage of a query.

        Raises:
            ConfigError: there is no such stage, or the family has no truncation.
        """
        if query.psi != 1 and not self.truncates:
            raise ConfigError(f"psi: family {self.family} does not truncate: leave it out")
        if query.stage is None:
            return next(iter(self.stages.values()))
        if query.stage not in self.stages:
            names = ", ".join(map(str, self.stages))
            raise ConfigError(
                f"stage: {query.stage} is not a stage of this run: choose one of {names}"
            )
        return self.stages[query.stage]

    @torch.no_grad()
    def draw(self, query: Query) -> bytes:
        """The image as a PNG at its own resolution; the same bytes for the same query.

        Number i of a seed is sample i of ``dinogen sample``. On the walk to another seed only the
        latent changes, along the great circle; the class and further noise stay the same.

        Raises:
            ConfigError: see :meth:`stage`; or the checkpoint is no longer there.
        """
        stage = self.stage(query)
        snapshot = self._snapshot(self.run, stage.resolution, stage.nimg)
        family, number = snapshot.family, torch.tensor([query.number])
        latents = family.latents(number, query.seed)
        if query.to is not None and query.at:
            end = family.latents(number, query.to)
            latents = end if query.at == 1 else spherical(latents, end, query.at)
        images = family.decode(snapshot.ema.networks, latents, number, query.seed, query.psi)
        pixels = to_uint8(images.float().cpu().numpy())[0]
        made_by = asdict(stage) | query.model_dump(exclude={"stage"})
        about = {
            "run": cached_name(self.run) or self.run.resolve().name,
            "family": self.family,
        } | made_by
        return png_bytes(pixels, about)
