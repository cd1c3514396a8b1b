"""The one training loop: a stage from its first image to its last checkpoint."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from dinogen.batch import Batch, Scalars
from dinogen.config import Config, due
from dinogen.distributed import process_group, rng
from dinogen.errors import UserError
from dinogen.evaluation.validate import Validator
from dinogen.families.abilities import FollowsSteps, Probes, Remembers, constants_of
from dinogen.families.base import Health, Phase
from dinogen.runs.layout import checkpoint_name
from dinogen.training.checkpointing.checkpoint import Saver
from dinogen.training.dataloading import Dataloader, augment
from dinogen.training.engines.base import Update, num_micros, split
from dinogen.training.logging.artifacts import save_samples
from dinogen.training.logging.begin import ProgressLine
from dinogen.training.logging.logger import Logger
from dinogen.training.logging.mfu import Mfu
from dinogen.training.logging.profile import Profile
from dinogen.training.logging.sinks.tensorboard import chart_layout
from dinogen.training.state import StageState
from dinogen.training.stop import Steps, StopFlag
from dinogen.transfer import Arrivals, Kept

log = logging.getLogger(__name__)

# fp16 leaves out an update now and then; this many in a row are a sign that the weights blew up.
UNSOUND_AFTER = 3


class TrainingError(UserError):
    """The run cannot go on; the message says what to try."""


@dataclass
class Window:
    """Wall-clock measurements since the last log line."""

    began: float
    images: int = 0
    waited: float = 0.0
    saving: float = 0.0


class Trainer:
    """Runs the phases of a family, stage by stage alike; it knows no family.

    Args:
        state: the stage's networks, optimizers, averages and progress, fresh or resumed.
        stop: set by stop signals.
        later: number of images of the stages that follow, for the time that is left.
    """

    def __init__(self, state: StageState, stop: StopFlag, later: int = 0) -> None:
        self.state = state
        self.config: Config = state.config
        self.family, self.engine, self.progress = state.family, state.engine, state.progress
        self.plan, self.stage = state.plan, state.plan.stage
        self.main_loss = self.family.main_loss
        self.num_micros = num_micros(
            self.stage.batch, process_group.world_size(), self.config.engine.micro_batch
        )
        self.logger = Logger(
            state.place if process_group.is_main() else None,
            self.stage.resolution,
            self.engine.device,
        )
        self.profile = Profile(
            self.config.log.profile, state.folder if process_group.is_main() else None
        )
        compiled = self.config.engine.compile
        self.mfu = Mfu(self.family.phases, self.engine.device, self.engine.precision, compiled)
        self.saver = Saver()
        self.validator = Validator(state)
        self.stop = stop
        self.later = later
        self.num_nonfinite: dict[str, int] = {}
        self.together = rng.Together()
        self.arrivals: Arrivals[int] = Arrivals(self.engine.device)
        # A GPU has the next step queued while the host learns what became of this one.
        self.lag = 1 if self.engine.device.type == "cuda" else 0
        # Asked once: isinstance compares with every member of the protocol.
        self.remembers = self.family if isinstance(self.family, Remembers) else None
        self.follows = self.family if isinstance(self.family, FollowsSteps) else None
        self.kept = Kept(self.family.networks)
        self.fading: bool | None = None
        self.num_skipped_before = state.progress.num_skipped
        self.num_skipped_here = 0

    def run(self) -> None:
        """Train to the end of the stage.

        Raises:
            Stopped: a signal arrived; a checkpoint was saved.
            TrainingError: too many updates in a row were not finite.
            SaveError: a checkpoint could not be written.
        """
        progress = self.progress
        charts = chart_layout(self.family, self.config)
        self.logger.start(progress.nimg, self.state.logger_state, charts)
        if self.engine.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.engine.device)
        line = ProgressLine(
            f"stage {self.state.place.name}",
            self.plan.start,
            self.plan.end,
            process_group.is_main(),
            self.later,
        )
        num_steps = math.ceil((self.plan.end - progress.nimg) / self.stage.batch)
        dataloader = Dataloader(self.state)
        try:
            with dataloader, Steps(self.stop, dataloader, num_steps) as steps:
                self.counted_until = time.monotonic()
                began = progress.nimg
                line.begin(began)
                if self.config.init_from is not None and began == 0:
                    # what it starts from, to compare with the source and with later grids
                    with self._measuring():
                        self._draw()
                self.window = Window(time.monotonic())
                while not self.state.finished:
                    before = time.monotonic()
                    loaded = steps.next()
                    self.window.waited += time.monotonic() - before
                    if loaded is None:
                        self._settle()
                        if self._unsound:
                            raise self._blown_up("stopped while updates were not finite,")
                        if self.now > began:
                            with self.stop.saving():
                                self.save()
                                self._saved()
                        raise self.stop.error(f"at {self.now} images")
                    self.num_skipped_here = loaded.num_skipped
                    self._prepare_engine()
                    with self.profile.step(self.now), self.mfu.step(progress.step):
                        self.train_step(loaded.batch)
                    line.step(self.now)
                    self._after_step(line)
                    self.saver.check()
                self._saved()
        finally:
            line.close()
            self.profile.close()
            self.saver.close()
            self.logger.close()

    @property
    def now(self) -> int:
        """Images shown so far."""
        return self.progress.nimg

    def train_step(self, batch: Batch) -> None:
        """All due phases on one global batch, of which this rank holds its part.

        Between two log lines nothing here waits for the device; what became of a step's updates is
        read when the next one is queued.
        """
        micros = split(batch, self.num_micros, self.engine.device)
        due = [phase for phase in self.family.phases if phase.due(self.progress.step)]
        kind = tuple(phase.name for phase in due)
        with self.together.step(kind, [micro["position"] for micro, _ in micros]):
            for micro, _ in micros:
                micro.update(
                    augment(micro, self.config.seed, self.config.augment, self.engine.device)
                )
            norms = {phase.name: self._update(phase, micros).grad_norm for phase in due}
        self.arrivals.send(self.now, norms)
        self._settle(self.lag)
        self.progress.step += 1
        self.progress.nimg += self.stage.batch
        self.window.images += self.stage.batch
        # What is sampled, measured and saved now is the network at this point of the clock.
        self.state.set_fade()
        if self.follows is not None:
            self.follows.after_step(self.progress.nimg)
        self.state.ema.update(self.stage.batch, self.progress.nimg - self.plan.start)

    def _update(self, phase: Phase, micros: Sequence[tuple[Batch, int]]) -> Update:
        """One phase: losses and gradients of all microbatches, then the optimizer step."""
        self.profile.phase(phase.name)
        remembered: Scalars = {}
        self.engine.before(phase, micros)
        for i, (micro, num_samples) in enumerate(micros):
            losses, report = self.engine.losses(phase, micro, last=i == len(micros) - 1)
            weight = num_samples / self.stage.batch
            total = self.engine.backward(phase, losses, weight)
            scalars = {f"{phase.name}/{k}": v for k, v in (losses | report).items() if not v.ndim}
            if phase.name == self.main_loss:
                scalars["loss"] = total
            self.logger.add(phase.name, scalars, weight)
            for name in phase.remembered:
                part = report[name].detach().float() * weight
                remembered[name] = remembered[name] + part if i else part
        update = self.engine.step(phase)
        if self.remembers is not None and remembered:
            means = {k: process_group.all_reduce_sum(v) for k, v in sorted(remembered.items())}
            with self.kept.unless(update.applied):
                self.remembers.remember(phase.name, means)
        return update

    def _settle(self, lag: int = 0) -> None:
        """Take in what became of the updates of all steps but the last ``lag``."""
        while len(self.arrivals) > lag:
            nimg, norms = self.arrivals.receive()
            for phase, norm in norms.items():
                # Every rank has the same: a step weighs as much on any number of ranks.
                share = 1.0 / process_group.world_size()
                self.logger.add_number(f"{phase}/grad_norm", norm, share)
                self._guard(math.isfinite(norm), phase, nimg)

    def save(self) -> None:
        """Begin a checkpoint, unless the weights have blown up; every rank has to call it.

        Training goes on while a thread of rank 0 writes it.
        """
        self._settle()
        if self._unsound:
            log.warning("at %d images: not saved, for the updates are not finite", self.now)
            return
        before = time.monotonic()
        self._count()
        write = self.state.capture(self.logger.state())
        if write is not None:

            def synced() -> None:
                self.logger.sync()
                write()

            self.saver.submit(self.state.place.checkpoints.folder, synced)
        self.window.saving += time.monotonic() - before

    def _saved(self) -> None:
        """Wait until the checkpoint on its way is on disk; every rank has to call it."""
        with process_group.rank_zero_section():
            self.saver.wait()

    @property
    def _unsound(self) -> bool:
        """Whether the weights have blown up, as the updates left out in a row tell."""
        return max(self.num_nonfinite.values(), default=0) >= UNSOUND_AFTER

    def _prepare_engine(self) -> None:
        """What trains from here on, which changes where the fade-in ends, and how fast."""
        fading = self.plan.fading(self.now)
        if fading != self.fading:
            self.fading = fading
            self.engine.prepare()
        self.engine.set_lr(self.plan.lr_factor(self.now))

    def _guard(self, applied: bool, phase: str, nimg: int) -> None:
        """Count updates in a row that were not finite, and end the run after too many."""
        num = self.num_nonfinite[phase] = 0 if applied else self.num_nonfinite.get(phase, 0) + 1
        if not num:
            return
        limit = self.config.engine.max_nonfinite
        log.warning(
            "phase %s at %d images: loss or gradient is not finite, the update is left out (%d in "
            "a row, %d end the run)",
            phase,
            nimg,
            num,
            limit,
        )
        if num >= limit:
            raise self._blown_up(f"{limit} updates in a row were not finite ({phase})")

    def _blown_up(self, what: str) -> TrainingError:
        return TrainingError(
            f"{what} at {self.now} images: give run: another folder with a lower lr of stage "
            f"{self.stage.resolution}, engine.clip_grad_norm, or engine.precision=fp32; nothing "
            f"was saved since: the same command goes on from the last checkpoint, if there is one"
        )

    def _after_step(self, line: ProgressLine) -> None:
        """Log, probe, draw samples and save, where the clock says so."""
        now = self.now
        passed = now - self.stage.batch
        measure = self.validator.due(passed, now)
        metric_values = {}
        if measure:
            self._count()
            with self._measuring():
                metric_values = self.validator.measure()
        last = self.state.finished
        if last:
            self._settle()
        if last and self._unsound:
            raise self._blown_up("the stage's last updates were not finite")
        every = self.config.log
        draw = last or due(passed, now, every.samples_kimg)
        images: Tensor | None = None
        if draw:
            with self._measuring():
                images = self._draw()
        # A family without a probe is probed in the samples that are drawn anyway.
        own_probe = isinstance(self.family, Probes)
        probe = last or due(passed, now, every.probe_kimg) or (draw and not own_probe)
        if probe or measure or due(passed, now, every.every_kimg):
            self._log(line, probe, images, metric_values)
        best = measure and self.progress.best_nimg == now
        if last or best or due(passed, now, self.config.checkpoint.every_kimg):
            self.save()

    def _draw(self) -> Tensor | None:
        """A grid of samples; every rank has to call it, and rank 0 gets the images."""
        images: Tensor | None = None
        with process_group.rank_zero_section() as mine:
            if mine:
                images = self.state.sample(self.config.log.num_samples)
                path = self.state.place.samples_folder / f"{checkpoint_name(self.now)}.png"
                save_samples(images, path)
                self.logger.write_images(self.now, {"samples": path})
        return images

    def _log(
        self,
        line: ProgressLine,
        probe: bool,
        images: Tensor | None,
        metric_values: dict[str, float],
    ) -> None:
        """One line of numbers, with held-out values; rank 0 probes samples."""
        self._settle()
        means = self.logger.flush()
        window, elapsed = self.window, max(time.monotonic() - self.window.began, 1e-9)
        self._count()
        self.progress.add_loss(means.get("loss", math.nan), every=self.config.log.every_kimg * 1000)
        values: dict[str, float | None] = {
            **means,
            **metric_values,
            **constants_of(self.family),
            "alpha": self.plan.alpha(self.progress.nimg - self.stage.batch),
            "lr": self.stage.lr * self.plan.lr_factor(self.progress.nimg - self.stage.batch),
            "images_per_s": window.images / elapsed,
            "training_s": self.progress.training_s,
            **self.mfu.since_last_line(elapsed),
            "data_wait": window.waited / elapsed,
            "save_share": window.saving / elapsed,
            "num_skipped": self.progress.num_skipped,
        }
        if self.engine.device.type == "cuda":
            values["peak_memory_mb"] = torch.cuda.max_memory_allocated() / 2**20
        if probe:
            with self._measuring(), process_group.rank_zero_section() as mine:
                if mine:
                    health = self.validator.probe(images)
                    if health is not None:
                        values |= health.scalars
                        self._warn(health)
        self.logger.write(self.progress.nimg, values)
        line.update(self.progress.nimg, values)
        self.window = Window(time.monotonic())

    @contextmanager
    def _measuring(self) -> Iterator[None]:
        """Counts the time inside as measuring: the steps of a run are compared without it."""
        began = time.monotonic()
        yield
        if self.progress.measuring_s is not None:
            self.progress.measuring_s += time.monotonic() - began

    def _count(self) -> None:
        """Bring time and skipped samples up to now; every rank has to call it."""
        now = time.monotonic()
        self.progress.seconds += now - self.counted_until
        self.counted_until = now
        skipped = process_group.all_reduce_sum(torch.tensor(self.num_skipped_here))
        self.progress.num_skipped = self.num_skipped_before + int(skipped)

    def _warn(self, health: Health) -> None:
        """Say loudly what the probe found; again only when the health changes."""
        if health.status != self.progress.health:
            for warning in health.warnings:
                log.warning("at %d images: %s", self.progress.nimg, warning)
            self.logger.write_health(self.progress.nimg, health.status, list(health.warnings))
        self.progress.health = health.status
        self.progress.warnings = list(health.warnings)
