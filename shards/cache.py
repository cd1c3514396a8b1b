"""The cache of fetched files: shared by processes; what is not used for longest is evicted."""

from __future__ import annotations

import fcntl
import logging
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from shards.fetch import nap
from shards.table import OpenFile

log = logging.getLogger(__name__)
GB = 10**9
_EVICTABLE = ".tar"
_USER = ".user-"
# Whoever gives a folder with other things in it does not want them counted, let alone deleted.
_OURS = re.compile("[0-9a-f]{20}")


class HeldFile(OpenFile):
    """A cached file that nobody evicts while this object lives; its end counts as a use.

    Raises:
        FileNotFoundError: if there is none, or it was evicted in this moment.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        fcntl.flock(self.descriptor, fcntl.LOCK_SH)
        if os.fstat(self.descriptor).st_nlink == 0:
            raise FileNotFoundError(path)

    @staticmethod
    def _let_go(descriptor: int) -> None:
        # Access times are not kept on every file system: the time of writing stands in.
        with suppress(OSError):
            os.utime(descriptor)
        os.close(descriptor)


class Cache:
    """A folder with one folder per dataset; all processes that use it keep to one limit.

    Args:
        root: the folder; made if need be.
        limit: most bytes of all files in it, or None.
    """

    def __init__(self, root: Path, limit: int | None = None) -> None:
        self.root = root
        self.limit = limit
        root.mkdir(parents=True, exist_ok=True)
        self._warned = False

    @contextmanager
    def fetching(self, path: Path) -> Iterator[IO[bytes]]:
        """Alone among all processes that would fetch the file at `path`; gives its lock file.

        Raises:
            Stopped: if this thread is to stop while it waits for another.
        """
        with lock_of(path).open("ab") as lock:
            while not _locked(lock):
                nap()
            try:
                yield lock
            finally:
                # Its length is what a fetch under way will take, see `reserve`. Who counts must
                # not miss both it and the file.
                if self.limit is not None:
                    with self._alone():
                        os.ftruncate(lock.fileno(), 0)

    def reserve(self, lock: IO[bytes], num_bytes: int, urgent: bool) -> bool:
        """Make room for a file that is about to be fetched, until its lock is given back.

        Args:
            lock: the lock file of the fetch.
            num_bytes: of the file.
            urgent: a reader waits for it: if there is no room, the limit gives way.

        Returns:
            Whether it may be fetched.
        """
        if self.limit is None:
            return True
        with self._alone():
            taken = self._evict(self.limit - num_bytes)
            if taken + num_bytes > self.limit:
                if not urgent:
                    return False
                self.warn(taken + num_bytes)
            os.ftruncate(lock.fileno(), num_bytes)
        return True

    def warn(self, needed: int) -> None:
        """Say once, loudly, that the limit is too small for what is needed at once, in bytes."""
        if not self._warned and self.limit is not None:
            self._warned = True
            log.warning(
                "data.cache_gb=%g IS TOO SMALL: %s needs %.3g GB at once on this node; shards are "
                "fetched again and again, or the limit is passed. Set data.cache_gb=%.3g or more",
                self.limit / GB, self.root, needed / GB, 1.1 * needed / GB,
            )  # fmt: skip

    @contextmanager
    def user(self) -> Iterator[None]:
        """Count as one of those who share the limit."""
        with self._alone():
            descriptor, name = tempfile.mkstemp(prefix=_USER, dir=self.root)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        try:
            yield
        finally:
            Path(name).unlink(missing_ok=True)
            os.close(descriptor)

    def share(self) -> tuple[float, int]:
        """Bytes of shards that one user may have to itself, and how many users there are."""
        with self._alone():
            num_users = sum(not _unlink_unless_locked(p) for p in self.root.glob(f"{_USER}*"))
            taken, evictable = self._scan()
        num_users = max(num_users, 1)
        if self.limit is None:
            return float("inf"), num_users
        small = taken - sum(size for _, size, _ in evictable)
        return max(self.limit - small, 0) / num_users, num_users

    def _evict(self, limit: int) -> int:
        """Delete what was not used for longest until no more than `limit` bytes are left.

        Returns:
            How many are left: more, if the rest is in use.
        """
        taken, evictable = self._scan()
        for _, size, path in sorted(evictable):
            if taken <= limit:
                break
            if _unlink_unless_locked(path):
                log.info("evicting %s", path)
                taken -= size
        return taken

    def _scan(self) -> tuple[int, list[tuple[int, int, Path]]]:
        """Bytes taken, those of fetches under way included; (last use, size, path) of shards."""
        taken = 0
        evictable: list[tuple[int, int, Path]] = []
        for folder in self.root.iterdir():
            if not _OURS.fullmatch(folder.name):
                continue
            for entry in os.scandir(folder):
                try:
                    status = entry.stat()
                except FileNotFoundError:
                    continue
                if not entry.name.startswith("."):
                    taken += status.st_size
                    path = Path(entry.path)
                    if entry.name.endswith(_EVICTABLE) and lock_of(path).exists():
                        evictable.append((status.st_mtime_ns, status.st_size, path))
                elif entry.name.endswith(".lock") and status.st_size:
                    taken += _reserved(Path(entry.path))
        return taken, evictable

    @contextmanager
    def _alone(self) -> Iterator[None]:
        with (self.root / ".lock").open("ab") as lock:
            # Held for moments only.
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield


def _locked(file: IO[bytes]) -> bool:
    """Whether the lock could be had at once."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _unlink_unless_locked(path: Path) -> bool:
    """Delete a file that nobody holds; whether it is gone."""
    with suppress(FileNotFoundError), path.open("r+b") as file:
        if not _locked(file):
            return False
        path.unlink(missing_ok=True)
    return True


def _reserved(lock_path: Path) -> int:
    """Bytes that a fetch under way will take; nothing, if its process is no more."""
    with lock_path.open("ab") as lock:
        if not _locked(lock):
            return os.fstat(lock.fileno()).st_size
        os.ftruncate(lock.fileno(), 0)
        part_of(lock_path.with_name(lock_path.name[1 : -len(".lock")])).unlink(missing_ok=True)
    return 0


def lock_of(path: Path) -> Path:
    """The lock of those who would fetch a file; it stays, so a tar without one is not ours."""
    return path.with_name(f".{path.name}.lock")


def part_of(path: Path) -> Path:
    """Where a file lies while it is fetched; only the holder of its lock writes there."""
    return path.with_name(f".{path.name}.tmp")
