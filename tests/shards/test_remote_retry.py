"""The engine of retries: what is tried again, how long it waits, when it gives up or stops."""

from __future__ import annotations

import email.utils
import errno
import logging
import threading
import time

import pytest

from shards.remote import download
from shards.remote.download import Damaged, Stopped, hurry, retry, retry_after, stop_at


class Passing(Exception):
    """May be gone the next time."""


def delay(error: Exception) -> float | None:
    if isinstance(error, Passing):
        return error.args[0] if error.args else 0.0
    return 0.0 if isinstance(error, Damaged) else None


class Script:
    """Raises what it is told, then returns 7."""

    def __init__(self, *errors: Exception) -> None:
        self.errors = list(errors)
        self.calls = 0
        self.waits: list[float] = []

    def __call__(self) -> int:
        self.calls += 1
        if self.errors:
            raise self.errors.pop(0)
        return 7

    def run(self, **options) -> int:
        return retry(self, "it", delay, sleep=self.waits.append, **options)


def test_waits_double_and_are_spread():
    script = Script(*(Passing() for _ in range(7)))
    assert script.run() == 7
    assert len(script.waits) == 7
    for wait, longest in zip(script.waits, (1, 2, 4, 8, 16, 32, 60), strict=True):
        assert longest / 2 <= wait <= longest


def test_it_gives_up():
    script = Script(*(Passing() for _ in range(9)))
    with pytest.raises(Passing):
        script.run()
    assert script.calls == download.TRIES
    for error in (PermissionError("no"), OSError(errno.ENOSPC, "full"), KeyboardInterrupt()):
        script = Script(error)
        with pytest.raises(type(error)):
            script.run()
        assert script.calls == 1
    script = Script(*(Damaged("other bytes") for _ in range(9)))
    with pytest.raises(Damaged):
        script.run()
    assert script.calls == download.TRIES_OF_DAMAGED


def test_the_last_error_can_be_told_in_other_words():
    script = Script(Passing(), Passing(), Passing())
    with pytest.raises(ValueError, match=r"^3 tries in 0 s$") as told:
        script.run(tries=3, give_up=lambda error, tried: ValueError(tried))
    assert isinstance(told.value.__cause__, Passing)


def test_progress_counts_as_success():
    script = Script(*(Passing() for _ in range(50)))
    assert script.run(tries=1, progress=lambda: script.calls) == 7
    script = Script(*(Passing() for _ in range(50)))
    with pytest.raises(Passing):
        script.run(tries=3, progress=lambda: min(script.calls, 10))
    assert script.calls == 13


def test_a_server_may_ask_for_a_longer_wait(caplog):
    caplog.set_level(logging.DEBUG)
    script = Script(Passing(100.0), Passing(0.0))
    assert script.run(level=logging.DEBUG) == 7
    assert script.waits[0] == 100
    assert script.waits[1] <= 2
    # that nothing moves for so long is said, even where single tries are not worth a line
    assert [record.levelname for record in caplog.records] == ["WARNING", "DEBUG"]
    assert "trying again in 100.0 s (try 2 of 8)" in caplog.messages[0]


def test_retry_after():
    now = email.utils.formatdate(time.time() + 100, usegmt=True)
    assert 90 < retry_after(now) <= 100
    assert [retry_after(value) for value in (None, "7", " 3600 ", "3601")] == [0, 7, 3600, None]
    past = email.utils.formatdate(time.time() - 100)
    for value in (past, "", "soon", "-5", "1e3", "²", "9" * 5000, "Mon, 99 Foo 2030"):
        assert retry_after(value) == 0


def test_drivers_headers_count():
    class Busy(Exception):
        status = 429
        headers = {"Retry-After": "30"}  # noqa: RUF012

    assert download._delay(Busy()) == 30
    Busy.status = 404
    assert download._delay(Busy()) is None
    assert download._delay(ConnectionError()) == 0


def test_a_thread_that_is_to_stop_does(caplog):
    stop = threading.Event()
    outcome: list[object] = []

    def work() -> None:
        stop_at(stop)
        began = time.monotonic()
        try:
            retry(Script(*(Passing(50.0) for _ in range(5))), "it", delay)
        except Stopped as error:
            outcome.extend([error, time.monotonic() - began])

    thread = threading.Thread(target=work)
    thread.start()
    while "trying again" not in caplog.text:
        time.sleep(0.01)
    stop.set()
    thread.join(60)
    assert isinstance(outcome[0], Stopped)
    assert outcome[1] < 40  # one wait would take 50


def test_a_process_that_is_to_stop_waits_little(monkeypatch):
    monkeypatch.setattr(download, "HURRY_S", 0.0)
    try:
        hurry()
        time.sleep(0.01)
        with pytest.raises(ValueError, match="one try, asked to stop"):
            Script(Passing(50.0)).run(give_up=lambda error, tried: ValueError(tried))
        monkeypatch.setattr(download, "HURRY_S", 60.0)
        script = Script(Passing(50.0))
        assert script.run() == 7
        assert script.waits[0] <= download.HURRIED_WAIT_S
    finally:
        hurry(False)
