"""Shards behind a URL: fetched whole into a local cache, once, checked against the manifest."""

from __future__ import annotations

import hashlib
import logging
import os
import threading
import weakref
from pathlib import Path

from shards.errors import FetchError, IndexFileError, ManifestError
from shards.files import atomic_write, sha256_file, sync_folder
from shards.format import index as index_files
from shards.format.manifest import MANIFEST, Manifest, ShardInfo, parse_manifest
from shards.format.table import FILES_OPEN
from shards.remote.cache import GB, Cache, HeldFile
from shards.remote.download import Damaged, Remote

log = logging.getLogger(__name__)


def default_cache() -> Path:
    """Where fetched shards are kept unless a folder is given."""
    return Path.home() / ".cache" / "dinogen" / "shards"


def open_remote(
    url: str, cache_dir: Path | None, cache_gb: float | None = None
) -> tuple[RemoteFolder, Manifest]:
    """Fetch the manifest of the dataset behind a URL; its shards follow when they are read.

    Args:
        url: folder on any file system that fsspec knows.
        cache_dir: folder for the cache, `default_cache()` unless given.
        cache_gb: most that all files in the cache take, in 10^9 bytes; no limit unless given.

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
            # No checksum guards it, but a transfer cut short leaves no sound JSON.
            log.warning("%s; reading it again", error)
            data = remote.read(MANIFEST)
            return data, parse_manifest(data, place)
    except FileNotFoundError as error:
        raise ManifestError(
            f"{remote.url}: has no {MANIFEST}; give the folder of a packed dataset, or run "
            f"`dinogen shards index` on the tars before they are uploaded"
        ) from error


class RemoteFolder:
    """Finds the files of a remote dataset in the cache, fetching those that are not there.

    A file in the cache was checked before it got its name, so its presence is enough.

    Attributes:
        folder: the dataset's own folder in the cache.
        cache: which it shares with other processes and datasets.
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
            self._obtain(name, urgent=True)
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
        """A shard that nobody waits for yet; None if there is no room for it now.

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
                if not self._obtain(name, urgent):
                    return None
                continue
            with self._lock:
                return self._held.setdefault(name, file)

    def _obtain(self, name: str, urgent: bool) -> bool:
        """Have a file in the cache; False if there is no room for it."""
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
                        # How small it is no manifest says.
                        self.cache.reserve(lock, part.stat().st_size, urgent=True)
                    _keep(part, path)
                finally:
                    part.unlink(missing_ok=True)
        except FileNotFoundError as error:
            if name in self._indexes:
                raise
            raise FetchError(
                f"{self._remote.url}/{name}: is not there, though {MANIFEST} names it; upload it "
                f"again, or run `dinogen shards repair` where it came from"
            ) from error
        except Damaged as error:
            what = f"{self._remote.url}/{name}: {error}"
            if name in self._indexes:
                raise IndexFileError(what) from error
            raise FetchError(
                f"{what}, each time; upload it again, and check it where it comes from"
            ) from error
        except OSError as error:
            raise FetchError(
                f"{path}: cannot be written: {error.strerror}; give data.cache_dir a folder with "
                f"room that can be written"
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
                # The transfer broke: unlike wrong bytes, that is no reason to doubt the source.
                raise ConnectionError(f"cut off, {got} of {shard.num_bytes} bytes")
        if self._statistics is not None and name == self._statistics.file:
            wanted = self._statistics.sha256
        if wanted is not None and sha256_file(path) != wanted:
            raise Damaged(f"differs from what {MANIFEST} says")


def _check_index(path: Path, shard: ShardInfo) -> None:
    """No checksum guards an index, but it has its own, and has to fit its shard."""
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
