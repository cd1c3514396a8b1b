"""Samples on disk: packed into tar shards, read back fast in a known order.

What is listed in ``__all__`` is the public API; it is imported when it is first used.
``ShardSink`` is the old name of ``ShardWriter`` and stays for code that was written with it.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from shards.errors import CorruptSample, FetchError, FinishedError, ShardsError
    from shards.format.sample import Sample
    from shards.read.dataset import Dataset, open_dataset
    from shards.write.shard_writer import ShardWriter, pack

    ShardSink = ShardWriter

__all__ = [
    "CorruptSample",
    "Dataset",
    "FetchError",
    "FinishedError",
    "Sample",
    "ShardSink",
    "ShardWriter",
    "ShardsError",
    "open_dataset",
    "pack",
]
_PLACES = {
    "CorruptSample": "shards.errors",
    "Dataset": "shards.read.dataset",
    "FetchError": "shards.errors",
    "FinishedError": "shards.errors",
    "Sample": "shards.format.sample",
    "ShardWriter": "shards.write.shard_writer",
    "ShardsError": "shards.errors",
    "open_dataset": "shards.read.dataset",
    "pack": "shards.write.shard_writer",
    "ShardSink": "shards.write.shard_writer",
}
_OLD_NAMES = {"ShardSink": "ShardWriter"}


def __getattr__(name: str) -> Any:
    """Import a name of the public API (PEP 562)."""
    if name not in _PLACES:
        raise AttributeError(f"module 'shards' has no attribute {name!r}")
    found = getattr(import_module(_PLACES[name]), _OLD_NAMES.get(name, name))
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
