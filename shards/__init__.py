"""Samples on disk: packed into tar shards, read back fast in a known order."""

from shards.dataset import Dataset
from shards.errors import CorruptSample, FetchError, FinishedError, ShardsError
from shards.pack import pack
from shards.packed import open_dataset
from shards.sample import Sample
from shards.sink import ShardSink

__all__ = [
    "CorruptSample",
    "Dataset",
    "FetchError",
    "FinishedError",
    "Sample",
    "ShardSink",
    "ShardsError",
    "open_dataset",
    "pack",
]
