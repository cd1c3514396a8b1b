"""Shards behind a URL, downloaded whole into a cache that processes share, and checked there."""

from __future__ import annotations

import hashlib
import logging
import os
import re
import tempfile
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from shards.errors import FetchError, IndexFileError, ManifestError
from shards.files import Locked, atomic_write, lock, sha256_file, sync_folder
from shards.format import index as index_files
from shards.format.manifest import MANIFEST, Manifest, ShardInfo, parse_manifest
from shards.format.table import FILES_OPEN, OpenFile
from shards.remote.download import Damaged, Remote, nap

log = logging.getLogger(__name__)


def default_cache() -> Path:
    """Where fetched shards are kept if no folder is given."""
    return Path.home() / ".cache" / "dinogen" / "shards"


def open_remote(
    url: str, cache_dir: Path | None, cache_gb: float | None = None
) -> tuple[RemoteFolder, Manifest]:
    """Fetch the manifest of the dataset behind a URL; its shards follow when they are read.

    Args:
        url: folder on any file system that fsspec knows.
        cache_dir: folder for the cache; `default_cache()` if None.
        cache_gb: most that all files in the cache take, in 10^9 bytes; no limit if None.

    Raises:
        ManifestError: if there is no manifest behind the URL, or it cannot be used.
        FetchError: if the file system cannot be reached.
    """
    remote = Remote(url)
    data, manifest = _read_manifest(remote)
    # The manifest is part of the name: packed again, the dataset gets a cache of its own.
    name = hashlib.sha256(remote.url.encode() + b"\0" + data).hexdigest()[:20]
    cache = Cache(cache_dir or default_cache(), None if cache_gb is None else int(cache_gb * GB))
    folder = cache.root / name
    folder.mkdir(exist_ok=True)
    with atomic_write(folder / MANIFEST) as file:
        file.write(data)
    return RemoteFolder(remote, cache, folder, manifest), manifest


def _read_manifest(remote: Remote) -> tuple[bytes, Manifest]:
    place = f"{remote.url}/{MANIFEST}"
    try:
        data = remote.read(MANIFEST)
        try:
            return data, parse_manifest(data, place)
        except ManifestError as error:
            # It has no checksum, but an interrupted transfer leaves invalid JSON.
            log.warning("%s; reading it again", error)
            data = remote.read(MANIFEST)
            return data, parse_manifest(data, place)
    except FileNotFoundError as error:
        raise ManifestError(
            f"{remote.url}: has no {MANIFEST}; give the folder of a packed dataset, or run "
            f"`dinogen shards index` on the tars before they are uploaded"
        ) from error


class RemoteFolder:
    """Finds the files of a remote dataset in the cache, and fetches those that are missing.

    A file in the cache was checked before it got its name, so it needs no further check.

    Attributes:
        folder: the dataset's own folder in the cache.
        cache: shared with other processes and datasets.
        num_open: how many files a reader may keep open; those cannot be evicted.
    """

    def __init__(self, remote: Remote, cache: Cache, folder: Path, manifest: Manifest) -> None:
        self.folder = folder
        self.cache = cache
        self.num_open = FILES_OPEN if cache.limit is None else 1
        self._remote = remote
        self._shards = {shard.name: shard for shard in manifest.shards}
        self._indexes = {index_files.index_name(name): name for name in self._shards}
        self._statistics = manifest.statistics
        self._held: weakref.WeakValueDictionary[str, HeldFile] = weakref.WeakValueDictionary()
        self._lock = threading.Lock()

    def path(self, name: str) -> Path:
        """Local path of an index or of the statistics; these are small and stay.

        Raises:
            FileNotFoundError: if the dataset lacks it.
            IndexFileError: if it is an index that is damaged where it comes from.
            FetchError: if it cannot be fetched, or differs from the manifest.
        """
        path = self.folder / name
        if not path.is_file():
            if name not in self._indexes and (
                self._statistics is None or name != self._statistics.file
            ):
                raise FileNotFoundError(path)
            self._fetch(name, urgent=True)
        return path

    def open(self, name: str) -> HeldFile:
        """A shard, which stays in the cache while it is held.

        Raises:
            FetchError: if it cannot be fetched, or differs from the manifest.
        """
        file = self._open(name, urgent=True)
        assert file is not None
        return file

    def open_early(self, name: str) -> HeldFile | None:
        """A shard that no reader waits for yet; None if there is no space for it now.

        Raises:
            FetchError: as `open`.
        """
        return self._open(name, urgent=False)

    def _open(self, name: str, urgent: bool) -> HeldFile | None:
        while True:
            with self._lock:
                found = self._held.get(name)
            if found is not None:
                return found
            try:
                file = HeldFile(self.folder / name)
            except FileNotFoundError:
                if not self._fetch(name, urgent):
                    return None
                continue
            with self._lock:
                return self._held.setdefault(name, file)

    def _fetch(self, name: str, urgent: bool) -> bool:
        """Put a file into the cache; False if there is no space for it."""
        path = self.folder / name
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with self.cache.fetching(path) as lock:
                # Another process may have fetched it while this one waited.
                if path.is_file():
                    return True
                part = self.cache.part_of(path)
                shard = self._shards.get(name)
                if shard and not self.cache.reserve(lock, shard.num_bytes, urgent):
                    return False
                try:
                    self._remote.fetch(name, part, lambda got: self._check(name, got))
                    if shard is None:
                        # The manifest does not say how large it is.
                        self.cache.reserve(lock, part.stat().st_size, urgent=True)
                    _keep(part, path)
                finally:
                    part.unlink(missing_ok=True)
        except FileNotFoundError as error:
            if name in self._indexes:
                raise
            raise FetchError(
                f"{self._remote.url}/{name}: is missing, although {MANIFEST} names it; upload it "
                f"again, or run `dinogen shards repair` on the folder that it was uploaded from"
            ) from error
        except Damaged as error:
            what = f"{self._remote.url}/{name}: {error}"
            if name in self._indexes:
                raise IndexFileError(what) from error
            raise FetchError(
                f"{what}, on every try; run `dinogen shards verify` on the folder that it was "
                f"uploaded from, and upload it again"
            ) from error
        except OSError as error:
            raise FetchError(
                f"{path}: cannot be written: {error.strerror}; set data.cache_dir to a writable "
                f"folder with free space"
            ) from error
        return True

    def _check(self, name: str, path: Path) -> None:
        """Raise Damaged unless a fetched file is what it should be."""
        if name in self._indexes:
            _check_index(path, self._shards[self._indexes[name]])
            return
        wanted = None
        if (shard := self._shards.get(name)) is not None:
            wanted = shard.sha256
            if (got := path.stat().st_size) < shard.num_bytes:
                # A broken transfer; unlike wrong bytes, it does not mean that the source is bad.
                raise ConnectionError(f"cut off, {got} of {shard.num_bytes} bytes")
        if self._statistics is not None and name == self._statistics.file:
            wanted = self._statistics.sha256
        if wanted is not None and sha256_file(path) != wanted:
            raise Damaged(f"differs from what {MANIFEST} says")


def _check_index(path: Path, shard: ShardInfo) -> None:
    """The manifest has no checksum of an index, but it checks itself and has to fit its shard."""
    try:
        index = index_files.load(path)
    except IndexFileError as error:
        raise Damaged(str(error)) from error
    if (len(index), index.num_bytes) != (shard.num_samples, shard.num_bytes):
        raise Damaged(f"does not fit {shard.name}")


def _keep(part: Path, path: Path) -> None:
    """Make a fetched file durable, then visible under its name."""
    with part.open("rb") as file:
        os.fsync(file.fileno())
    part.rename(path)
    sync_folder(path.parent)


GB = 10**9
_EVICTABLE = ".tar"
_USER = ".user-"
# Without file locks, a file that was not touched for this many seconds is no longer in use.
_FORGOTTEN_S = 3600.0
# The folder may hold other things, which must not be counted or deleted.
_OURS = re.compile("[0-9a-f]{20}")


class HeldFile(OpenFile):
    """A cached file that is not evicted while this object lives; its end counts as a use.

    Raises:
        FileNotFoundError: if there is none, or it was evicted at this moment.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        lock(self.descriptor, path, shared=True, wait=True)
        if os.fstat(self.descriptor).st_nlink == 0:
            raise FileNotFoundError(path)

    @staticmethod
    def _let_go(descriptor: int) -> None:
        # Not every file system keeps access times, so the modification time is used instead.
        with suppress(OSError):
            os.utime(descriptor)
        os.close(descriptor)


class Cache:
    """A folder with one folder per dataset; all processes that use it share one limit.

    Args:
        root: the folder; created if missing.
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
        """Lock out all other processes that want to fetch the file at `path`; gives its lock file.

        Raises:
            Stopped: if this thread has to stop while it waits for another.
        """
        with lock_of(path).open("ab") as file:
            while (got := _lock(file, lock_of(path))) is Locked.BUSY:
                nap()
            self._has_locks = got is Locked.HELD
            try:
                yield file
            finally:
                # Its length is the space that a running fetch will take, see `reserve`. A process
                # that counts must not miss both it and the file.
                if self.limit is not None:
                    with self._alone():
                        os.ftruncate(file.fileno(), 0)

    def part_of(self, path: Path) -> Path:
        """Where the file at `path` is while it is fetched; call it inside `fetching`.

        Without file locks each thread of each process has its own file, so two that fetch the same
        shard do not write into each other's.
        """
        if self._has_locks:
            return part_of(path)
        return path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}.tmp")

    def reserve(self, file: IO[bytes], num_bytes: int, urgent: bool) -> bool:
        """Make room for a file that is about to be fetched, until its lock is released.

        Args:
            file: the lock file of the fetch.
            num_bytes: of the file.
            urgent: a reader waits for it: if there is no room, the limit is exceeded.

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
        """Warn once that the limit is too small for the bytes that are needed at once."""
        if not self._warned and self.limit is not None:
            self._warned = True
            log.warning(
                "data.cache_gb=%g IS TOO SMALL: %s needs %.3g GB at once on this node; shards are "
                "fetched repeatedly, or the limit is exceeded. Set data.cache_gb=%.3g or more",
                self.limit / GB, self.root, needed / GB, 1.1 * needed / GB,
            )  # fmt: skip

    @contextmanager
    def user(self) -> Iterator[None]:
        """Count as one of the users that share the limit."""
        with self._alone():
            descriptor, name = tempfile.mkstemp(prefix=_USER, dir=self.root)
            lock(descriptor, Path(name), shared=False, wait=True)
        try:
            yield
        finally:
            Path(name).unlink(missing_ok=True)
            os.close(descriptor)

    def share(self) -> tuple[float, int]:
        """Bytes of shards that each user may take, and how many users there are."""
        with self._alone():
            num_users = sum(_in_use(p) for p in self.root.glob(f"{_USER}*"))
            taken, evictable = self._scan()
        num_users = max(num_users, 1)
        if self.limit is None:
            return float("inf"), num_users
        small = taken - sum(size for _, size, _ in evictable)
        return max(self.limit - small, 0) / num_users, num_users

    def _evict(self, limit: int) -> int:
        """Delete the least recently used until no more than `limit` bytes are left.

        Returns:
            How many are left; more than `limit` if the rest is in use.
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
        """Bytes taken, including running fetches; (last use, size, path) of shards."""
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
    """Whether the process of a user's file is alive; if not, the file is deleted."""
    with suppress(FileNotFoundError), path.open("r+b") as file:
        got = _lock(file, path)
        if got is Locked.HELD:
            path.unlink(missing_ok=True)
        return got is Locked.BUSY or (got is Locked.UNKNOWN and _is_fresh(file))
    return False


def _unlink_unless_locked(path: Path) -> bool:
    """Delete a file that no process holds; whether it is gone.

    Without locks a shard that is being read may be deleted: its readers keep it open, and the next
    one fetches it again.
    """
    with suppress(FileNotFoundError), path.open("r+b") as file:
        if _lock(file, path) is Locked.BUSY:
            return False
        path.unlink(missing_ok=True)
    return True


def _reserved(lock_path: Path) -> int:
    """Bytes that a running fetch will take; 0 if its process has ended."""
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
    """The lock of processes that fetch a file; it stays, so a tar without one is not ours."""
    return path.with_name(f".{path.name}.lock")


def part_of(path: Path) -> Path:
    """Where a file is while it is fetched; only the holder of its lock writes there."""
    return path.with_name(f".{path.name}.tmp")
