"""Events and streams of the fake device: nothing runs on them, but waiting for them is reported."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch


class Clock:
    """What events are compared with.

    Attributes:
        step: number of the step that runs; an event belongs to the step that recorded it.
        waited: called with what the host waits for, and whether it was queued in this very step.
    """

    step = 0
    waited: Callable[[str, bool], None] = staticmethod(lambda what, queued_now: None)


class FakeStream:
    """Stands for ``torch.cuda.Stream``."""

    def __init__(self, device: Any = None, priority: int = 0, **more: Any) -> None:
        self.device = torch.device("cuda", 0)
        self.priority = priority
        self.cuda_stream = self.stream_id = id(self)

    def synchronize(self) -> None:
        """Wait for all that was queued, up to now."""
        Clock.waited("Stream.synchronize", True)

    def query(self) -> bool:
        """Whether all of it is done; never waits."""
        return True

    def record_event(self, event: FakeEvent | None = None) -> FakeEvent:
        """Record an event, a new one unless given."""
        event = event or FakeEvent()
        event.record(self)
        return event

    def wait_event(self, event: FakeEvent) -> None:
        """Let what is queued from now on wait; the host does not."""

    def wait_stream(self, stream: FakeStream) -> None:
        """As :meth:`wait_event`, for all that is queued on a stream."""


class FakeEvent:
    """Stands for ``torch.cuda.Event``."""

    def __init__(self, *args: Any, **more: Any) -> None:
        self.recorded_at: int | None = None

    def record(self, stream: FakeStream | None = None) -> None:
        """Queue it behind what was queued so far."""
        self.recorded_at = Clock.step

    def wait(self, stream: FakeStream | None = None) -> None:
        """Let a stream wait for it; the host does not."""

    def query(self) -> bool:
        """Whether it has happened; never waits."""
        return True

    def synchronize(self) -> None:
        """Wait for it. One that was never recorded has happened."""
        if self.recorded_at is not None:
            Clock.waited("Event.synchronize", self.recorded_at == Clock.step)

    def elapsed_time(self, end: FakeEvent) -> float:
        """Nothing takes time here."""
        return 0.0


def install() -> None:
    """Replace those of ``torch.cuda``, for the rest of the process."""
    default = FakeStream()
    running = [default]

    @contextlib.contextmanager
    def stream(chosen: FakeStream | None) -> Iterator[None]:
        running.append(chosen or running[-1])
        try:
            yield
        finally:
            running.pop()

    def set_stream(chosen: FakeStream) -> None:
        running[-1] = chosen

    torch.cuda.Stream = FakeStream
    torch.cuda.Event = FakeEvent
    torch.cuda.stream = stream
    torch.cuda.StreamContext = stream
    torch.cuda.set_stream = set_stream
    torch.cuda.current_stream = lambda device=None: running[-1]
    torch.cuda.default_stream = lambda device=None: default
    torch.cuda.synchronize = lambda device=None: Clock.waited("torch.cuda.synchronize", True)
