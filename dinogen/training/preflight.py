"""Errors found before the first step: each stage against data, ranks and checkpoints."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from dinogen.config import (
    FAMILY_PLACES,
    AugmentConfig,
    Config,
    ConfigError,
    StageConfig,
    find_stage,
)
from dinogen.distributed import process_group
from dinogen.families.abilities import ChecksData, MeasuresHeldOut, trained_parameters
from dinogen.families.base import Family
from dinogen.families.registry import family_class, resolve
from dinogen.metrics.registry import chosen_names
from dinogen.training.checkpointing.checkpoint import (
    Checkpoint,
    NewestCheckpoints,
    check_same_data,
    or_a_new_run,
)
from dinogen.training.data import check_classes, data_fingerprint
from dinogen.training.logging.sinks.registry import check_sinks
from shards.format.sample import OF_LATENTS, is_flipped, level_guide
from shards.read.dataset import Dataset

log = logging.getLogger(__name__)
_NAMED = 8  # classes in a message, at most
# What may differ from one part of a run to the next: places, lengths, what is logged and kept, and
# what alters a step by rounding at most. Guide and data are compared by hashes of what they hold.
MAY_CHANGE: dict[str, Any] = {
    "run": True,
    "prepare": True,
    "checkpoint": True,
    "log": True,
    "logging": True,
    "cluster": True,
    "notes": True,
    "metrics": True,
    "device": True,
    "eval": True,
    "stages": True,  # all but the one at hand, which is compared without its length
    "family": {"file": True, **FAMILY_PLACES},
    "guide": {"file", "path", "revision"},
    "guides": {"__all__": {"file", "path", "revision"}},
    "clip": {"path", "revision"},
    "data": {"path", "mix", "num_threads", "cache_dir", "cache_gb"},
    "engine": {"name", "zero", "precision", "micro_batch", "compile", "max_nonfinite"},
}


def check_run(
    config: Config,
    indices: list[int],
    data: Dataset,
    checkpoints: NewestCheckpoints | None = None,
    ranks: Mapping[int, int] | None = None,
) -> list[Family]:
    """Check all stages that are to be trained, and what was trained of the run before.

    Args:
        config: the whole run.
        indices: of the stages.
        data: what it is trained on.
        checkpoints: of the run; looked for here unless given.
        ranks: see :func:`check_config`.

    Returns:
        As :func:`check_config`.

    Raises:
        ConfigError: naming the key that does not fit the data, the ranks or a checkpoint.
    """
    families = check_config(config, indices, ranks)
    for index in indices:
        _check_stage(config, families[index], data)
    _check_image_sizes(config, [families[index] for index in indices], data)
    _check_sizes_of_classes(config, [families[index] for index in indices], data)
    fingerprint = data_fingerprint(data)
    checkpoints = checkpoints or NewestCheckpoints(config.run)
    for stage in config.stages:
        checkpoint = checkpoints.of(stage.resolution)
        if checkpoint is not None:
            check_same_run(checkpoint, config, stage, fingerprint)
    return families


def check_config(
    config: Config, indices: list[int], ranks: Mapping[int, int] | None = None
) -> list[Family]:
    """The part of :func:`check_run` that needs neither data nor checkpoints.

    Args:
        config: the whole run.
        indices: of the stages that are to be trained.
        ranks: number of processes by resolution; the present ones unless given.

    Returns:
        The family at every stage of the run; its networks take no memory on ``meta``.

    Raises:
        ConfigError: naming the key.
    """
    check_sinks(config)
    chosen_names(config.metrics.names, "metrics.names")
    chosen_names(config.eval.generated, "eval.generated")
    families = [_on_meta(config, stage) for stage in config.stages]
    _check_names(config, families)
    for index in indices:
        size = config.stages[index].resolution
        _check_ranks(families[index], ranks[size] if ranks else process_group.world_size())
    return families


def _on_meta(config: Config, stage: StageConfig) -> Family:
    """The family at a stage; its networks take no memory on ``meta``."""
    with torch.device("meta"):
        return family_class(config.family)(config, stage, torch.device("meta"))


def _check_names(config: Config, families: list[Family]) -> None:
    """Keys by network are of those that some stage has: a discriminator may come in late."""
    known = {name: None for family in families for name in family.networks}
    keys = {"optim.lr_scale": set(config.optim.lr_scale), "freeze": set(config.freeze)}
    for key, given in keys.items():
        if unknown := given - set(known):
            raise ConfigError(
                f"{key}: there is no network {min(unknown)}: the family's are {', '.join(known)}"
            )
    for family in families:
        for name in family.networks:
            trained_parameters(family, name, config.freeze)


def _check_stage(config: Config, family: Family, data: Dataset) -> None:
    """Levels, image size and batch of one stage."""
    stage, inputs = family.stage, family.inputs
    name, stored = f"stage {stage.resolution}", data.manifest.image_size
    # of latents the family says what is missing
    levels = [level for level in inputs.levels if level_guide(level) not in OF_LATENTS]
    missing = [level for level in levels if level not in data.manifest.levels]
    if missing:
        raise ConfigError(
            f"{data.location}: {name} reads the level {', '.join(missing)}, the shards have "
            f"{', '.join(data.manifest.levels) or 'none'}: {_remedy(missing)}"
        )
    if inputs.labels:
        check_classes(config, data)
    if isinstance(family, ChecksData):
        family.check_data(data)
    if inputs.per_class and len(data.sets) > 1:
        raise ConfigError(
            "data.mix: batches by class are read from one dataset: pack the photos together and "
            "give data.path"
        )
    if inputs.image_size is None:
        _check_augment_of_levels(config, inputs.levels, name)
    own = isinstance(family, MeasuresHeldOut)
    if config.eval.every_kimg is not None and not own and not config.eval.generated:
        raise ConfigError(
            f"eval: family {config.family.name} has nothing to measure on held-out samples: "
            "leave it out, or name metrics of generated images (eval.generated=[fid])"
        )
    if stored is not None and stage.resolution > stored:
        raise ConfigError(
            f"stages: {name} is larger than the images of {data.location} ({stored}x{stored}):"
            f" leave it out, or prepare again with prepare.faces.size={stage.resolution} or more"
        )


def _check_augment_of_levels(config: Config, levels: Sequence[str], name: str) -> None:
    """Without images nothing can be augmented, but levels of mirrored images can be chosen."""
    mirrors = any(is_flipped(level) for level in levels)
    rest = config.augment.model_copy(update={"flip": 0.0}) if mirrors else config.augment
    if rest != AugmentConfig():
        raise ConfigError(
            f"augment: family {config.family.name} reads no images at {name}, but precomputed "
            f"features: leave it out{', but for flip' if mirrors else ''}"
        )


def _remedy(missing: list[str]) -> str:
    """How data get levels that they lack."""
    if all(is_flipped(level) for level in missing):
        return (
            "they hold no features of mirrored images, which augment.flip needs: prepare again "
            "with prepare.pyramids.flips=true, or set augment.flip=0"
        )
    return (
        "prepare again with it (p for pooled, n for native: prepare.pyramids.kinds and "
        "prepare.pyramids.grids; NAME.p8 of a guide in guides:; clip and text with clip:), or "
        "change family:"
    )


def _check_ranks(family: Family, num: int) -> None:
    """Each of ``num`` ranks needs an image of every batch."""
    stage, reference = family.stage, family.inputs.reference_batch
    if stage.batch < num:
        raise ConfigError(
            f"stages: batch {stage.batch} of stage {stage.resolution} is smaller than the number "
            f"of ranks {num}: each rank needs an image: set batch to {num} or more, or use fewer "
            "GPUs"
        )
    if 0 < reference < num:
        raise ConfigError(
            f"family.reference_batch: {reference} is smaller than the number of "
            f"ranks, {num}, and each needs a sample: set it higher, or to 0"
        )


def _check_image_sizes(config: Config, families: list[Family], data: Dataset) -> None:
    """Images of tars from elsewhere may differ in size: some may be too small for a stage."""
    sizes = [f.inputs.image_size for f in families if f.inputs.image_size is not None]
    if not sizes or all(one.manifest.image_size is not None for one in data.sets):
        return
    splits = [config.data.split]
    if config.eval.every_kimg is not None and data.num_samples("val"):
        splits.append("val")
    for split in dict.fromkeys(splits):
        for size in sorted(set(sizes)):
            count, first = data.unfit_images(size, split)
            if not count:
                continue
            total = data.num_samples(split)
            what = (
                f"{count:,} of the {total:,} images in split {split} of {data.location} are "
                f"smaller than {size}x{size} or not square ({first})"
            )
            if config.data.on_error != "skip" or count == total:
                raise ConfigError(
                    f"stages: {what}: leave out the stages that need them, make the images larger "
                    "and square, or set data.on_error=skip to train without them"
                )
            log.warning("%s; they are skipped (data.on_error=skip)", what)
            break


def _check_sizes_of_classes(config: Config, families: list[Family], data: Dataset) -> None:
    """Batches by class show every class that is there: none may lack, and small ones repeat."""
    run = max((family.inputs.per_class for family in families), default=0)
    if not run:
        return
    split, names = config.data.split, data.manifest.classes
    counts = data.label_counts(split)
    named = [
        f"{label} ({names[label]})" if names else str(label)
        for label in range(int(config.family.options["num_classes"]))
    ]
    where = f"split {split} of {data.location}"
    empty = [name for label, name in enumerate(named) if not counts.get(label)]
    if empty:
        raise ConfigError(
            f"family.num_classes: {where} has no sample of class {_some(empty)}, so it would "
            "be drawn but never learnt: add photos of it and prepare again, with a smaller "
            "prepare.pack.val_fraction if all of them were held back, or leave its folder out and "
            "set num_classes lower"
        )
    small = [f"{name}: {counts[n]}" for n, name in enumerate(named) if counts[n] < run]
    if small:
        log.warning(
            "%s: fewer samples than family.samples_per_class=%d, so a step shows some of them "
            "more than once: class %s",
            where,
            run,
            _some(small),
        )


def _some(names: Sequence[str]) -> str:
    rest = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and {rest} more" if rest > 0 else "")


def check_same_run(
    checkpoint: Checkpoint, config: Config, stage: StageConfig, fingerprint: str
) -> None:
    """Refuse to go on from a checkpoint that another experiment wrote.

    All keys have to be what they were, but for :data:`MAY_CHANGE` and other stages.

    Args:
        checkpoint: of the stage.
        config: today's.
        stage: of ``config``.
        fingerprint: of today's data.

    Raises:
        ConfigError: naming the first key that contradicts, or that is not known any more.
    """
    resolution = stage.resolution
    then = _leaves(_compared(checkpoint.config, config, resolution))
    now = _leaves(_compared(resolve(config), config, resolution))
    for key in then | now:
        old, new = then.get(key, "nothing"), now.get(key, "nothing")
        if old != new:
            raise ConfigError(
                f"{key}: the checkpoint {checkpoint.folder} was trained with {old}, the config "
                f"says {new}: {or_a_new_run(config)}"
            )
    check_same_data(checkpoint, config, fingerprint)


def _compared(config: Config, today: Config, resolution: int) -> dict[str, Any]:
    """The sections that matter to one stage, whose place in the list is today's."""
    dumped = config.model_dump(mode="json", exclude=MAY_CHANGE)
    stage = config.stages[find_stage(config, resolution)]
    dumped["stages"] = {find_stage(today, resolution): stage.model_dump(exclude={"kimg", "epochs"})}
    return dumped


def _leaves(section: dict[Any, Any], prefix: str = "") -> dict[str, Any]:
    """Single values of nested sections by their dotted keys."""
    found: dict[str, Any] = {}
    for key, value in section.items():
        if isinstance(value, dict):
            found |= _leaves(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found
