"""What can be known to go wrong before the first step: every stage against data, ranks and past."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from typing import Any

import torch

from dinogen import dist
from dinogen.config import Config, ConfigError, StageConfig
from dinogen.families.base import family_class
from dinogen.training.checkpoint import Checkpoint, stage_checkpoint
from shards.dataset import Dataset, open_dataset

_MISSING = object()


def check_run(config: Config, indices: list[int]) -> None:
    """Check all stages that are to be trained, and what was trained of the run before.

    Raises:
        ConfigError: naming the key that does not fit the data, the ranks or a checkpoint.
    """
    data = open_dataset(config.data.path, cache_dir=config.data.cache_dir)
    for index in indices:
        _check_stage(config, config.stages[index], data)
    fingerprint = data_fingerprint(data)
    for stage in config.stages:
        checkpoint = stage_checkpoint(config, stage)
        if checkpoint is not None:
            check_same_run(checkpoint, config, stage, fingerprint)


def _check_stage(config: Config, stage: StageConfig, data: Dataset) -> None:
    """Levels, picture size and batch of one stage; its networks take no memory on ``meta``."""
    with torch.device("meta"):
        inputs = family_class(config.family.name)(config, stage, torch.device("meta")).inputs
    name, stored = f"stage {stage.resolution}", data.manifest.image_size
    missing = [level for level in inputs.levels if level not in data.manifest.levels]
    if missing:
        raise ConfigError(
            f"{config.data.path}: {name} reads the level {', '.join(missing)}, the shards have "
            f"{', '.join(data.manifest.levels) or 'none'}: prepare again with it (p for pooled, n "
            "for native: prepare.pyramids.kinds and prepare.pyramids.grids), or change family:"
        )
    if stored is not None and stage.resolution > stored:
        raise ConfigError(
            f"stages: {name} is larger than the pictures of {config.data.path} ({stored}x{stored}):"
            f" leave it out, or prepare again with prepare.faces.size={stage.resolution} or more"
        )
    if stage.batch < dist.world_size():
        raise ConfigError(
            f"stages: batch {stage.batch} of {name} is smaller than the number of ranks "
            f"{dist.world_size()}: each rank needs a picture"
        )


def check_same_run(
    checkpoint: Checkpoint, config: Config, stage: StageConfig, fingerprint: str
) -> None:
    """Refuse to go on from a checkpoint that another experiment wrote.

    Lengths (kimg), logging, checkpoint rhythm, engine, precision and microbatch may change: they
    alter what a step computes by rounding at most. Keys that the older config lacked count as equal
    to today's.

    Raises:
        ConfigError: naming the first key that contradicts.
    """
    then, now = checkpoint.state["config"], config.model_dump(mode="json")
    index = [s["resolution"] for s in now["stages"]].index(stage.resolution)
    sizes = [s["resolution"] for s in then["stages"]]
    pairs: list[tuple[str, Any, Any]] = [
        (name, then.get(name, _MISSING), now[name]) for name in ("seed", "family", "optim", "ema")
    ]
    old_stage = then["stages"][sizes.index(stage.resolution)]
    pairs += [
        (f"stages.{index}.{key}", old_stage.get(key, _MISSING), now["stages"][index][key])
        for key in ("fade_kimg", "batch", "lr")
    ]
    pairs += [
        (f"data.{key}", then["data"].get(key, _MISSING), now["data"][key])
        for key in ("split", "num_lanes", "window_shards", "on_error")
    ]
    pairs += [
        (f"{section}.{key}", then[section].get(key, _MISSING), now[section][key])
        for section, key in (("guide", "name"), ("guide", "layer"), ("engine", "clip_grad_norm"))
    ]
    for key, old, new in _leaves(pairs):
        if old is not _MISSING and old != new:
            raise ConfigError(
                f"{key}: the checkpoint {checkpoint.folder} was trained with {old}, the config "
                f"says {new}: put it back, or give run: another folder"
            )
    if checkpoint.state["data"] != fingerprint:
        raise ConfigError(
            f"data.path: {config.data.path} holds other shards than the checkpoint "
            f"{checkpoint.folder} was trained on: put them back, or give run: another folder"
        )


def data_fingerprint(data: Dataset) -> str:
    """Hash of what the shards hold; the folder's place does not matter."""
    shards = [(s.name, s.num_samples, s.num_bytes, s.sha256) for s in data.manifest.shards]
    return hashlib.sha256(json.dumps(shards).encode()).hexdigest()


def _leaves(pairs: list[tuple[str, Any, Any]]) -> Iterator[tuple[str, Any, Any]]:
    """Single values of nested sections."""
    for key, old, new in pairs:
        if isinstance(new, dict) and isinstance(old, dict):
            names = sorted(set(old) | set(new))
            inner = [(f"{key}.{n}", old.get(n, _MISSING), new.get(n)) for n in names]
            yield from _leaves(inner)
        else:
            yield key, old, new
