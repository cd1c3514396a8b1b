"""Opens the shards of a run, and makes sure that all ranks see the same."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

from dinogen import dist
from dinogen.config import Config, ConfigError
from dinogen.errors import UserError
from shards.errors import ShardsError
from shards.read.dataset import Dataset
from shards.read.mixture import MixedDataset
from shards.read.packed import open_dataset


def open_data(config: Config) -> Dataset:
    """The dataset that a config names, or the mix of several; every rank has to call it.

    Raises:
        ConfigError: a folder is not there, or ranks see different datasets.
        ShardsError: there is none, or it cannot be used, or those of a mix contradict each other.
    """
    data = _open(config)
    _check_alike(config, data)
    return data


def data_or_reason(config: Config, unlike: Callable[[Dataset], None]) -> Dataset | UserError:
    """The dataset, or why there is none that can be used; every rank has to call it.

    Args:
        config: names it.
        unlike: raises a UserError if the data are not those that are wanted.
    """
    data: Dataset | None = None
    failure: str | None = None
    try:
        data = _open(config)
    except (UserError, ShardsError, OSError) as error:
        failure = f"{error}; if the data have moved, give data.path=FOLDER behind the command"
    else:
        try:
            unlike(data)
        except (UserError, ShardsError, OSError) as error:
            failure = str(error)
    if dist.any_rank(failure is not None) or data is None:
        return UserError(failure or "the data cannot be used on another rank")
    try:
        _check_alike(config, data)
    except ConfigError as error:
        return error
    return data


def _open(config: Config) -> Dataset:
    where = config.data
    paths = [one.path for one in where.mix] or [where.path]
    for number, path in enumerate(paths):
        _check_there(path, f"data.mix.{number}.path" if where.mix else "data.path")
    found = [open_dataset(path, where.cache_dir, where.cache_gb) for path in paths]
    if not where.mix:
        return found[0]
    # 0.1 means a tenth, and not the float next to it.
    return MixedDataset(found, [Fraction(repr(one.weight)) for one in where.mix])


def _check_alike(config: Config, data: Dataset) -> None:
    """Refuse data that are not the same on all ranks.

    Raises:
        ConfigError: on every rank.
    """
    mine = data_fingerprint(data)
    # A folder of each node's own may be another, and what is behind a URL may have just changed.
    if dist.any_rank(dist.broadcast_object(mine) != mine):
        raise ConfigError(
            f"{config.data.location}: ranks see different manifests: give data.path the same "
            f"dataset on all nodes, and do not pack into it while a run starts"
        )


def _check_there(path: str, key: str) -> None:
    """Name the key whose local folder is not there.

    Raises:
        ConfigError: it is not.
    """
    folder = Path(path)
    if "://" in path or folder.is_dir():
        return
    what = "is not a folder" if folder.exists() else "is not there"
    hint = "" if folder.is_absolute() else ": relative paths begin in the current folder"
    raise ConfigError(
        f"{key}: {path} {what} (looked for {folder.absolute()}{hint}): give {key}= the folder or "
        "URL of packed shards"
    )


def data_fingerprint(data: Dataset) -> str:
    """Hash of what the shards hold, and of their weights in a mix; their place does not matter."""
    parts: list[object] = []
    for one, weight in zip(data.sets, data.weights, strict=True):
        shards = [(s.name, s.num_samples, s.num_bytes, s.sha256) for s in one.manifest.shards]
        parts += shards if len(data.sets) == 1 else [str(weight), shards]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()
