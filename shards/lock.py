"""File locks that processes share; on a file system without locks work goes on with a warning."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import threading
from enum import Enum
from pathlib import Path
from typing import IO

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
