"""Everything a stage is made of: built fresh, grown from the stage before, or resumed."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from dinogen.config import Config, ConfigError, StageConfig, StagePlan, due
from dinogen.distributed import process_group, rng
from dinogen.families.abilities import Probes, facts_of, fade, new_parameters_of
from dinogen.families.base import Family, Health, sample_in_parts
from dinogen.families.registry import family_class
from dinogen.runs.run import Run
from dinogen.training.checkpointing.checkpoint import (
    Checkpoint,
    NewestCheckpoints,
    on_host,
    or_a_new_run,
    prune,
    save_checkpoint,
    versions,
)
from dinogen.training.checkpointing.snapshot import Ema
from dinogen.training.checkpointing.transfer import grow, init_from
from dinogen.training.data import data_fingerprint, open_data
from dinogen.training.engines import make_engine
from dinogen.training.engines.base import SingleEngine, set_fast_paths, set_memory_format
from shards.read.dataset import Dataset

log = logging.getLogger(__name__)


@dataclass
class Progress:
    """Where a run is; part of each checkpoint.

    Attributes:
        nimg: images shown since the first stage began, over all ranks.
        step: optimizer steps since the first stage began.
        num_skipped: damaged samples that were replaced, in this stage, on all ranks.
        seconds: wall-clock time of this stage so far.
        measuring_s: those of ``seconds`` that went into metrics, probes and grids of samples; None
            if it is unknown: a version that did not count them began the stage.
        loss: main loss of the newest log lines, see :meth:`add_loss`.
        logged: nimg of the newest log line.
        health: what the newest probe found.
        warnings: its words.
        best: best metric value of the stage, None before the first.
        best_nimg: where it was measured.
        num_worse: measurements since then.
    """

    nimg: int = 0
    step: int = 0
    num_skipped: int = 0
    seconds: float = 0.0
    measuring_s: float | None = 0.0
    loss: float | None = None
    logged: int = 0
    health: str = "ok"
    warnings: list[str] = field(default_factory=list)
    best: float | None = None
    best_nimg: int = 0
    num_worse: int = 0

    @property
    def training_s(self) -> float | None:
        """Seconds spent on steps alone: how long a model trains, however often it is measured."""
        return None if self.measuring_s is None else self.seconds - self.measuring_s

    def add_loss(self, loss: float, every: float) -> None:
        """Take over the mean loss of a log line at ``nimg``.

        A line that comes early, at a probe or at the end, may stand for a single batch: it counts
        by its share of the ``every`` images of a whole line, so that the health
        status does not depend on chance.
        """
        share = min(1.0, (self.nimg - self.logged) / every)
        self.logged = self.nimg
        if not math.isfinite(loss):
            self.loss = None
        else:
            self.loss = loss if self.loss is None else share * loss + (1 - share) * self.loss


def stage_plan(
    config: Config, index: int, checkpoints: NewestCheckpoints
) -> tuple[StagePlan, Checkpoint | None]:
    """When a stage begins, and the finished checkpoint it grows from (None for the first).

    Raises:
        ConfigError: the stage before is not finished.
    """
    stage = config.stages[index]
    if index == 0:
        return StagePlan(stage, 0), None
    previous = config.stages[index - 1]
    checkpoint = checkpoints.of(previous.resolution)
    nimg = checkpoint.state["progress"]["nimg"] if checkpoint else 0
    if checkpoint is None or not is_finished(config, previous, checkpoint.state):
        raise ConfigError(
            f"stage {stage.resolution} grows from stage {previous.resolution}, which is not "
            f"finished in {Run.of(config).stage(previous.resolution).folder}: train it first "
            f"(--stage {previous.resolution}, or no --stage for all)"
        )
    return StagePlan(stage, nimg), checkpoint


def is_finished(config: Config, stage: StageConfig, state: dict[str, Any]) -> bool:
    """Whether a stage was at its end, or ended early, when ``state`` was saved."""
    progress = state["progress"]
    shown = progress["nimg"] >= StagePlan(stage, state["start"]).end
    return shown or _out_of_patience(config, progress.get("num_worse", 0))


def _out_of_patience(config: Config, num_worse: int) -> bool:
    patience = config.eval.patience
    return patience is not None and num_worse >= patience


class StageState:
    """Networks, moving averages, optimizers and progress of one stage.

    Args:
        config: the whole run.
        index: which of its stages.
        data: what it is trained on; opened here unless given.
        checkpoints: of the run; looked for here unless given.

    Raises:
        ConfigError: the stage before is not finished, the checkpoint contradicts the config, or
            the shards do not fit.
    """

    def __init__(
        self,
        config: Config,
        index: int,
        data: Dataset | None = None,
        checkpoints: NewestCheckpoints | None = None,
    ) -> None:
        self.config = config
        self.stage = config.stages[index]
        self.place = Run.of(config).stage(self.stage.resolution)
        self.folder = self.place.folder
        self.device = process_group.device()
        set_fast_paths(config.engine, self.device)
        checkpoints = checkpoints or NewestCheckpoints(config.run)
        self.plan, previous = stage_plan(config, index, checkpoints)
        with rng.torch_seed(config.seed, f"init/{self.stage.resolution}"):
            cls = family_class(config.family)
            self.family: Family = cls(config, self.stage, self.device)
        self.family.start = self.plan.start
        for network in self.family.networks.values():
            set_memory_format(network, config.engine, self.device)
        if previous is not None:
            for name, network in self.family.networks.items():
                new = new_parameters_of(self.family, name)
                known = previous.tensors(name) if previous.holds(name) else {}
                grow(network, known, new, ConfigError)
        averaged = {name: self.family.networks[name] for name in self.family.ema_networks}
        self.ema = Ema(averaged, config.ema)
        if previous is not None:
            for name, network in self.ema.networks.items():
                new = new_parameters_of(self.family, name)
                grow(network, previous.tensors(f"{name}.ema"), new, ConfigError)
        self.data = open_data(config) if data is None else data
        self.family.begin(self.data)
        self.ema.take_buffers()  # what the networks have just learnt of the data
        self.engine: SingleEngine = make_engine(config, self.family, self.stage.lr, self.device)
        self.progress = Progress(nimg=self.plan.start, logged=self.plan.start)
        if previous is not None:
            self.progress.step = previous.state["progress"]["step"]
        self.logger_state: dict[str, Any] | None = None
        self.last_saved = self.plan.start
        self._resume(checkpoints.of(self.stage.resolution))
        self.set_fade()

    @property
    def finished(self) -> bool:
        """Whether every image of the stage was shown, or it ended early."""
        return self.progress.nimg >= self.plan.end or self.ended_early

    @property
    def ended_early(self) -> bool:
        """Whether held-out samples have been measured in vain for so long as the config allows."""
        return _out_of_patience(self.config, self.progress.num_worse)

    def set_fade(self) -> None:
        """Tell all copies of the networks how far the new block is faded in."""
        nimg = self.progress.nimg
        alpha, fading = self.plan.alpha(nimg), self.plan.fading(nimg)
        for networks in (self.family.networks, self.ema.networks):
            fade(self.family, networks, alpha, fading)

    @torch.no_grad()
    def sample(self, num: int) -> torch.Tensor:
        """The first ``num`` images of the run's seed, (N, 3, R, R) in [-1, 1] on the CPU."""
        return sample_in_parts(self.family, self.ema.networks, num, self.config.seed)

    @torch.no_grad()
    def probe(self) -> Health:
        """What the family finds in its samples; nothing if it does not probe them."""
        if not isinstance(self.family, Probes):
            return Health()
        return self.family.probe(self.ema.networks, self.progress.loss)

    def capture(self, logger_state: dict[str, Any]) -> Callable[[], None] | None:
        """Copy all that a checkpoint holds to host memory; every rank has to call it.

        Returns:
            What writes it and deletes the checkpoints that need not stay; None but on rank 0.
        """
        optimizers, rest = self.engine.state()
        if not process_group.is_main():
            return None
        tensors = {name: net.state_dict() for name, net in self.family.networks.items()}
        tensors |= {f"{name}.ema": net.state_dict() for name, net in self.ema.networks.items()}
        tensors = on_host(tensors | {"optim": optimizers})
        every = self.config.checkpoint.keep_every_kimg
        nimg = self.progress.nimg
        state = {
            "progress": asdict(self.progress),
            "start": self.plan.start,
            "keep": every is not None and due(self.last_saved, nimg, every),
            "best": self.progress.best is not None and self.progress.best_nimg == nimg,
            "engine": rest,
            "logger": logger_state,
            "data": data_fingerprint(self.data),
            "config": self.config.model_dump(mode="json"),
            "versions": versions(),
            "facts": facts_of(self.family),
        }
        self.last_saved = nimg
        parent, keep_last = self.place.checkpoints.folder, self.config.checkpoint.keep_last

        def write() -> None:
            save_checkpoint(parent, nimg, tensors, state)
            prune(parent, keep_last)

        return write

    def _resume(self, checkpoint: Checkpoint | None) -> None:
        """Take over the newest checkpoint of this stage, if there is one."""
        if checkpoint is None:
            if self.config.init_from is not None and self.stage is self.config.stages[0]:
                init_from(self.config.init_from, self.family, self.ema)
            return
        state = checkpoint.state
        if state["start"] != self.plan.start:
            raise ConfigError(
                f"{checkpoint.folder}: began at {state['start']} images, but the stage before now "
                f"ends at {self.plan.start}: it was trained further: {or_a_new_run(self.config)}"
            )
        _check_frozen(checkpoint, self.family)
        for name, network in self.family.networks.items():
            network.load_state_dict(checkpoint.tensors(name))
        for name, network in self.ema.networks.items():
            network.load_state_dict(checkpoint.tensors(f"{name}.ema"))
        self.engine.load_state(checkpoint.tensors("optim"), state["engine"])
        self.progress = Progress(**{"measuring_s": None, **state["progress"]})
        self.logger_state = state["logger"]
        self.last_saved = self.progress.nimg
        if process_group.is_main():
            log.info("resumed from %s", checkpoint.folder)


def _check_frozen(checkpoint: Checkpoint, family: Family) -> None:
    """Refuse frozen networks that differ from those a checkpoint was trained with.

    Raises:
        ConfigError: naming the key.
    """
    then = checkpoint.state["facts"].get("frozen", {})
    for key, sha256 in facts_of(family).get("frozen", {}).items():
        if then.get(key, sha256) != sha256:
            raise ConfigError(
                f"{key}: its weights differ from those that the checkpoint {checkpoint.folder} "
                f"was trained with: {or_a_new_run(family.config)}"
            )
