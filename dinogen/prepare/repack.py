"""A dataset that takes the place of an older one when it is finished, and not before."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dinogen.prepare.changed import PHOTOS, looks_like_an_accident
from dinogen.prepare.faces import REJECTED
from dinogen.prepare.finished import begun_with, keys_of
from dinogen.prepare.journal import JOURNAL
from dinogen.prepare.read import PrepareError
from dinogen.prepare.summary import SUMMARY
from shards.manifest import MANIFEST, PACKING

_OURS = frozenset({MANIFEST, PACKING, PHOTOS, REJECTED, SUMMARY, JOURNAL, "stats.safetensors"})
_SHARD = re.compile(r"(train|val|test)-[0-9]{5,}\.(tar|index\.npz)|\..*\.tmp|\.packing\.lock")

_logger = logging.getLogger(__name__)


@contextmanager
def repacked(out: Path) -> Iterator[Path]:
    """A folder to pack into; when that is done it takes the place of ``out``.

    Until then ``out`` stays as it is, and after a kill the same call goes on. Of the older dataset
    only what dinogen wrote is removed, and not even that if most of its samples are in the new one
    no more: then it is kept as ``OUT.before-repack``.

    Args:
        out: folder of a dataset, finished or not, that was packed from faces or photos.

    Yields:
        A hidden folder beside ``out``.

    Raises:
        PrepareError: ``out`` holds something else.
    """
    target = out.resolve()
    fresh = target.with_name(f".{target.name}.repack")
    before = target.with_name(f"{target.name}.before-repack")
    if before.exists() and not target.exists():
        before.rename(target)  # killed between the two renames below
    if before.exists():
        raise PrepareError(f"{before}: is in the way: move it elsewhere, or delete it")
    _check_ours(out)
    yield fresh
    if not (fresh / MANIFEST).is_file():
        return
    if not target.exists():
        fresh.rename(target)
        return
    old_keys, new_keys = keys_of(target), keys_of(fresh)
    target.rename(before)
    fresh.rename(target)
    num_gone = len(old_keys - new_keys)
    if looks_like_an_accident(num_gone, len(old_keys)):
        _logger.warning(
            "%s: %d of the %d samples before are not in it. The dataset before is kept in %s: "
            "delete it if that is right",
            out,
            num_gone,
            len(old_keys),
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
        "%s: packed again: %d samples are new, %d gone", out, len(new_keys - old_keys), num_gone
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
