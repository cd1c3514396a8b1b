"""One training at a time in the folder of a run, which has to be writable."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from dinogen.config import ConfigError
from dinogen.distributed import process_group
from dinogen.runs.layout import CONFIG, LOCK
from dinogen.runs.run import Run
from shards.files import Locked, lock


@contextmanager
def run_lock(run: Path) -> Iterator[None]:
    """Hold ``RUN/.lock`` on rank 0; the system lets go of it however the process ends.

    Raises:
        ConfigError: the same on every rank, if another process trains there, or if the folder
            cannot be written.
    """
    file: TextIO | None = None
    refused: str | None = None
    if process_group.is_main():
        try:
            file = _take(run)
        except (ConfigError, OSError) as error:
            refused = str(error)
    try:
        refused = process_group.broadcast_object(refused)  # or the others would wait for rank 0
        if refused is not None:
            told = ConfigError(refused)
            told.agreed = True
            raise told
        yield
    finally:
        if file is not None:
            file.close()


def _take(run: Path) -> TextIO:
    """The lock's file, open and locked.

    Raises:
        ConfigError: another process trains there, or the folder cannot be written.
    """
    path = run / LOCK
    for name in (LOCK, CONFIG):  # opening a pipe would wait for its other end
        if (run / name).exists() and not (run / name).is_file():
            raise ConfigError(f"{run / name}: it is not a regular file: move it away")
    try:
        run.mkdir(parents=True, exist_ok=True)
        _check_writable(run)
        file = path.open("w")
    except OSError as error:
        raise ConfigError(
            f"{error.filename or run}: {error.strerror}: choose a writable folder "
            "(run=), or make this one writable"
        ) from None
    if lock(file, path, shared=False, wait=False) is Locked.BUSY:
        file.close()
        raise ConfigError(
            f"run: another process trains in {run}{process_group.started_by_slurm()}: wait "
            "until it has ended, or set run= to another folder"
        )
    return file


def _check_writable(run: Path) -> None:
    """See that files can be made in the folders of a run and its stages, and be changed there.

    Raises:
        OSError: naming what cannot be written.
    """
    files = [run / LOCK]
    folders = [run]
    for stage in Run(run).begun:
        folders += [stage.folder, *(one for one in stage.folder.iterdir() if one.is_dir())]
        files += stage.folder.glob("*.jsonl")
    for folder in folders:
        try:
            with tempfile.TemporaryFile(dir=folder):
                pass
        except OSError as error:
            # it names a temporary file, which means nothing to anybody
            raise OSError(error.errno, error.strerror, str(folder)) from None
    for path in files:
        if path.exists() and not os.access(path, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
