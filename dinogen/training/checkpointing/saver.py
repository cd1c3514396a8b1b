"""Writes checkpoints in a thread, one after the other, so that training does not wait for disks."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from safetensors import SafetensorError

from dinogen.errors import UserError


class SaveError(UserError):
    """A checkpoint could not be written; the one before is whole."""


class Saver:
    """At most one checkpoint is on its way; the next one waits for it.

    Attributes:
        waited: seconds that the caller has spent waiting here.
    """

    def __init__(self) -> None:
        self.waited = 0.0
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="saver")
        self._pending: Future[None] | None = None
        self._folder = Path()

    def submit(self, folder: Path, write: Callable[[], None]) -> None:
        """Call ``write`` in the thread, after what is on its way now.

        Args:
            folder: where it writes, for messages.
            write: owns all that it writes; nobody changes it meanwhile.

        Raises:
            SaveError: the checkpoint before could not be written.
        """
        self.wait()
        self._folder = folder
        self._pending = self._pool.submit(write)

    def check(self) -> None:
        """Say at once if what was on its way has failed.

        Raises:
            SaveError: it could not be written.
        """
        if self._pending is not None and self._pending.done():
            self.wait()

    def wait(self) -> None:
        """Wait until what is on its way is on disk.

        Raises:
            SaveError: it could not be written.
        """
        if self._pending is None:
            return
        before = time.monotonic()
        pending, self._pending = self._pending, None
        try:
            pending.result()
        except (OSError, SafetensorError) as error:
            raise SaveError(
                f"{self._folder}: the checkpoint could not be written ({error}): free space there "
                "or give run: another disk; the same command goes on from the last good one"
            ) from error
        finally:
            self.waited += time.monotonic() - before

    def close(self) -> None:
        """End the thread; what is on its way is written first, its failure no longer matters."""
        self._pool.shutdown(wait=True)
