"""Files behind a URL, fetched whole and checked, and `retry`, which repeats what failed.

Everything that fetches uses `retry`, `dinogen download` too.
"""

from __future__ import annotations

import email.utils
import errno
import itertools
import logging
import math
import random
import re
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from shards.errors import FetchError

log = logging.getLogger(__name__)
T = TypeVar("T")

# With waits of about 1, 2, 4 ... 60 s in between: about a minute and a half.
TRIES = 8
# A file with a wrong checksum this often is damaged at its source.
TRIES_OF_DAMAGED = 3
# Doubles with each try in a row; each wait is 50 to 100 % of it.
FIRST_WAIT_S = 1.0
LONGEST_WAIT_S = 60.0
# A server that asks for a longer pause is not waited for.
LONGEST_RETRY_AFTER_S = 3600.0
# A process that was asked to stop has some 30 s until it is killed: to get this batch, and to save.
HURRY_S = 5.0
HURRIED_WAIT_S = 0.5
# How soon a waiting thread notices that it has to stop.
_NAP_S = 0.05
# A connection that is silent for this long is broken; a transfer may take any time.
_SILENCE_S = 30
DISK_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS})
# Request timeout, too early, too many requests, and temporary server errors.
PASSING_STATUS = frozenset({408, 425, 429, 500, 502, 503, 504})
_DRIVERS = {
    "s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "http": "aiohttp",
    "https": "aiohttp", "ssh": "paramiko", "sftp": "paramiko", "abfs": "adlfs", "az": "adlfs",
}  # fmt: skip


class Damaged(Exception):
    """What arrived is not what was requested; the message says how it differs."""


class Stopped(FetchError):
    """The thread that waits for a file was told to stop."""


class _Thread(threading.local):
    stop: threading.Event | None = None


class _Process:
    hurried_at = math.inf


_thread = _Thread()
_process = _Process()
# Its own: user code may have seeded the global one.
_random = random.Random()


def hurry(asked: bool = True) -> None:
    """From now on give up within seconds on what cannot be fetched, as the process has to stop.

    May be called by a signal handler.

    Args:
        asked: False undoes it.
    """
    _process.hurried_at = min(_process.hurried_at, time.monotonic()) if asked else math.inf


def stop_at(event: threading.Event) -> None:
    """From now on this thread abandons whatever it is fetching once `event` is set."""
    _thread.stop = event


def nap() -> None:
    """Sleep a moment.

    Raises:
        Stopped: if this thread has to stop.
    """
    raise_if_stopped()
    time.sleep(_NAP_S)


def raise_if_stopped() -> None:
    """Raise `Stopped` if this thread has to stop."""
    if _thread.stop is not None and _thread.stop.is_set():
        raise Stopped("stopped while fetching")


def retry(
    once: Callable[[], T],
    what: str,
    delay: Callable[[Exception], float | None],
    *,
    tries: int = TRIES,
    progress: Callable[[], int] = lambda: 0,
    give_up: Callable[[Exception, str], Exception] = lambda error, tried: error,
    sleep: Callable[[float], object] | None = None,
    level: int = logging.WARNING,
) -> T:
    """Call `once` until it works, or until trying again makes no sense.

    Waits double from try to try and are randomised, so that clients that failed together do not
    return together. They end early when the thread or the process has to stop.

    Args:
        once: one try.
        what: what is being done, for the log.
        delay: seconds that the server asks to wait before the next try, 0 if it does not say; None
            if the error is permanent.
        tries: how many may fail in a row without progress.
        progress: a number that grows if a failed try still got something, such as bytes.
        give_up: makes the error to raise from the last one and from words such as
            "3 tries in 4 s".
        sleep: called with the seconds to wait, instead of waiting.
        level: of the line in the log before each wait; a wait that a server asked for and that
            is longer than any of ours is a warning.

    Raises:
        Stopped: this thread has to stop.
        Exception: what `give_up` returned; by default the last error of `once`.
    """
    began, furthest = time.monotonic(), progress()
    num_fruitless = num_damaged = 0
    for number in itertools.count(1):
        raise_if_stopped()
        try:
            return once()
        except Exception as error:
            # What fails while the process ends is not worth a log line.
            raise_if_stopped()
            num_damaged += isinstance(error, Damaged)
            reached = progress()
            num_fruitless = 0 if reached > furthest else num_fruitless + 1
            furthest = max(furthest, reached)
            asked = delay(error)
            late = time.monotonic() > _process.hurried_at + HURRY_S
            often = num_fruitless >= tries or num_damaged >= TRIES_OF_DAMAGED
            if asked is None or often or late:
                took = time.monotonic() - began
                tried = f"{number} tries in {took:.0f} s" if number > 1 else "one try"
                last = give_up(error, tried + (", asked to stop" if late else ""))
                if last is error:
                    raise
                raise last from error
            wait = min(FIRST_WAIT_S * 2 ** min(max(0, num_fruitless - 1), 30), LONGEST_WAIT_S)
            wait = max(wait * _random.uniform(0.5, 1.0), asked)
            if _process.hurried_at < math.inf:
                wait = min(wait, HURRIED_WAIT_S)
            log.log(
                max(level, logging.WARNING) if wait > LONGEST_WAIT_S else level,
                "%s: %s; trying again in %.1f s (try %d of %d)",
                what, describe(error), wait, num_fruitless + 1, tries,
            )  # fmt: skip
            (sleep or _wait)(wait)
    raise AssertionError("unreachable")


def _wait(seconds: float) -> None:
    until, before = time.monotonic() + seconds, _process.hurried_at
    while time.monotonic() < until and _process.hurried_at == before:
        nap()


def retry_after(value: str | None) -> float | None:
    """Seconds that a server asks to wait in its header Retry-After (RFC 9110, 10.2.3).

    Args:
        value: a number of seconds or a date.

    Returns:
        0 if the header is absent or makes no sense, None if it asks for more than
        `LONGEST_RETRY_AFTER_S`.
    """
    seconds = 0.0
    if value is not None and re.fullmatch(r"\s*[0-9]{1,18}\s*", value):
        seconds = float(value)
    elif value is not None:
        with suppress(ValueError, OverflowError):
            date = email.utils.parsedate_to_datetime(value)
            seconds = max(0.0, date.timestamp() - time.time())
    return seconds if seconds <= LONGEST_RETRY_AFTER_S else None


class Remote:
    """A folder behind a URL, on any file system that fsspec knows.

    Args:
        url: of the folder.

    Raises:
        FetchError: if its driver is not installed, or the URL makes no sense.
    """

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        self._system, root = _connect(self.url)
        self._root = root.rstrip("/")

    def read(self, name: str) -> bytes:
        """The content of a small file.

        Raises:
            FileNotFoundError: if it is not there.
            FetchError: if it cannot be fetched.
        """

        def once() -> bytes:
            data: bytes = self._system.cat_file(f"{self._root}/{name}")
            return data

        return self._retry(name, once)

    def fetch(self, name: str, path: Path, check: Callable[[Path], None]) -> None:
        """Write a file to `path`, where it may be seen half-written.

        Args:
            name: of the file.
            path: where it goes.
            check: raises `Damaged` if what lies at the path is not what it should be.

        Raises:
            FileNotFoundError: if it is not there.
            Damaged: if it was wrong each time.
            FetchError: if it cannot be fetched.
        """
        from fsspec.callbacks import Callback

        class Watch(Callback):  # type: ignore[misc]
            """Ends a transfer that is no longer needed."""

            stop = _thread.stop

            def relative_update(self, inc: int = 1) -> None:
                if self.stop is not None and self.stop.is_set():
                    raise Stopped("stopped while fetching a shard")

        def once() -> None:
            # The driver opens it again: what is wrong here is wrong with the disk.
            path.open("wb").close()
            self._system.get_file(f"{self._root}/{name}", str(path), callback=Watch())
            check(path)

        log.info("fetching %s/%s", self.url, name)
        self._retry(name, once)

    def _retry(self, name: str, once: Callable[[], T]) -> T:
        """`retry` with the errors of this folder."""

        def checked() -> T:
            try:
                return once()
            except Exception as error:
                # Some drivers check the server's checksum themselves.
                if "Checksum" in type(error).__name__:
                    raise Damaged(describe(error)) from error
                raise

        def give_up(error: Exception, tried: str) -> Exception:
            if isinstance(error, (FileNotFoundError, FetchError, Damaged)):
                return error
            what = f"{self.url}/{name}: {describe(error)}"
            if isinstance(error, OSError) and error.errno in DISK_FULL:
                return FetchError(
                    f"{what}: the cache's disk is full: free some space, limit the cache with "
                    f"data.cache_gb, or set data.cache_dir to another folder"
                )
            return FetchError(f"{what} ({tried}); {_remedy(error)}")

        return retry(checked, f"{self.url}/{name}", _delay, give_up=give_up)


def _connect(url: str) -> tuple[Any, str]:
    """The file system of a URL, and the path in it."""
    import fsspec

    protocol = url.partition("://")[0].rpartition("::")[2]
    try:
        # An instance kept from before may know another endpoint, other credentials.
        options = (
            {"skip_instance_cache": True}
            | _options(protocol)
            | fsspec.config.conf.get(protocol, {})
        )
        system, root = fsspec.core.url_to_fs(url, **options)
    except ImportError as error:
        driver = _DRIVERS.get(protocol)
        remedy = f"run `pip install {driver}`" if driver else str(error)
        raise FetchError(
            f"{url}: cannot be reached: {protocol}:// needs a driver that is not installed: "
            f"{remedy} (`pip install -e '.[remote]'` here installs those for s3, http and ssh)"
        ) from error
    except Exception as error:
        raise FetchError(f"{url}: cannot be reached: {describe(error)}") from error
    if protocol in ("s3", "s3a"):
        # Retries happen here, where they can be stopped and are logged.
        system.retries = 1
    return system, root


def _options(protocol: str) -> dict[str, Any]:
    """Options for a driver; fsspec's own configuration overrides them."""
    if protocol in ("http", "https"):
        import aiohttp

        timeout = aiohttp.ClientTimeout(total=None, sock_connect=_SILENCE_S, sock_read=_SILENCE_S)
        return {"client_kwargs": {"timeout": timeout, "trust_env": True}}
    if protocol in ("s3", "s3a"):
        config = {
            "retries": {"total_max_attempts": 1},
            "connect_timeout": _SILENCE_S,
            "read_timeout": _SILENCE_S,
        }
        # Several files are fetched at once; parts of one would be kept in memory.
        return {"config_kwargs": config, "max_concurrency": 1}
    return {}


def _status(error: BaseException) -> int | None:
    """HTTP status of a driver's error, if it has one."""
    for name in ("status", "code", "status_code"):
        value = getattr(error, name, None)
        if isinstance(value, int):
            return value
    # of huggingface_hub
    value = getattr(getattr(error, "response", None), "status_code", None)
    return value if isinstance(value, int) else None


def _delay(error: Exception) -> float | None:
    """Seconds until the same request may succeed, as the server asks; None if it never will."""
    status = _status(error)
    if status is not None and 400 <= status < 500 and status not in PASSING_STATUS:
        return None
    never = (FileNotFoundError, PermissionError, FetchError, ImportError, ValueError, TypeError)
    if isinstance(error, never) or "Credential" in type(error).__name__:
        return None
    if isinstance(error, OSError) and error.errno in DISK_FULL:
        return None
    headers = getattr(error, "headers", None)
    return retry_after(headers.get("Retry-After") if isinstance(headers, Mapping) else None)


def describe(error: Exception) -> str:
    """One line, with the kind of error where its text alone says little."""
    if isinstance(error, Damaged):
        return str(error)
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _remedy(error: Exception) -> str:
    status = _status(error)
    denied = isinstance(error, PermissionError) or status in (401, 403)
    if denied or "Credential" in type(error).__name__:
        return (
            "give credentials with read access (for s3 AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY, or AWS_PROFILE; for hf `hf auth login` or HF_TOKEN)"
        )
    return "check the server and the network, then run the same command again"
