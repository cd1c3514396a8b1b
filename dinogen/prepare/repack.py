"""A dataset that takes the place of an older one when it is finished, and not before."""

from __future__ import annotations

import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from dinogen.prepare.faces.folder import REJECTED
from dinogen.prepare.faces.settings import locked, removed_at_end
from dinogen.prepare.finished import begun_with, keys_of
from dinogen.prepare.journal import JOURNAL
from dinogen.prepare.photos.changed import PHOTOS, looks_like_an_accident
from dinogen.prepare.photos.find import counted
from dinogen.prepare.photos.read import PrepareError
from dinogen.prepare.photos.summary import SUMMARY
from shards.errors import PackError
from shards.format.manifest import MANIFEST, PACKING
from shards.lock import is_locked

_OURS = frozenset({MANIFEST, PACKING, PHOTOS, REJECTED, SUMMARY, JOURNAL, "stats.safetensors"})
_SHARD = re.compile(r"(train|val|test)-[0-9]{5,}\.(tar|index\.npz)|\..*\.tmp|\.packing\.lock")

T = TypeVar("T")

_logger = logging.getLogger(__name__)


def repack(out: Path, work: Callable[[Path], T]) -> T:
    """Pack into a hidden folder beside ``out`` that takes the place of ``out`` when it is done.

    Until then ``out`` stays as it is, and after a kill the same call goes on, or begins again if
    what lies there does not fit any more. Of the older dataset only what dinogen wrote is removed,
    and not even that if most of its samples are in the new one no more: then it is kept as
    ``OUT.before-repack``.

    Args:
        out: folder of a dataset, finished or not, that was packed from faces or photos.
        work: packs into the folder that it is called with.

    Raises:
        PrepareError: ``out`` holds something else or cannot be renamed, or another process packs
            it again; ``out`` is as it was.
    """
    target = out.resolve()
    fresh = target.with_name(f".{target.name}.repack")
    before = target.with_name(f"{target.name}.before-repack")
    if _is_mounted(target):
        raise PrepareError(
            f"{out}: is a mount point, so no other folder can take its place: pack into a new "
            "folder inside or elsewhere"
        )
    with _alone(out, target.with_name(f".{target.name}.repack.lock")):
        if before.exists() and not target.exists():
            before.rename(target)  # killed between the two renames of _swap
            _logger.warning("%s: put back from %s, where a kill had left it", out, before)
        if before.exists():
            raise PrepareError(f"{before}: is in the way: move it elsewhere, or delete it")
        _check_ours(out)
        is_stale = fresh.is_dir() and any(fresh.iterdir())
        if is_stale:
            _logger.warning("%s: an earlier --repack was interrupted: going on with it", fresh)
        try:
            result = work(fresh)
        except (PrepareError, PackError) as error:
            if not is_stale or is_locked(fresh / ".packing.lock"):
                raise
            _logger.warning(
                "%s: does not fit any more (%s): removed, beginning again", fresh, error
            )
            shutil.rmtree(fresh)
            result = work(fresh)
        if (fresh / MANIFEST).is_file():
            _swap(out, target, fresh, before)
    return result


def tell_interrupted(out: Path) -> None:
    """Say that an earlier --repack of ``out`` was interrupted, if one was."""
    target = out.resolve()
    fresh = target.with_name(f".{target.name}.repack")
    before = target.with_name(f"{target.name}.before-repack")
    if before.exists() and not target.exists():
        _logger.warning(
            "%s: is in %s, where an interrupted --repack has left it: rename it back", out, before
        )
    if fresh.exists() and not is_locked(fresh.with_name(f"{fresh.name}.lock")):
        _logger.warning(
            "%s: left by an interrupted --repack: add --repack to go on with it, or delete it",
            fresh,
        )


def _swap(out: Path, target: Path, fresh: Path, before: Path) -> None:
    """Put the finished dataset in ``fresh`` in the place of the one in ``target``."""
    if not target.exists():
        fresh.rename(target)
        return
    old_keys, new_keys = keys_of(target), keys_of(fresh)
    try:
        target.rename(before)
    except OSError as error:
        raise PrepareError(
            f"{out}: cannot be renamed ({error.strerror}), so it stays as it was. The new dataset "
            f"is complete in {fresh}: move it where you need it"
        ) from None
    try:
        fresh.rename(target)
    except OSError as error:
        before.rename(target)
        raise PrepareError(
            f"{fresh}: cannot be renamed to {target} ({error.strerror}), which stays as it was. "
            f"The new dataset is complete in {fresh}: move it where you need it"
        ) from None
    num_gone = len(old_keys - new_keys)
    if looks_like_an_accident(num_gone, len(old_keys)):
        _logger.warning(
            "%s: %d of %s of the dataset before not in it. That one is kept in %s: delete it if "
            "that is right",
            out,
            num_gone,
            counted(len(old_keys), "sample"),
            before,
        )
        return
    for path in list(before.iterdir()):
        if path.name in _OURS or _SHARD.fullmatch(path.name):
            path.unlink()
        elif not (target / path.name).exists():
            path.rename(target / path.name)
    if any(before.iterdir()):
        _logger.warning("%s: holds files that were beside the dataset before", before)
    else:
        before.rmdir()
    _logger.info(
        "%s: packed again: %d new, %d gone of the samples", out, len(new_keys - old_keys), num_gone
    )


@contextmanager
def _alone(out: Path, path: Path) -> Iterator[None]:
    """Keep other processes from packing the same dataset again; the lock goes with its holder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        file = locked(path, f"{out}: another process packs it again: wait until it has ended")
    except OSError as error:
        raise PrepareError(
            f"{path.parent}: cannot be written ({error.strerror}), and a new dataset is made there "
            f"before it takes the place of {out}: pack into a new folder elsewhere"
        ) from None
    with file, removed_at_end(path):
        yield


def _is_mounted(folder: Path) -> bool:
    """Whether a folder is a mount point, bind mounts included."""
    if folder.is_mount():
        return True
    try:
        lines = Path("/proc/self/mountinfo").read_bytes().splitlines()
    except OSError:  # not Linux
        return False
    wanted = os.fsencode(folder)
    return any(
        re.sub(rb"\\([0-7]{3})", lambda m: bytes([int(m[1], 8)]), line.split()[4]) == wanted
        for line in lines
    )


def _check_ours(out: Path) -> None:
    """Raise PrepareError unless ``out`` is missing, empty or a dataset packed from photos."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if "faces" not in begun_with(out):
        raise PrepareError(
            f"{out}: was not packed from photos or faces, so it cannot be packed again: choose "
            "another folder"
        )
