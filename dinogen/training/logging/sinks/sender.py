"""The process that sends a run to one sink: ``python -m ...sinks.sender RUN NAME PID``.

It follows the folder of the run, and is told nothing by the process that trains but how that ended.
What it has sent stands in ``RUN/logging/NAME.json``, and what the library prints in ``NAME.log``
beside it. It ends with the process PID, and sends nothing more if that was killed, even where a
library does not return.
"""

from __future__ import annotations

import json
import os
import re
import select
import signal
import sys
import threading
import time
import traceback
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dinogen.files import write_json
from dinogen.runs.files import read_object
from dinogen.runs.layout import checkpoint_nimg
from dinogen.runs.run import Run, Stage
from dinogen.training.logging.sinks.base import Event, SentSink
from dinogen.training.logging.sinks.registry import sink_class, sink_options
from dinogen.training.logging.sinks.summary import final_values, final_words
from shards.files import Locked, lock

POLL_SECONDS = 1.0
RETRY_SECONDS = 30.0
# for a library to close its files when the run was killed
LAST_SECONDS = 10
# exit code of a sender that has said what is missing
TOLD = 3

Say = Callable[[str, str], None]


class Sender:
    """Brings to a sink what checkpoints cover and it does not have.

    Args:
        run: the run; its config names the sink.
        name: of the sink.
        say: called with a level of ``logging`` and a message for the user.
    """

    def __init__(self, run: Run, name: str, say: Say) -> None:
        self.run, self.name, self.say = run, name, say
        self.path = run.sent_folder / f"{name}.json"
        self.sink: SentSink | None = None
        self.record: dict[str, Any] = {}
        self.covered: dict[int, int] | None = None
        self.failed_at: float | None = None

    @property
    def due(self) -> bool:
        """Whether there may be something to send, or an attempt that failed can be made again."""
        if self.failed_at is not None:
            return time.monotonic() - self.failed_at > RETRY_SECONDS
        try:
            return covered(self.run) != self.covered
        except OSError:
            return True  # which the attempt will report

    def send(self) -> bool:
        """Send all there is to send; False, after a warning, if that failed."""
        try:
            now = covered(self.run)
            sink = self.sink or self._open()
            events = events_between(self.run, self.record["sent"], now)
            for event in events:
                sink.write(event)
                self.record["sent"] = event.nimg
            if events:
                sink.flush()
                self._save()
            self._summarize(sink)
        except Exception as error:  # of a library; the run goes on
            self._failed(error)
            return False
        if self.failed_at is not None:
            self.say("info", f"{self.name}: works again")
        self.covered, self.failed_at = now, None
        return True

    def close(self, status: str) -> None:
        """End the sink's run as ``done``, ``stopped`` or ``failed``."""
        sink, self.sink = self.sink, None
        if sink is None:
            return
        try:
            sink.close(status)
        except Exception as error:
            self.say("warning", f"{self.name}: could not be closed: {_short(error)}")

    def _open(self) -> SentSink:
        self.record = {"sent": -1} | (read_object(self.path).value or {})
        cls = sink_class(self.name)
        assert issubclass(cls, SentSink)
        options = sink_options(self.name, self.run.config.sinks[self.name])
        sink = cls(options, self.run, self.record)
        try:
            there = sink.open()
            if there is not None:
                self.record["sent"] = there
        finally:
            self._save()  # with the id, which a server may know already
        self.sink = sink
        self.say("info", f"{self.name}: {_without_password(sink.address)}")
        return sink

    def _summarize(self, sink: SentSink) -> None:
        """Show the results of the newest finished stage, unless they are there already."""
        finished = [(stage, result) for stage in self.run.begun if (result := stage.result)]
        if not finished:
            return
        stage, result = finished[-1]
        values, words = final_values(stage, result), final_words(stage, result)
        found = {"values": {name: list(one) for name, one in values.items()}, "words": words}
        if self.record.get("summary") != found and result["nimg"] <= self.record["sent"]:
            sink.summarize(values, words)
            self.record["summary"] = found
            self._save()

    def _save(self) -> None:
        write_json(self.path, self.record)

    def _failed(self, error: Exception) -> None:
        if self.failed_at is None:
            self.say(
                "warning",
                f"{self.name}: NOTHING CAN BE SENT: {_short(error)}; training goes on, and it is "
                f"tried again every {RETRY_SECONDS:g} s ({self.path.with_suffix('.log')})",
            )
        print(f"{self.name}: {error!r}", flush=True)
        self.failed_at = time.monotonic()
        self.close("failed")


def covered(run: Run) -> dict[int, int]:
    """Images seen at the newest checkpoint of each stage that has one, by resolution."""
    found = {stage.resolution: stage.checkpoints.nimg for stage in run.begun}
    return {resolution: nimg[-1] for resolution, nimg in found.items() if nimg}


def events_between(run: Run, after: int, until: dict[int, int]) -> list[Event]:
    """The events of a run, as its files tell them, by ascending ``nimg``.

    Args:
        run: the run.
        after: only events after this many images.
        until: and for each stage, by resolution, up to as many as these.
    """
    events: list[Event] = []
    for stage in run.begun:
        last = until.get(stage.resolution, 0)
        if last > after:
            events += _events(stage, after, last)
    return sorted(events, key=lambda event: event.nimg)


def _events(stage: Stage, after: int, last: int) -> list[Event]:
    """The events of one stage from ``after`` to ``last``, merged by ``nimg``."""
    parts: defaultdict[int, dict[str, Any]] = defaultdict(dict)
    for line in stage.stats:
        values = {name: value for name, value in line.items() if name not in ("nimg", "stage")}
        parts[line["nimg"]]["values"] = values
    for path in stage.samples_folder.glob("*.png"):
        if (nimg := checkpoint_nimg(path.stem)) is not None:
            parts[nimg]["images"] = {"samples": path}
    for line in stage.health:
        warnings = tuple(line.get("warnings") or ())
        parts[line["nimg"]] |= {"health": line["status"], "warnings": warnings}
    return [
        Event(nimg, stage.resolution, **part)
        for nimg, part in parts.items()
        if after < nimg <= last
    ]


def _without_password(text: str) -> str:
    """Addresses without what is before an @ in them."""
    return re.sub(r"//[^/@\s]*@", "//", text)


def _short(error: Exception) -> str:
    words = " ".join(_without_password(str(error)).split()) or type(error).__name__
    return words if len(words) <= 300 else f"{words[:300]} ..."


class _Parent(threading.Thread):
    """Watches the process that trains; once that is gone, this one ends too, whatever it waits for.

    A library may wait for its server for ever, and the next run of the folder would wait for it.

    Args:
        pid: of the process that trains.

    Attributes:
        status: how that ended: ``done`` and so on by its own word, or ``killed``.
        ended: set when it has.
    """

    def __init__(self, pid: int) -> None:
        super().__init__(name="parent", daemon=True)
        self.pid = pid
        self.status: str | None = None
        self.ended = threading.Event()

    def run(self) -> None:
        """Wait for its word on standard input, and then for its end."""
        # A process forked from it may still hold the other end of standard input.
        while self.status is None and os.getppid() == self.pid:
            ready, _, _ = select.select([0], [], [], POLL_SECONDS)
            if ready:
                self.status = os.read(0, 64).decode().strip() or "killed"
        self.status = self.status or "killed"
        self.ended.set()
        while self.status != "killed" and os.getppid() == self.pid:
            time.sleep(POLL_SECONDS)
        time.sleep(LAST_SECONDS)
        os._exit(1)


@contextmanager
def _locked(run: Run, name: str, say: Say) -> Iterator[None]:
    """Wait until no other process sends: that of a run before, which was killed, soon ends."""
    run.sent_folder.mkdir(parents=True, exist_ok=True)
    path = run.sent_folder / f"{name}.lock"
    with path.open("w") as file:
        if lock(file, path, shared=False, wait=False) is Locked.BUSY:
            say("info", f"{name}: another process still sends this run: waiting for its end")
            lock(file, path, shared=False, wait=True)
        yield


@contextmanager
def _output_to(path: Path) -> Iterator[None]:
    """Send what libraries print to a file; to nowhere if there is no space for one."""
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    except OSError:
        descriptor = os.open(os.devnull, os.O_WRONLY)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)
    yield


def main(run: Run, name: str, pid: int) -> int:
    """Send until the process ``pid`` has ended, or says that it has trained enough."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)  # meant for the process that trains
    os.nice(10)
    messages = os.fdopen(os.dup(1), "w", encoding="utf-8")

    def say(level: str, text: str) -> None:
        try:
            print(json.dumps({"level": level, "text": text}), file=messages, flush=True)
        except OSError:
            print(text, flush=True)  # nobody reads it any more: to the log

    parent = _Parent(pid)
    parent.start()
    sender = Sender(run, name, say)
    try:
        with _locked(run, name, say), _output_to(sender.path.with_suffix(".log")):
            return _follow(sender, parent)
    except Exception as error:
        traceback.print_exc()  # into the log, if there is one
        say(
            "warning",
            f"{name}: NOTHING MORE IS SENT: {type(error).__name__}: {_short(error)}; without that, "
            "the same command sends the rest",
        )
        return TOLD


def _follow(sender: Sender, parent: _Parent) -> int:
    """Send until the process that trains has ended; returns the exit code."""
    while True:
        if sender.due:
            sender.send()
        if parent.ended.wait(POLL_SECONDS):
            break
    assert parent.status is not None
    if parent.status == "killed":
        sender.close("stopped")
        return 1
    # Another attempt where all failed would only keep the run waiting.
    sent = sender.failed_at is None and sender.send()
    if not sent:
        last = sender.record.get("sent", -1)
        what = "all that was logged" if last < 0 else f"what was logged after {last} images"
        sender.say(
            "warning",
            f"{sender.name}: NOT SENT: {what}; the same command, or dinogen evaluate, sends it",
        )
    sender.close(parent.status)
    return 0 if sent else TOLD


if __name__ == "__main__":
    sys.exit(main(Run(sys.argv[1]), sys.argv[2], int(sys.argv[3])))
