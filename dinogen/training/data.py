"""The data of a run: opened alike on all ranks, with levels and labels that fit the family."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Collection, Iterable
from fractions import Fraction
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from dinogen.batch import Batch
from dinogen.config import Config, ConfigError
from dinogen.distributed import process_group
from dinogen.errors import UserError
from dinogen.families.base import Family
from dinogen.families.registry import family_class
from shards.errors import ShardsError
from shards.format.sample import LATENTS, OF_LATENTS, VECTORS, flipped_guide, level_guide
from shards.read.batch import PackedSource
from shards.read.dataset import Dataset, open_dataset
from shards.read.mixture import MixedDataset


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
    if process_group.any_rank(failure is not None) or data is None:
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
    if process_group.any_rank(process_group.broadcast_object(mine) != mine):
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


log = logging.getLogger(__name__)

_LABELS = 1 << 14  # read at a time


def check_classes(config: Config, data: Dataset) -> None:
    """Classes that the manifest tells of against the family's ``num_classes``.

    Raises:
        ConfigError: naming ``family.num_classes``.
    """
    path, wanted = config.data.location, config.family.options.get("num_classes")
    if not data.manifest.has_labels:
        fault = data.label_fault(config.data.split)
        raise ConfigError(
            f"family.num_classes: the samples of {path} have no labels"
            f"{f' that are numbers ({fault})' if fault else ''}: prepare photos in one folder per "
            "class (docs/data-format.md), or set it to 0"
        )
    classes = data.manifest.classes
    if classes and len(classes) != wanted:
        raise ConfigError(
            f"family.num_classes: {wanted}, but {path} has {len(classes)} classes "
            f"({', '.join(classes)}): set it to {len(classes)}"
        )


def class_shares(family: Family, data: Dataset | UserError) -> tuple[float, ...] | None:
    """How frequent each class is among what a family is trained on; every rank has to call it.

    Args:
        family: reads labels.
        data: of its run; a mix counts each dataset by its weight.

    Returns:
        Shares by label, their sum 1; None, with a warning, where the data are not available or
        hold labels of no class: samples are then of each class in turn.
    """
    num_classes = int(family.config.family.options.get("num_classes") or 0)
    shares = np.zeros(num_classes)
    failure: Exception | None = data if isinstance(data, UserError) else None
    try:
        if not isinstance(data, UserError):
            total = float(sum(data.weights))
            for one, weight in zip(data.sets, data.weights, strict=True):
                counts = _counts(one, family.config.data.split, num_classes)
                shares += float(weight) / total * counts / counts.sum()
    except (ShardsError, ValueError, OSError) as error:
        failure = error
    if process_group.any_rank(failure is not None):
        if process_group.is_main():
            log.warning(
                "CLASSES IN TURN: how frequent each is in the data is not known (%s), so metric "
                "values compare only with others measured this way",
                failure or "on another rank",
            )
        return None
    return tuple(shares.tolist())


def _counts(data: PackedSource, split: str, num_classes: int) -> npt.NDArray[np.float64]:
    """Samples of a split by their label."""
    num = data.num_samples(split)
    counts = np.zeros(num_classes)
    for start in range(0, num, _LABELS):
        batch = data.read(list(range(start, min(start + _LABELS, num))), split=split)
        found = np.bincount(batch["label"].numpy(), minlength=num_classes)
        if len(found) > num_classes:
            raise ConfigError(f"{data.location}: label {len(found) - 1} is not one of the classes")
        counts += found
    if not counts.sum():
        raise ConfigError(f"{data.location}: split {split} has no samples")
    return counts


def check_labels(family: Family, batch: Batch) -> None:
    """Refuse labels that are not among the family's classes, where it reads them.

    A manifest need not name classes, and to read the labels of all shards first would fetch every
    index of what lies behind a URL. On a GPU such a label ends in an assertion that names nothing.

    Args:
        family: reads the batch.
        batch: on the CPU.

    Raises:
        ConfigError: naming ``family.num_classes`` and a sample.
    """
    num_classes = family.config.family.options.get("num_classes")
    if not family.inputs.labels or num_classes is None:
        return
    for key, label in zip(batch["key"], batch["label"].tolist(), strict=True):
        if not 0 <= label < num_classes:
            remedy = f"set it to {label + 1} or more" if label > 0 else "labels begin at 0"
            raise ConfigError(
                f"family.num_classes: {num_classes}, but sample {key} of "
                f"{family.config.data.location} has label {label}: {remedy}, or pack the data "
                "again with labels from 0"
            )


def makes_pyramids(config: Config) -> bool:
    """Whether data for a run get pyramids, as ``prepare.pyramids.make`` says.

    Raises:
        ConfigError: there is no such family, or an option of it is wrong; or it reads features of
            mirrored images, which would not be made.
    """
    make = config.prepare.pyramids.make
    return make == "always" or (make == "auto" and reads_pyramids(config))


def makes_features(config: Config) -> bool:
    """Whether data for a run get any levels: pyramids, embeddings (``clip:``) or latents.

    Raises:
        ConfigError: there is no such family, or an option of it is wrong.
    """
    others = (config.clip, config.prepare.latents)
    return any(one is not None for one in others) or makes_pyramids(config)


def reads_pyramids(config: Config) -> bool:
    """Whether the family reads a level of a guide in any stage.

    Raises:
        ConfigError: there is no such family, or an option of it is wrong; or it reads features of
            mirrored images, and the config does not make them.
    """
    levels = levels_read(config)
    mirrored = {flipped_guide(name) for name in ("", *config.guides)}
    lacking = sorted({level for level in levels if level_guide(level) in mirrored})
    if lacking and not config.prepare.pyramids.flips:
        raise ConfigError(
            f"prepare.pyramids.flips: false, but family {config.family.name} reads "
            f"{', '.join(lacking)}, since augment.flip mirrors images: set it to true, or "
            "augment.flip to 0"
        )
    return any_of_a_guide(levels)


def any_of_a_guide(levels: Iterable[str]) -> bool:
    """Whether a guide makes one of these levels, and not CLIP or an autoencoder."""
    return any(one not in VECTORS and level_guide(one) not in OF_LATENTS for one in levels)


def check_latents(config: Config, made: Collection[str]) -> None:
    """Refuse to prepare data without the latents that the family of the config reads.

    Args:
        config: of the run.
        made: levels that an autoencoder makes of the images; none without ``prepare.latents``.

    Raises:
        ConfigError: naming the key and the remedy.
    """
    lacking = [one for one in levels_read(config) if level_guide(one) in OF_LATENTS]
    lacking = [one for one in lacking if one not in made]
    if not lacking:
        return
    name = config.family.name
    if not made:
        raise ConfigError(
            f"prepare.latents: family {name} reads latents ({lacking[0]}): name the autoencoder "
            "that makes them, prepare.latents.path=..."
        )
    if all(level_guide(one) != LATENTS for one in lacking):
        raise ConfigError(
            f"prepare.latents.flips: family {name} reads latents of mirrored images "
            f"({lacking[0]}), as augment.flip is {config.augment.flip:g}: set it to true, or "
            "augment.flip to 0"
        )
    raise ConfigError(
        f"prepare.latents.path: family {name} reads {lacking[0]}, and this autoencoder makes "
        f"{', '.join(made)} of images of {config.prepare.faces.size} pixels: prepare.faces.size "
        "has to be the resolution of the stage, and family.latent.factor that of the autoencoder"
    )


def levels_read(config: Config) -> list[str]:
    """The levels that the family reads in any stage; its networks take no memory on ``meta``."""
    cls, nowhere = family_class(config.family), torch.device("meta")
    with nowhere:
        levels = [cls(config, stage, nowhere).inputs.levels for stage in config.stages]
    return [level for stage in levels for level in stage]
