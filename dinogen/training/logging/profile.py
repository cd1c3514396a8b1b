"""A trace of a few training steps, for TensorBoard's profiler, chrome://tracing and Perfetto."""

from __future__ import annotations

import contextlib
import logging
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from dinogen.config import ProfileConfig
from dinogen.files import write_bytes
from dinogen.runs.layout import TENSORBOARD, checkpoint_name

log = logging.getLogger(__name__)

# The ending by which TensorBoard's profiler plugin finds traces.
SUFFIX = ".pt.trace.json"


class Profile:
    """Traces the first steps at or after ``log.profile.at_kimg``, once in a run.

    A trace that is there already is not made again, also where a run is resumed from before it.
    Outside of the trace a step costs two comparisons.

    Args:
        config: what is traced; None for nothing.
        folder: of the stage; its TensorBoard folder takes the trace. None on ranks that write
            nothing.
    """

    def __init__(self, config: ProfileConfig | None, folder: Path | None) -> None:
        self.config, self.folder = config, folder
        self._profile: profile | None = None
        self._num_steps = 0
        self._phases = contextlib.ExitStack()
        if config is not None and folder is not None:
            self._at = round(config.at_kimg * 1000)
            name = f"steps_at_{checkpoint_name(self._at)}{SUFFIX}"
            self._path = folder / TENSORBOARD / name
            # An earlier stage may have written it.
            if any(folder.parent.glob(f"*/{TENSORBOARD}/{name}")):
                self.config = None

    @contextlib.contextmanager
    def step(self, nimg: int) -> Iterator[None]:
        """Around a step; ``nimg`` images were shown before it, since the first stage began."""
        if self.config is None or self.folder is None or nimg < self._at:
            yield
            return
        if self._profile is None:
            activities = [ProfilerActivity.CPU]
            if torch.cuda.is_available():
                activities.append(ProfilerActivity.CUDA)
            self._profile = profile(activities=activities)
            self._profile.start()
        # By marks of this name TensorBoard tells steps apart.
        with record_function(f"ProfilerStep#{self._num_steps}"), self._phases:
            yield
        self._num_steps += 1
        if self._num_steps == self.config.steps:
            self.close()

    def phase(self, name: str) -> None:
        """Mark what follows, to the next call or the end of the step, as this phase."""
        if self._profile is not None:
            self._phases.close()
            self._phases.enter_context(record_function(name))

    def close(self) -> None:
        """Write the trace of the steps so far, if there are any, and trace no more."""
        if self._profile is None:
            return
        self._profile.stop()
        if self._num_steps:
            with tempfile.TemporaryDirectory() as place:
                path = Path(place) / self._path.name
                self._profile.export_chrome_trace(str(path))
                write_bytes(self._path, path.read_bytes())
            log.info(
                "%d steps were traced: %s; TensorBoard (with torch-tb-profiler), chrome://tracing "
                "and ui.perfetto.dev open it",
                self._num_steps,
                self._path,
            )
        self._profile = self.config = None
