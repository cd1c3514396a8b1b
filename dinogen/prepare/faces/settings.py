"""``settings.json`` in a folder of faces: how they were cut out, and of which photos."""

from __future__ import annotations

import errno
import json
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from itertools import chain
from pathlib import Path
from typing import IO, Any

from pydantic import ValidationError

from dinogen.config.prepare import FacesConfig
from dinogen.prepare.photos.read import PrepareError
from shards.image.kinds import is_hidden
from shards.lock import Locked, lock

SETTINGS = "settings.json"
# How far right and down of their places landmarks were put, pixels. Silence is what versions did
# that did not know of it.
_OFFSET = "landmark_offset"
_EARLIER_OFFSET = 0.5

_logger = logging.getLogger(__name__)


def read_settings(folder: Path) -> tuple[dict[str, Any], tuple[str, ...]] | None:
    """Settings of the faces in a folder and names of their classes.

    Returns:
        None if ``dinogen faces`` did not write the folder.
    """
    path = folder / SETTINGS
    if not path.is_file():
        return None
    found = read_json(path)
    return found.get("faces", {}), tuple(found.get("classes", ()))


def faces_settings(config: FacesConfig, landmark_offset: float = 0.0) -> dict[str, Any]:
    """What decides the crops, besides the photos; JSON values."""
    # How fast the work is done does not change what comes out.
    settings = config.model_dump(mode="json", exclude={"batch", "num_threads"})
    if config.detect != "none" and landmark_offset != _EARLIER_OFFSET:
        settings[_OFFSET] = landmark_offset
    return settings


def landmark_offset_of(saved: Mapping[str, Any]) -> float:
    """How far right and down landmarks were put where these settings were saved, pixels.

    Args:
        saved: by :func:`faces_settings` of this or an earlier version; empty means that there are
            no faces yet.
    """
    return float(saved.get(_OFFSET, _EARLIER_OFFSET)) if saved else 0.0


def warn_of_offset(out: Path, landmark_offset: float) -> None:
    """Say that work goes on as an earlier version began it, if it does."""
    if landmark_offset:
        _logger.warning(
            "%s: its faces were cut out by an earlier version of dinogen, which put landmarks "
            "%g px too far right and down. New ones are cut out the same way, so that all are "
            "alike. Choose another folder to have all of them right",
            out,
            landmark_offset,
        )


def todays_settings(saved: dict[str, Any]) -> dict[str, Any]:
    """What :func:`faces_settings` of an older version saved, by today's names and defaults."""
    try:
        config = {name: value for name, value in saved.items() if name != _OFFSET}
        offset = landmark_offset_of(saved)
        return faces_settings(FacesConfig.model_validate(config), offset) if saved else {}
    except ValidationError:
        return saved


@contextmanager
def alone_in(folder: Path, command: str) -> Iterator[None]:
    """Keep other processes of the same command out of a folder, which is made if missing.

    A folder that cannot be written needs no lock.

    Raises:
        PrepareError: another process holds the lock.
    """
    folder.mkdir(parents=True, exist_ok=True)
    busy = (
        f"{folder}: another `dinogen {command}` is at work in this folder: wait until it has "
        "ended, or choose another folder"
    )
    try:
        file = locked(folder / f".{command}.lock", busy)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise
        yield
        return
    with file, removed_at_end(folder / f".{command}.lock"):
        yield


def locked(path: Path, busy: str) -> IO[str]:
    """Open a lock file and hold its lock; the system lets go of it when the process ends.

    Args:
        path: of the file.
        busy: what to say if another process holds it.

    Raises:
        PrepareError: another process does.
        OSError: the file cannot be written.
    """
    while True:
        file = path.open("w")
        if lock(file, path, shared=False, wait=False) is Locked.BUSY:
            file.close()
            raise PrepareError(busy)
        # Whoever held it before may have removed the file between the two calls above.
        with suppress(FileNotFoundError):
            if os.path.samestat(path.stat(), os.fstat(file.fileno())):
                return file
        file.close()


@contextmanager
def removed_at_end(path: Path) -> Iterator[None]:
    """Remove a lock file when the work is done; the lock itself goes with its process."""
    try:
        yield
    finally:
        path.unlink(missing_ok=True)


def check_settings(
    src: Path, out: Path, config: FacesConfig, classes: tuple[str, ...]
) -> tuple[float, dict[str, Any] | None]:
    """Make sure that what lies in a folder of faces was made alike; nothing is written.

    Returns:
        How far right and down landmarks are to be put, pixels: as in what lies there. And the
        settings to be written before the first face, None where they stand there already.

    Raises:
        PrepareError: the folder holds something else, or faces of other photos or settings.
    """
    settings: dict[str, Any] = {"src": str(src.resolve()), "faces": faces_settings(config)}
    if classes:
        settings["classes"] = list(classes)
    if out.exists() and not out.is_dir():
        raise PrepareError(f"{out}: is a file: choose a folder")
    path = out / SETTINGS
    if path.exists() and any(chain(out.glob("*.jpg"), out.glob("*.png"))):
        before = read_json(path)
        if before["src"] != settings["src"]:
            raise PrepareError(
                f"{out}: holds faces of other photos ({before['src']}): choose another folder; "
                f"if the photos have only moved, write their place into {path}"
            )
        old = todays_settings(before["faces"]) | {"classes of the photos": before.get("classes")}
        offset = landmark_offset_of(before["faces"]) if config.detect != "none" else 0.0
        asked = faces_settings(config, offset)
        new = asked | {"classes of the photos": settings.get("classes")}
        changed = [f"{k} {old.get(k)} is now {v}" for k, v in new.items() if old.get(k) != v]
        if changed:
            raise PrepareError(
                f"{out}: holds faces made with other settings ({', '.join(changed)}): choose "
                "another folder, or delete this one"
            )
        return offset, None
    there = list(out.iterdir()) if out.exists() else []
    if not path.exists() and not all(is_hidden(item.name) for item in there):
        raise PrepareError(
            f"{out}: is not empty and was not written by 'dinogen faces': choose another folder"
        )
    return 0.0, settings


def read_json(path: Path) -> dict[str, Any]:
    """A file that ``dinogen faces`` wrote.

    Raises:
        PrepareError: it is missing or damaged.
    """
    try:
        value: dict[str, Any] = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise PrepareError(f"{path}: missing: delete the image beside it and run again") from None
    except ValueError as error:
        raise PrepareError(f"{path}: not JSON ({error}): delete it and run again") from None
    return value
