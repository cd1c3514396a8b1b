"""What extractors see of real images: computed once, then cached under its fingerprint.

A cached set is one safetensors file that says itself what it is of, so processes that write it at
the same time cannot mix theirs up; the JSON file next to it is for people.
"""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Collection, Sequence
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from dinogen.distributed import process_group
from dinogen.features.checkpoint import weights_sha256
from dinogen.files import write_bytes, write_json
from dinogen.metrics.collect import Moments, Seen, collect
from dinogen.metrics.extractors.base import ExtractorInfo, FeatureExtractor
from dinogen.metrics.fingerprint import Facts, fingerprint, fingerprint_id
from dinogen.metrics.sources import Reference

log = logging.getLogger(__name__)

CACHE = Path("~/.cache/dinogen/metrics")


def seen_of_reference(
    source: Reference,
    extractors: Sequence[FeatureExtractor],
    keep: Collection[str],
    batch: int,
    cache: Path | None = None,
) -> dict[str, Seen]:
    """What each feature extractor sees of real images; all ranks together.

    Args:
        source: the images.
        extractors: what sees them.
        keep: names of the feature extractors whose features are needed row by row.
        batch: images read at a time.
        cache: folder of stored sets; :data:`CACHE` unless given.
    """
    facts = source.facts()
    keys = {one.info.name: _key(one.info, source, facts) for one in extractors}
    folder = _expanded(cache or CACHE)
    found: dict[str, Seen] = {}
    for extractor in extractors:
        name = extractor.info.name
        seen = _load(folder, keys[name], extractor.info, name in keep)
        # each node may have its own cache, and ranks have to agree on what to compute
        if not process_group.any_rank(seen is None) and seen is not None:
            found[name] = seen
    missing = [extractor for extractor in extractors if extractor.info.name not in found]
    if missing:
        fresh = collect(source, missing, keep, batch).seen
        for name, seen in fresh.items():
            if process_group.local_rank() == 0:
                _store(folder, keys[name], seen)
        found |= fresh
    return found


def _key(extractor: ExtractorInfo, source: Reference, facts: Facts) -> Facts:
    """The fingerprint of no generated images at all: one set serves any number of them."""
    return fingerprint(extractor, source.resolution, 0, facts, source.num)


def _path(folder: Path, key: Facts) -> Path:
    return folder / f"{fingerprint_id(key)}.safetensors"


def _load(folder: Path, key: Facts, info: ExtractorInfo, keep: bool) -> Seen | None:
    """What was stored, if it is whole, of the same images, and has the rows if they are needed."""
    path = _path(folder, key)
    try:
        if not path.is_file():
            return None
        with safe_open(path, "pt") as file:
            said = file.metadata() or {}
            tensors: dict[str, Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        sound = weights_sha256(tensors) == said.get("sha256")
        of_these = json.loads(said.get("facts", "null")) == key
    except (OSError, ValueError, SafetensorError) as error:
        log.warning("%s: is damaged (%s): it is computed again", path, error)
        return None
    if not sound or not of_these:
        log.warning("%s: is damaged or of other images: it is computed again", path)
        return None
    features = tensors.get("features")
    if keep and features is None:
        return None
    return Seen(info, Moments.from_tensors(tensors), features if keep else None)


def _store(folder: Path, key: Facts, seen: Seen) -> None:
    """Write a set; a cache that cannot be written costs time the next time, and no metric value."""
    tensors = seen.moments.tensors()
    if seen.features is not None:
        tensors["features"] = seen.features.contiguous()
    metadata = {"facts": json.dumps(key), "sha256": weights_sha256(tensors)}
    path = _path(folder, key)
    try:
        write_bytes(path, save(tensors, metadata))
        write_json(path.with_suffix(".json"), key)
    except OSError as error:
        log.warning(
            "%s: cannot be written (%s), so these real images are read again the next time: set "
            "metrics.cache to another folder",
            path,
            error.strerror or error,
        )


def _expanded(folder: Path) -> Path:
    """A folder with its ``~`` written out; a user without a home has a cache of this machine."""
    try:
        return folder.expanduser()
    except RuntimeError:
        return Path(tempfile.gettempdir()) / "dinogen" / "metrics"
