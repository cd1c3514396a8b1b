"""Files that appear whole or not at all, their checksums, and locks that processes share."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import logging
import os
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from enum import Enum
from itertools import count
from pathlib import Path
from typing import IO

import numpy as np

TEMPORARY = ".tmp"
KEPT = ".before-repair"
# Hold it while numpy reads the header of a .npy: numpy uses `ast`, which in CPython 3.11 raises a
# SystemError ("AST constructor recursion depth mismatch") when two threads use it at once.
NPY_HEADERS = threading.Lock()
_CHUNK = 1 << 20
_WRITTEN_AT_ONCE = 1 << 20
# A sparse file of a few bytes may claim any size, and is read whole into memory.
_MAX_SPARSE = 1 << 28


class AtomicFile:
    """A temporary file beside `path` that `commit` turns into `path`; counts and hashes itself."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._temporary = path.with_name(f".{path.name}.{os.getpid()}{TEMPORARY}")
        # Linux keeps what one call writes in pages as large as the call, and large ones are read
        # twice as fast.
        self._file = self._temporary.open("wb", buffering=_WRITTEN_AT_ONCE)
        self._hash = hashlib.sha256()
        self.num_bytes = 0

    def write(self, data: bytes) -> int:
        """Write `data` and return its length."""
        self._hash.update(data)
        self.num_bytes += len(data)
        return self._file.write(data)

    def hexdigest(self) -> str:
        """sha256 of everything written so far."""
        return self._hash.hexdigest()

    def commit(self) -> None:
        """Make the content durable, then visible under its name."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self._temporary.rename(self._path)
        sync_folder(self._path.parent)

    def abandon(self) -> None:
        """Remove the temporary file; `path` stays as it was."""
        # Closing writes what is left in the buffer, and fails on a full disk.
        with suppress(OSError):
            self._file.close()
        self._temporary.unlink(missing_ok=True)


@contextmanager
def atomic_write(path: Path) -> Iterator[AtomicFile]:
    """Write `path` whole, or leave it as it was if an exception is raised."""
    file = AtomicFile(path)
    try:
        yield file
        file.commit()
    except BaseException:
        file.abandon()
        raise


def keep(path: Path) -> Path:
    """Give a file's content a second name, which stays when the file is replaced or removed.

    Returns:
        `NAME.before-repair`, or `NAME.before-repair-2` and so on if those hold something else.

    Raises:
        OSError: if there is no space for it; then nothing has changed.
    """
    for number in count(1):
        kept = path.with_name(f"{path.name}{KEPT}{f'-{number}' if number > 1 else ''}")
        try:
            os.link(path, kept)
        except FileExistsError:
            # An earlier repair was interrupted after this step.
            if path.samefile(kept):
                return kept
            continue
        except OSError:
            # A file system without hard links.
            if kept.exists():
                continue
            _copy(path, kept)
        break
    sync_folder(path.parent)
    return kept


def _copy(path: Path, to: Path) -> None:
    with path.open("rb") as source, atomic_write(to) as file:
        while chunk := source.read(_CHUNK):
            file.write(chunk)
    shutil.copystat(path, to)


def sync_folder(folder: Path) -> None:
    """Make the names in `folder` durable: a rename is lost in a power cut until then."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_at(descriptor: int, size: int, offset: int) -> bytes:
    """`size` bytes of a file from `offset` on; fewer if it ends before."""
    data = os.pread(descriptor, size, offset)
    if len(data) == size or not data:
        return data
    # One call gives 2 GiB at most.
    parts, done = [data], len(data)
    while done < size and (data := os.pread(descriptor, size - done, offset + done)):
        parts.append(data)
        done += len(data)
    return b"".join(parts)


def gather(descriptor: int, extents: tuple[tuple[int, int, int], ...], size: int) -> bytes:
    """The content of a sparse file, `size` bytes, from the parts that are stored.

    Args:
        descriptor: of the file that holds them.
        extents: (first byte, bytes, position in the content) of each; the rest is zero.
        size: of the content.

    Returns:
        Nothing if one of the parts is cut off.
    """
    content = bytearray(size)
    for offset, length, position in extents:
        part = read_at(descriptor, length, offset)
        if len(part) < length:
            return b""
        content[position : position + length] = part
    return bytes(content)


def too_sparse(size: int, extents: tuple[tuple[int, int, int], ...]) -> str | None:
    """Why a sparse file is not read, if it is mostly zeros and too large for memory; else None.

    Args:
        size: of the content.
        extents: of the stored parts, as in `gather`.
    """
    if size <= _MAX_SPARSE or 2 * sum(length for _, length, _ in extents) >= size:
        return None
    return (
        f"is a sparse file of {size:,} bytes, mostly zeros; such files are read up to "
        f"{_MAX_SPARSE:,} bytes"
    )


def sha256_file(path: Path) -> str:
    """sha256 of a whole file, as hex."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def sum64(data: bytes | bytearray | memoryview) -> int:
    """Sum of `data` as little-endian 64-bit words, zero-padded at the end, modulo 2**64.

    Seven times as fast as crc32, so reading can afford it; any single flipped bit and any zeroed
    or foreign block changes it. Whole shards have a sha256 as well.
    """
    whole = len(data) & ~7
    total = int(np.frombuffer(data, "<u8", whole // 8).sum(dtype=np.uint64))
    tail = int.from_bytes(data[whole:], "little")
    return (total + tail) & 0xFFFF_FFFF_FFFF_FFFF


log = logging.getLogger(__name__)

# What flock() answers where it cannot lock at all: NFS without a lock service, Lustre mounted
# without the flock option, FUSE and 9p file systems, a read-only descriptor on NFS.
NO_LOCKS = frozenset(
    {
        errno.ENOLCK,
        errno.ENOSYS,
        errno.EOPNOTSUPP,
        errno.ENOTSUP,
        errno.EINVAL,
        errno.EBADF,
        errno.ENOTTY,
        errno.EPERM,
        errno.EACCES,
    }
)


class Locked(Enum):
    """What became of an attempt to lock a file.

    Attributes:
        HELD: this process holds the lock until the file is closed.
        BUSY: another process, or another open file of this one, holds it.
        UNKNOWN: the file system has no locks, so the state is unknown; a warning was logged.
    """

    HELD = "held"
    BUSY = "busy"
    UNKNOWN = "unknown"


def lock(file: IO[str] | IO[bytes] | int, path: Path, *, shared: bool, wait: bool) -> Locked:
    """Lock an open file; the system releases the lock when the file is closed in any way.

    If a file system has no locks, a warning names the first file that was to be locked on it.

    Args:
        file: open, or its descriptor; for an exclusive lock it has to be writable on NFS.
        path: its name, for messages.
        shared: several may hold it at once, but not beside an exclusive lock.
        wait: until others have released it; ``BUSY`` is never returned then.

    Raises:
        OSError: the file system failed in another way.
    """
    flags = (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB)
    try:
        fcntl.flock(file, flags)
    except BlockingIOError:
        return Locked.BUSY
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        _warn(file if isinstance(file, int) else file.fileno(), path, error)
        return Locked.UNKNOWN
    return Locked.HELD


def is_locked(path: Path) -> bool:
    """Whether a process holds a lock on a file now; a file that is not there is not locked.

    False if the file system has no locks: the state is unknown.
    """
    try:
        with path.open("rb") as file:
            return lock(file, path, shared=True, wait=False) is Locked.BUSY
    except (FileNotFoundError, NotADirectoryError):
        return False


_WARNED: set[int] = set()
_WARNING = threading.Lock()


def _warn(descriptor: int, path: Path, error: OSError) -> None:
    """Warn once for each file system that it has no locks."""
    device = os.fstat(descriptor).st_dev
    with _WARNING:
        if device in _WARNED:
            return
        _WARNED.add(device)
    log.warning(
        "%s: THIS FILE SYSTEM HAS NO FILE LOCKS (flock: %s): two processes that use the same "
        "folder do not notice each other and can damage its files. Start only one at a time, "
        "or use a folder on a file system with locks",
        path.parent,
        error.strerror,
    )
