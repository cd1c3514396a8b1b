"""Shards behind a URL: fetched whole into a local cache, once, checked against the manifest."""

from __future__ import annotations

import fcntl
import hashlib
import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from shards.errors import ManifestError, ShardsError
from shards.files import atomic_write
from shards.index import index_name
from shards.manifest import MANIFEST, Manifest, parse_manifest

log = logging.getLogger(__name__)
_CHUNK = 1 << 22


class FetchError(ShardsError):
    """A file could not be fetched, or is not what the manifest says."""


def default_cache() -> Path:
    """Where fetched shards are kept unless a folder is given."""
    return Path.home() / ".cache" / "dinogen" / "shards"


def open_remote(url: str, cache_dir: Path | None) -> tuple[RemoteFolder, Manifest]:
    """Fetch the manifest of the dataset behind a URL; its shards follow when they are read.

    Args:
        url: folder on any file system that fsspec knows.
        cache_dir: folder for the cache, `default_cache()` unless given.

    Raises:
        ManifestError: if there is no manifest behind the URL, or it cannot be used.
        FetchError: if the file system cannot be reached.
    """
    import fsspec

    try:
        system, root = fsspec.core.url_to_fs(url)
        data = system.cat_file(f"{root.rstrip('/')}/{MANIFEST}")
    except FileNotFoundError as error:
        raise ManifestError(
            f"{url}: has no {MANIFEST}; give the folder of a packed dataset, or run "
            f"`dinogen shards index` on the tars before they are uploaded"
        ) from error
    except (OSError, ImportError, ValueError) as error:
        raise FetchError(f"{url}: cannot be reached: {error}") from error
    manifest = parse_manifest(data, f"{url}/{MANIFEST}")
    # The manifest is part of the name: packed anew, the dataset gets a cache of its own.
    name = hashlib.sha256(url.encode() + b"\0" + data).hexdigest()[:20]
    folder = (cache_dir or default_cache()) / name
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_write(folder / MANIFEST) as file:
        file.write(data)
    return RemoteFolder(system, root.rstrip("/"), folder, manifest), manifest


class RemoteFolder:
    """Finds the files of a remote dataset in the cache, fetching those that are not there yet.

    A file in the cache was checked before it got its name, so its presence is enough.
    """

    def __init__(self, system: Any, root: str, folder: Path, manifest: Manifest) -> None:
        self.folder = folder
        self._system = system
        self._root = root
        self._sha256 = {shard.name: shard.sha256 for shard in manifest.shards}
        if manifest.statistics is not None:
            self._sha256[manifest.statistics.file] = manifest.statistics.sha256
        self._indexes = {index_name(shard.name) for shard in manifest.shards}

    def path(self, name: str) -> Path:
        """Local path of a file of the dataset.

        Raises:
            FileNotFoundError: if the dataset lacks it.
            FetchError: if it cannot be fetched, or differs from the manifest.
        """
        path = self.folder / name
        if path.is_file():
            return path
        if name not in self._sha256 and name not in self._indexes:
            raise FileNotFoundError(path)
        with _locked(self.folder / f".{name}.lock"):
            # Another process may have fetched it while this one waited.
            if not path.is_file():
                self._fetch(name, path)
        return path

    def _fetch(self, name: str, path: Path) -> None:
        remote = f"{self._root}/{name}"
        log.info("fetching %s", remote)
        try:
            with self._system.open(remote, "rb") as source, atomic_write(path) as target:
                shutil.copyfileobj(source, target, _CHUNK)
                # An index is held by its fit to the shard and by the checksums of the samples.
                if name in self._sha256 and target.hexdigest() != self._sha256[name]:
                    raise FetchError(
                        f"{remote}: differs from what {MANIFEST} says; upload it again, or run "
                        f"`dinogen shards verify` where it came from"
                    )
        except FileNotFoundError:
            raise
        except OSError as error:
            raise FetchError(f"{remote}: cannot be fetched: {error}") from error


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
