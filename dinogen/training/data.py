"""Opens the shards of a run, and makes sure that all ranks see the same."""

from __future__ import annotations

import hashlib
import json

from dinogen import dist
from dinogen.config import Config, ConfigError
from shards.dataset import Dataset, open_dataset


def open_data(config: Config) -> Dataset:
    """The dataset that a config names; every rank has to call it.

    Raises:
        ConfigError: ranks see different datasets.
        ShardsError: there is none, or it cannot be used.
    """
    where = config.data
    data = open_dataset(where.path, cache_dir=where.cache_dir, cache_gb=where.cache_gb)
    mine = data_fingerprint(data)
    # A folder of each node's own may be another, and what is behind a URL may have just changed.
    if dist.any_rank(dist.broadcast_object(mine) != mine):
        raise ConfigError(
            f"{where.path}: ranks see different manifests: give data.path the same dataset on all "
            f"nodes, and do not pack into it while a run starts"
        )
    return data


def data_fingerprint(data: Dataset) -> str:
    """Hash of what the shards hold; the folder's place does not matter."""
    shards = [(s.name, s.num_samples, s.num_bytes, s.sha256) for s in data.manifest.shards]
    return hashlib.sha256(json.dumps(shards).encode()).hexdigest()
