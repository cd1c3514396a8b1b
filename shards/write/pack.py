"""Samples to a dataset: shards, statistics, manifest; resumable, the same bytes every time."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from shards.errors import PackError, show_name
from shards.format.manifest import Manifest
from shards.format.sample import Sample
from shards.write.shard_writer import ShardSink


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

    An interrupted packing is taken up where its last whole shard ended, if the settings are the
    same; the result has the same bytes as an uninterrupted one.

    Args:
        samples: in the order in which they are written.
        out: folder, made if need be.
        shard_size: samples per tar.
        val_fraction: part of the keys, by their hash, that goes to the split `val`.
        test_fraction: likewise for `test`.
        guide: identity of the feature network, for the manifest.
        prepare: settings of the preparation, for the manifest.
        classes: names of the classes that labels 0, 1, ... mean; then every sample has one.
        guides: identities of further feature networks, by the names that their levels begin with.
        clip: identity of the network that made the levels "clip" and "text".

    Raises:
        FinishedError: if `out` holds a finished dataset.
        PackError: naming the key or folder and what is wrong with it.
    """
    sink = ShardSink(
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
    with sink:
        for sample in samples:
            sink.add(sample)
        lost = sink.completed_keys() - sink.seen
        if lost:
            raise PackError(
                f"{out}: key '{show_name(min(lost))}' of the interrupted packing is not in the "
                f"input any more; delete the folder and pack again"
            )
        return sink.finish()
