"""Files behind a URL, fetched whole: tried again while a fault may pass, checked when there."""

from __future__ import annotations

import errno
import itertools
import logging
import math
import random
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from shards.errors import FetchError

log = logging.getLogger(__name__)
T = TypeVar("T")

# With waits of 0.5, 1, 2, 4 ... 30 s in between: about a minute and a half.
TRIES = 8
# What differs from the manifest this often differs where it came from.
TRIES_OF_DAMAGED = 3
FIRST_WAIT_S = 0.5
LONGEST_WAIT_S = 30.0
# Whoever was asked to stop has some 30 s until it is killed: to get this batch, and to save.
HURRY_S = 5.0
HURRIED_WAIT_S = 0.5
# How soon a thread that waits learns that it is to stop.
_NAP_S = 0.05
# Silence for so long is a broken connection; the length of a transfer is nobody's business.
_SILENCE_S = 30
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
_DRIVERS = {
    "s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "http": "aiohttp",
    "https": "aiohttp", "ssh": "paramiko", "sftp": "paramiko", "abfs": "adlfs", "az": "adlfs",
}  # fmt: skip


class Damaged(Exception):
    """What arrived is not what was asked for; the message says in which way."""


class Stopped(FetchError):
    """The thread that waits for a file was told to stop."""


class _Thread(threading.local):
    stop: threading.Event | None = None


class _Process:
    hurried_at = math.inf


_thread = _Thread()
_process = _Process()


def hurry(asked: bool = True) -> None:
    """From now on give up within seconds what cannot be fetched, as the process is to stop.

    May be called by a signal handler.

    Args:
        asked: False takes it back.
    """
    _process.hurried_at = min(_process.hurried_at, time.monotonic()) if asked else math.inf


def stop_at(event: threading.Event) -> None:
    """From now on this thread leaves whatever it fetches when `event` is set."""
    _thread.stop = event


def nap() -> None:
    """Sleep a moment.

    Raises:
        Stopped: if this thread is to stop.
    """
    _obey()
    time.sleep(_NAP_S)


def _obey() -> None:
    if _thread.stop is not None and _thread.stop.is_set():
        raise Stopped("stopped while waiting for a shard")


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
        # Its own: the global one may be part of somebody's reproducible order.
        self._random = random.Random()

    def read(self, name: str) -> bytes:
        """The content of a small file.

        Raises:
            FileNotFoundError: if it is not there.
            FetchError: if it cannot be had.
        """

        def once() -> bytes:
            data: bytes = self._system.cat_file(f"{self._root}/{name}")
            return data

        return self._insist(name, once)

    def fetch(self, name: str, path: Path, check: Callable[[Path], None]) -> None:
        """Write a file to `path`, where it may be seen half-written.

        Args:
            name: of the file.
            path: where it goes.
            check: raises `Damaged` if what lies at the path is not what it should be.

        Raises:
            FileNotFoundError: if it is not there.
            Damaged: if it was wrong each time.
            FetchError: if it cannot be had.
        """
        from fsspec.callbacks import Callback

        class Watch(Callback):  # type: ignore[misc]
            """Ends a transfer that nobody waits for any more."""

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
        self._insist(name, once)

    def _insist(self, name: str, once: Callable[[], T]) -> T:
        """Do it until it works, or there is no sense in trying again."""
        num_damaged = 0
        began = time.monotonic()
        for number in itertools.count(1):
            try:
                return once()
            except (FileNotFoundError, FetchError):
                raise
            except Exception as error:
                # What fails at the end of a process is not worth a line.
                _obey()
                # Some drivers look at a checksum of the server's themselves.
                damaged = isinstance(error, Damaged) or "Checksum" in type(error).__name__
                num_damaged += damaged
                what = f"{self.url}/{name}: {_describe(error)}"
                if isinstance(error, OSError) and error.errno in _DISK_FULL:
                    raise FetchError(
                        f"{what}: the cache is full: make room, set data.cache_gb to what it may "
                        f"take, or data.cache_dir to another folder"
                    ) from error
                if damaged and num_damaged == TRIES_OF_DAMAGED:
                    raise Damaged(_describe(error)) from error
                late = time.monotonic() > _process.hurried_at + HURRY_S
                if not _may_pass(error) or number == TRIES or late:
                    took = time.monotonic() - began
                    tries = f"{number} tries in {took:.0f} s" if number > 1 else "one try"
                    raise FetchError(
                        f"{what} ({tries}{', asked to stop' if late else ''}); {_mend(error)}"
                    ) from error
                wait = min(FIRST_WAIT_S * 2 ** (number - 1), LONGEST_WAIT_S)
                wait = min(wait, HURRIED_WAIT_S) if _process.hurried_at < math.inf else wait
                wait *= self._random.uniform(0.5, 1.5)
                log.warning(
                    "%s; trying again in %.1f s (try %d of %d)", what, wait, number + 1, TRIES
                )
                self._wait(wait)
        raise AssertionError("unreachable")

    @staticmethod
    def _wait(seconds: float) -> None:
        until, before = time.monotonic() + seconds, _process.hurried_at
        while time.monotonic() < until and _process.hurried_at == before:
            nap()


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
        mend = f"run `pip install {driver}`" if driver else str(error)
        raise FetchError(
            f"{url}: cannot be reached: {protocol}:// needs a driver that is not installed: {mend} "
            f"(`pip install -e '.[remote]'` here brings those of s3, http and ssh)"
        ) from error
    except Exception as error:
        raise FetchError(f"{url}: cannot be reached: {_describe(error)}") from error
    if protocol in ("s3", "s3a"):
        # It is tried again here, where it can be stopped and leaves a line in the log.
        system.retries = 1
    return system, root


def _options(protocol: str) -> dict[str, Any]:
    """What a driver has to be told; fsspec's own configuration goes over it."""
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
    return None


def _may_pass(error: Exception) -> bool:
    """Whether the same request may succeed later."""
    status = _status(error)
    if status is not None and 400 <= status < 500:
        # Request timeout, too early, too many requests.
        return status in (408, 425, 429)
    if isinstance(error, (PermissionError, ImportError, ValueError, TypeError)):
        return False
    return "Credential" not in type(error).__name__


def _describe(error: Exception) -> str:
    """One line, with the kind of error where its text alone says little."""
    if isinstance(error, Damaged):
        return str(error)
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _mend(error: Exception) -> str:
    status = _status(error)
    denied = isinstance(error, PermissionError) or status in (401, 403)
    if denied or "Credential" in type(error).__name__:
        return (
            "give credentials that may read it (for s3 AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY, or AWS_PROFILE)"
        )
    return "look at the server and the network, then run the same command again"
