"""Steps on the GPU of this machine, measured; on a CPU the same without what only a GPU knows."""

from __future__ import annotations

import statistics
import time
import warnings
from bisect import bisect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils.flop_counter import FlopCounterMode

from dinogen.config import Config
from train_steps.counts import Counts, Gpu
from train_steps.lines import Lines
from train_steps.runner import LEFT, ROOT, Runner

WARM_UP, REPEATS = 3, 5
_RANGE = "part/"
_SYNC = "called a synchronizing CUDA operation"


class _Parts:
    """Parts of a step as ranges of the profiler, with the waits and FLOPs in each."""

    def __init__(self) -> None:
        self.counts: dict[str, Counts] = {}
        self.flops: FlopCounterMode | None = None
        self._lines = Lines(ROOT)
        self._part = LEFT
        self._before = 0
        self._range: Any = None

    def enter(self, part: str) -> str:
        """What runs from now on belongs to ``part``; returns the part before."""
        before = self._part
        self._leave()
        self._part = part
        self._range = record_function(_RANGE + part)
        self._range.__enter__()
        return before

    @contextmanager
    def step(self) -> Iterator[None]:
        """Context of a step whose parts are told apart."""
        self._before = 0
        self.enter(LEFT)
        try:
            yield
        finally:
            self._leave()

    def of(self, part: str) -> Counts:
        """Counts of a part."""
        return self.counts.setdefault(part, Counts())

    def warned(self, message: Warning | str, *args: Any, **more: Any) -> None:
        """In place of ``warnings.showwarning``: the host waits for the device."""
        if _SYNC in str(message):
            self.of(self._part).syncs[self._lines.here("waits")] += 1

    def _leave(self) -> None:
        if self.flops is not None:
            now = self.flops.get_total_flops()
            self.of(self._part).flops += now - self._before
            self._before = now
        if self._range is not None:
            self._range.__exit__(None, None, None)
            self._range = None


def measure(
    config: Config, stage: int, steps: Sequence[int], gpu: Gpu, trace: Path | None = None
) -> Iterator[tuple[dict[str, Counts], float]]:
    """Measure steps: repeated by the clock, once in the profiler, once for their FLOPs.

    Args:
        config: with data.
        stage: its number; from the end if negative.
        steps: numbers of steps, which say what is due in them.
        gpu: whose peak rate the FLOPs are compared with.
        trace: folder for a trace of each step, which TensorBoard and Perfetto show.

    Yields:
        What each step costs, by its parts, and its seconds by the clock.
    """
    on_gpu = torch.cuda.is_available()
    parts = _Parts()
    with Runner(config, stage, parts.enter) as runner:
        half = runner.engine.precision != "fp32"
        for number in [max(steps)] * WARM_UP + list(steps):
            with parts.step():
                runner.step(number)
        for number in steps:
            parts.counts = {}
            if on_gpu:
                torch.cuda.reset_peak_memory_stats()
            seconds = statistics.median(_seconds(runner, parts, number) for _ in range(REPEATS))
            if on_gpu:
                parts.of(LEFT).peak = torch.cuda.max_memory_allocated()
            _profile(runner, parts, number, trace)
            with FlopCounterMode(display=False) as parts.flops, parts.step():
                runner.step(number)
            parts.flops = None
            for counts in parts.counts.values():
                counts.at_peak = counts.flops / (gpu.half if half else gpu.tf32)
            yield parts.counts, seconds


def _seconds(runner: Runner, parts: _Parts, number: int) -> float:
    """Seconds of a step, until the device is done with it."""
    if not torch.cuda.is_available():
        began = time.perf_counter()
        with parts.step():
            runner.step(number)
        return time.perf_counter() - began
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    first.record()
    with parts.step():
        runner.step(number)
    last.record()
    last.synchronize()
    return first.elapsed_time(last) / 1000


def _profile(runner: Runner, parts: _Parts, number: int, trace: Path | None) -> None:
    """Kernels, copies and waits of a step."""
    on_gpu = torch.cuda.is_available()
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_gpu
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = parts.warned
        with profile(activities=activities) as profiler:
            if on_gpu:
                torch.cuda.set_sync_debug_mode("warn")
            with parts.step():
                runner.step(number)
            if on_gpu:
                torch.cuda.set_sync_debug_mode("default")
                torch.cuda.synchronize()
    if trace is not None:
        trace.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(str(trace / f"step{number}.pt.trace.json"))
    events = [event for event in profiler.events() if event.device_type == DeviceType.CPU]
    ranges = sorted(
        (event.time_range.start, event.name.removeprefix(_RANGE))
        for event in events
        if event.name.startswith(_RANGE)
    )
    starts = [start for start, _ in ranges]
    for event in events:
        if not event.kernels:
            continue
        # Operators of a backward run in another thread, while the main one waits in its part.
        counts = parts.of(ranges[max(0, bisect(starts, event.time_range.start) - 1)][1])
        for kernel in event.kernels:
            counts.launches += 1
            counts.seconds += kernel.duration / 1e6
            if kernel.name.startswith("Memcpy HtoD") and "Pageable" in kernel.name:
                counts.blocking[f"{event.name}: {kernel.name}"] += 1
            elif kernel.name.startswith(("Memcpy HtoD", "Memcpy DtoH")):
                counts.copies[f"{event.name}: {kernel.name}"] += 1
