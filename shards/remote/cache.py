"""The cache of fetched files: shared by processes; what is not used for longest is evicted."""

from __future__ import annotations

import logging
import os
import re
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from shards.format.table import OpenFile
from shards.lock import Locked, lock
from shards.remote.download import nap

log = logging.getLogger(__name__)
GB = 10**9
_EVICTABLE = ".tar"
_USER = ".user-"
# Where the file system has no locks, what was not touched for so many seconds has nobody any more.
_FORGOTTEN_S = 3600.0
# A folder may hold other things, which are not to be counted, let alone deleted.
_OURS = re.compile("[0-9a-f]{20}")


class HeldFile(OpenFile):
    """A cached file that nobody evicts while this object lives; its end counts as a use.

    Raises:
        FileNotFoundError: if there is none, or it was evicted in this moment.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        lock(self.descriptor, path, shared=True, wait=True)
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
        self._has_locks = True

    @contextmanager
    def fetching(self, path: Path) -> Iterator[IO[bytes]]:
        """Alone among all processes that would fetch the file at `path`; gives its lock file.

        Raises:
            Stopped: if this thread is to stop while it waits for another.
        """
        with lock_of(path).open("ab") as file:
            while (got := _lock(file, lock_of(path))) is Locked.BUSY:
                nap()
            self._has_locks = got is Locked.HELD
            try:
                yield file
            finally:
                # Its length is what a fetch under way will take, see `reserve`. Who counts must
                # not miss both it and the file.
                if self.limit is not None:
                    with self._alone():
                        os.ftruncate(file.fileno(), 0)

    def part_of(self, path: Path) -> Path:
        """Where the file at `path` lies while it is fetched; to be asked inside `fetching`.

        Where the file system has no locks each thread of each process has a place of its own, so
        two that fetch the same file do not write into each other's.
        """
        if self._has_locks:
            return part_of(path)
        return path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}.tmp")

    def reserve(self, file: IO[bytes], num_bytes: int, urgent: bool) -> bool:
        """Make room for a file that is about to be fetched, until its lock is given back.

        Args:
            file: the lock file of the fetch.
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
            os.ftruncate(file.fileno(), num_bytes)
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
            lock(descriptor, Path(name), shared=False, wait=True)
        try:
            yield
        finally:
            Path(name).unlink(missing_ok=True)
            os.close(descriptor)

    def share(self) -> tuple[float, int]:
        """Bytes of shards that one user may have to itself, and how many users there are."""
        with self._alone():
            num_users = sum(_in_use(p) for p in self.root.glob(f"{_USER}*"))
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
        path = self.root / ".lock"
        with path.open("ab") as file:
            # Held for moments only.
            lock(file, path, shared=False, wait=True)
            yield


def _lock(file: IO[bytes], path: Path) -> Locked:
    return lock(file, path, shared=False, wait=False)


def _in_use(path: Path) -> bool:
    """Whether the process of a user's file is there; if not, the file is deleted."""
    with suppress(FileNotFoundError), path.open("r+b") as file:
        got = _lock(file, path)
        if got is Locked.HELD:
            path.unlink(missing_ok=True)
        return got is Locked.BUSY or (got is Locked.UNKNOWN and _is_fresh(file))
    return False


def _unlink_unless_locked(path: Path) -> bool:
    """Delete a file that nobody holds; whether it is gone.

    Without locks a shard that is being read may be deleted: its readers keep it open, and the next
    one fetches it again.
    """
    with suppress(FileNotFoundError), path.open("r+b") as file:
        if _lock(file, path) is Locked.BUSY:
            return False
        path.unlink(missing_ok=True)
    return True


def _reserved(lock_path: Path) -> int:
    """Bytes that a fetch under way will take; nothing, if its process is no more."""
    with lock_path.open("ab") as file:
        got = _lock(file, lock_path)
        if got is Locked.BUSY or (got is Locked.UNKNOWN and _is_fresh(file)):
            return os.fstat(file.fileno()).st_size
        os.ftruncate(file.fileno(), 0)
        part_of(lock_path.with_name(lock_path.name[1 : -len(".lock")])).unlink(missing_ok=True)
    return 0


def _is_fresh(file: IO[bytes]) -> bool:
    return time.time() - os.fstat(file.fileno()).st_mtime < _FORGOTTEN_S


def lock_of(path: Path) -> Path:
    """The lock of those who would fetch a file; it stays, so a tar without one is not ours."""
    return path.with_name(f".{path.name}.lock")


def part_of(path: Path) -> Path:
    """Where a file lies while it is fetched; only the holder of its lock writes there."""
    return path.with_name(f".{path.name}.tmp")
