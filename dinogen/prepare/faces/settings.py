"""``settings.json`` in a folder of faces: how they were cut out, and from which photos."""

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

from dinogen.config import FacesConfig
from dinogen.prepare.photos.read import PrepareError
from shards.files import Locked, lock
from shards.image.kinds import is_hidden

SETTINGS = "settings.json"
# How far too far right and down landmarks were put, pixels. Absent in settings of versions that
# put them there.
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
    """The settings that the crops depend on, besides the photos; JSON values."""
    # Settings of speed do not change the result.
    settings = config.model_dump(mode="json", exclude={"batch", "num_threads"})
    if config.detect != "none" and landmark_offset != _EARLIER_OFFSET:
        settings[_OFFSET] = landmark_offset
    return settings


def landmark_offset_of(saved: Mapping[str, Any]) -> float:
    """How far too far right and down landmarks were put with these settings, pixels.

    Args:
        saved: from :func:`faces_settings` of this or an earlier version; empty if there are no
            faces yet.
    """
    return float(saved.get(_OFFSET, _EARLIER_OFFSET)) if saved else 0.0


def warn_of_offset(out: Path, landmark_offset: float) -> None:
    """Warn if work continues in the way of an earlier version."""
    if landmark_offset:
        _logger.warning(
            "%s: its faces were cut out by an earlier version of dinogen, which put landmarks "
            "%g px too far right and down. New ones are cut out in the same way, so that all are "
            "alike. Choose another folder to cut out all of them correctly",
            out,
            landmark_offset,
        )


def current_settings(saved: dict[str, Any]) -> dict[str, Any]:
    """What :func:`faces_settings` of an older version saved, with current names and defaults."""
    try:
        config = {name: value for name, value in saved.items() if name != _OFFSET}
        offset = landmark_offset_of(saved)
        return faces_settings(FacesConfig.model_validate(config), offset) if saved else {}
    except ValidationError:
        return saved


@contextmanager
def exclusive_in(folder: Path, command: str) -> Iterator[None]:
    """Keep other processes of the same command out of a folder, which is created if missing.

    A read-only folder needs no lock.

    Raises:
        PrepareError: another process holds the lock.
    """
    folder.mkdir(parents=True, exist_ok=True)
    busy = (
        f"{folder}: another `dinogen {command}` is running in this folder: wait until it has "
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
    """Open a lock file and hold its lock; the system releases it when the process ends.

    Args:
        path: of the file.
        busy: error message if another process holds it.

    Raises:
        PrepareError: another process holds it.
        OSError: the file cannot be written.
    """
    while True:
        file = path.open("w")
        if lock(file, path, shared=False, wait=False) is Locked.BUSY:
            file.close()
            raise PrepareError(busy)
        # The previous holder may have removed the file between the two calls above.
        with suppress(FileNotFoundError):
            if os.path.samestat(path.stat(), os.fstat(file.fileno())):
                return file
        file.close()


@contextmanager
def removed_at_end(path: Path) -> Iterator[None]:
    """Remove a lock file when the work is done; the lock itself ends with its process."""
    try:
        yield
    finally:
        path.unlink(missing_ok=True)


def check_settings(
    src: Path, out: Path, config: FacesConfig, classes: tuple[str, ...]
) -> tuple[float, dict[str, Any] | None]:
    """Make sure that a folder of faces was made in the same way; nothing is written.

    Returns:
        How far too far right and down landmarks have to be put, pixels, to match existing faces.
        And the settings to write before the first face; None if they are already written.

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
                f"if the photos have only moved, change src in {path} to {settings['src']}"
            )
        old = current_settings(before["faces"]) | {"classes of the photos": before.get("classes")}
        offset = landmark_offset_of(before["faces"]) if config.detect != "none" else 0.0
        requested = faces_settings(config, offset)
        new = requested | {"classes of the photos": settings.get("classes")}
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
