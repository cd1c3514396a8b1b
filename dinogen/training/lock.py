"""One training at a time in the folder of a run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dinogen import dist
from dinogen.config import ConfigError
from shards.lock import Locked, lock


@contextmanager
def run_lock(run: Path) -> Iterator[None]:
    """Hold ``RUN/.lock`` on rank 0; the system lets go of it however the process ends.

    Raises:
        ConfigError: on every rank, if another process trains there.
    """
    file = None
    if dist.is_main():
        run.mkdir(parents=True, exist_ok=True)
        path = run / ".lock"
        file = path.open("w")
        if lock(file, path, shared=False, wait=False) is Locked.BUSY:
            file.close()
            file = None
    try:
        if dist.any_rank(dist.is_main() and file is None):
            raise ConfigError(
                f"run: another process trains in {run}{dist.started_by_slurm()}: wait until it has "
                "ended, or give run: another folder"
            )
        yield
    finally:
        if file is not None:
            file.close()
