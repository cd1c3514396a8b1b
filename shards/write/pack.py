"""Packs samples into a dataset: shards, statistics, manifest; resumable, always the same bytes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from shards.errors import PackError, show_name
from shards.format.manifest import Manifest
from shards.format.sample import Sample
from shards.write.shard_writer import ShardWriter


def pack(
    samples: Iterable[Sample],
    out: Path,
    *,
    shard_size: int = 1000,
    val_fraction: float = 0.0,
    test_fraction: float = 0.0,
    guide: dict[str, Any] | None = None,
    prepare: dict[str, Any] | None = None,
    classes: Sequence[str] = (),
    guides: Mapping[str, dict[str, Any]] | None = None,
    clip: dict[str, Any] | None = None,
) -> Manifest:
    """Write samples as a dataset into the folder `out`.

    An interrupted packing resumes after its last whole shard, if the settings are the same; the
    result has the same bytes as an uninterrupted one.

    Args:
        samples: in the order in which they are written.
        out: folder, created if missing.
        shard_size: samples per tar.
        val_fraction: fraction of the keys, chosen by their hash, that goes to the split `val`.
        test_fraction: the same for `test`.
        guide: identity of the feature network, for the manifest.
        prepare: settings of the preparation, for the manifest.
        classes: names of the classes that labels 0, 1, ... mean; then every sample has one.
        guides: identities of further feature networks, by the names that their levels begin with.
        clip: identity of the network that made the levels "clip" and "text".

    Raises:
        FinishedError: if `out` holds a finished dataset.
        PackError: naming the key or folder and what is wrong with it.
    """
    writer = ShardWriter(
        out,
        shard_size=shard_size,
        val_fraction=val_fraction,
        test_fraction=test_fraction,
        guide=guide,
        prepare=prepare,
        classes=classes,
        guides=guides,
        clip=clip,
    )
    with writer:
        for sample in samples:
            writer.add(sample)
        lost = writer.completed_keys() - writer.seen
        if lost:
            raise PackError(
                f"{out}: key '{show_name(min(lost))}' of the interrupted packing is no longer in "
                f"the input; delete the folder and pack again"
            )
        return writer.finish()
