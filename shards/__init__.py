"""Samples on disk: packed into tar shards, read back fast in a known order."""

from shards.errors import CorruptSample, FetchError, FinishedError, ShardsError
from shards.format.sample import Sample
from shards.read.dataset import Dataset
from shards.read.packed import open_dataset
from shards.write.pack import pack
from shards.write.shard_writer import ShardSink

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
