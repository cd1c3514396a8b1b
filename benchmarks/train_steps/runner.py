"""A stage that is ready to train, and its steps one by one, cut into phases."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import dinogen
from dinogen.config import Config, StagePlan
from dinogen.training import state as states
from dinogen.training.dataloading import Dataloader
from dinogen.training.state import StageState
from dinogen.training.stop import StopFlag
from dinogen.training.trainer import Trainer, Window
from train_steps.ranks import objects_arrive

ROOT = Path(dinogen.__file__).parents[1]
LEFT = "rest"  # the part of a step that belongs to no phase: batches, averages, the log


class Runner:
    """Trains single steps of a stage as ``dinogen train`` does.

    A stage behind the first begins with random weights.

    Args:
        config: with data, see ``train_steps.data``.
        stage: number of the stage; from the end if negative.
        enter: called with the name of the part that begins; returns that of the part before.
    """

    def __init__(self, config: Config, stage: int, enter: Callable[[str], str]) -> None:
        self.enter = enter
        index = stage % len(config.stages)
        fresh = (StagePlan(config.stages[index], 0), None)
        with objects_arrive(), mock.patch.object(states, "stage_plan", lambda *args: fresh):
            self.state = StageState(config, index)
        self.engine = self.state.engine
        self.trainer = Trainer(self.state, StopFlag())
        self.trainer.window = Window(time.monotonic())
        self.trainer.counted_until = self.trainer.window.began
        for name, part in (
            ("before", "before"),
            ("losses", "forward"),
            ("backward", "backward"),
            ("step", "update"),
        ):
            setattr(self.engine, name, self._marked(getattr(self.engine, name), part))
        # as in the loop of the trainer
        self.trainer.dataloader = Dataloader(self.state)
        self._batches = iter(self.trainer.dataloader)
        self.state.progress.nimg += round(1000 * self.state.stage.fade_kimg)
        self.trainer._prepare_engine()

    def __enter__(self) -> Runner:
        self.trainer.dataloader.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self.trainer.dataloader.__exit__(*error)
        self.trainer.saver.close()

    def step(self, number: int) -> None:
        """Train one step as if ``number`` steps had been made before."""
        self.state.progress.step = number
        loaded = next(self._batches)
        # earlier versions yield the batch itself
        self.trainer.train_step(getattr(loaded, "batch", loaded))

    def _marked(self, method: Callable[..., Any], part: str) -> Callable[..., Any]:
        """A method of the engine, during which its phase's part runs."""

        def run(phase: Any, *args: Any, **more: Any) -> Any:
            before = self.enter(f"{phase.name} {part}")
            try:
                return method(phase, *args, **more)
            finally:
                self.enter(before)

        return run
