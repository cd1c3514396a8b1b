"""What a family is measured on: its samples, real images, training images, held-out samples."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from torch import Tensor, nn

from dinogen.batch import Batch
from dinogen.config import ConfigError, MetricsConfig
from dinogen.distributed import process_group
from dinogen.distributed.process_group import gather_text
from dinogen.errors import UserError
from dinogen.families.abilities import (
    DrawsForMetrics,
    MeasuresHeldOut,
    NamesItsDraws,
    Probes,
    Reconstructs,
    condition_for,
)
from dinogen.families.base import Family, Networks
from dinogen.metrics.prompted import Prompted, read_prompts
from dinogen.metrics.registry import GUIDE_DIVERSITY, better
from dinogen.metrics.sources import (
    Folder,
    Generated,
    Images,
    Reconstructed,
    Reference,
    image_files,
)
from dinogen.metrics.suite import Subject
from dinogen.metrics.value import MetricValue
from dinogen.training.data import any_of_a_guide, check_labels
from dinogen.training.engines.base import split as to_device
from shards.errors import CorruptSample, ShardsError
from shards.format.manifest import SPLITS
from shards.read.dataset import Dataset, open_dataset

# held-out samples that it takes to say anything at all
_WANTED = 20


def subject_of(
    family: Family,
    networks: Networks,
    num: int,
    real: Reference | UserError,
    train: Reference | UserError,
    settings: MetricsConfig,
    facts: Mapping[str, Any],
    shares: Sequence[float] | None = None,
) -> Subject:
    """Samples of a family under its run's seed, and what they are compared with.

    Args:
        family: samples.
        networks: its moving averages.
        num: samples.
        real: images of its resolution that it was not trained on, or why there are none.
        train: those that it was trained on.
        settings: name the file of prompts, if any.
        facts: what the family's ``describe`` said in training.
        shares: of the classes in the data, for families that have classes; None: in turn.
    """
    seed, resolution = family.config.seed, family.stage.resolution

    def sample(numbers: Tensor) -> Tensor:
        if isinstance(family, DrawsForMetrics):
            return family.measured(networks, numbers, seed, shares)
        return family.sample(networks, numbers, seed)

    pairs: Reconstructed | UserError
    if not isinstance(family, Reconstructs):
        pairs = UserError(f"family {family.config.family.name} encodes no images")
    elif isinstance(real, UserError):
        pairs = real
    else:
        pairs = Reconstructed(real, _reconstruction(family, networks, family.device))
    how = dict(family.measured_as) if isinstance(family, NamesItsDraws) else {}
    if family.inputs.labels:
        how["classes"] = "in turn" if shares is None else [round(one, 6) for one in shares]
    made = Generated(sample, num, resolution, how)
    prompted = prompted_by(family, networks, num, settings, facts)
    return Subject(made, real, train, pairs, prompted, _trained_with(family, facts))


def _trained_with(family: Family, facts: Mapping[str, Any]) -> tuple[str, ...]:
    """Names of the guides whose features a family learns from, also where it never loads them.

    A family that reads stored features says by which guide they were made; the config may name
    another one.
    """
    named = [facts.get("guide"), *dict(facts.get("guides") or {}).values()]
    names = tuple(str(one["name"]) for one in named if isinstance(one, Mapping) and "name" in one)
    if names or not any_of_a_guide(family.inputs.levels):
        return names
    return (family.config.guide.name, *(one.name for one in family.config.guides.values()))


def _reconstruction(
    family: Reconstructs, networks: Networks, device: torch.device
) -> Callable[[Tensor, Tensor], Tensor]:
    """A function of images (N, 3, R, R) and their numbers (N,) that encodes and decodes them."""

    def reconstruct(images: Tensor, numbers: Tensor) -> Tensor:
        made = family.reconstruct(networks, {"image": images.to(device), "position": numbers})
        if made is None:
            raise UserError("reconstruct of the family gives None: leave it out if it encodes none")
        return made

    return reconstruct


def prompted_by(
    family: Family, networks: Networks, num: int, settings: MetricsConfig, facts: Mapping[str, Any]
) -> Prompted | UserError:
    """Images that a family makes for ``metrics.prompts``, or why there are none.

    Args:
        family: samples.
        networks: its moving averages.
        num: images.
        settings: names the prompts.
        facts: what the family's ``describe`` said in training.

    Raises:
        ConfigError: the prompts cannot be read.
    """
    if settings.prompts is None:
        return UserError("metrics.prompts: no file of prompts is given")
    texts, guidance = read_prompts(settings.prompts), settings.guidance
    seed, resolution = family.config.seed, family.stage.resolution
    try:
        condition = condition_for(family, texts, guidance, facts)
    except UserError as error:
        return error

    def sample(numbers: Tensor) -> Tensor:
        return family.sample(networks, numbers, seed, condition)

    return Prompted(Generated(sample, num, resolution), texts, guidance)


def real_images(
    data: Dataset, split: str, num: int | None, resolution: int, key: str
) -> Reference | UserError:
    """Images spread over a split, or why there are none.

    Args:
        data: has the split.
        split: ``train``, ``val`` or ``test``.
        num: how many at most; all if None.
        resolution: side in pixels.
        key: the option that requests them, named in the reason.
    """
    try:
        return Images(data, split, chosen_samples(data, split, num, key), resolution)
    except UserError as error:
        return error


def chosen_samples(data: Dataset, split: str, num: int | None, key: str) -> list[int]:
    """Numbers of samples spread over a split.

    Args:
        data: has the split.
        split: ``train``, ``val`` or ``test``.
        num: how many; all if None.
        key: what asked for them, named in errors.

    Raises:
        ConfigError: there is no such split, or it has none.
    """
    if split not in SPLITS:
        raise ConfigError(f"{key} {split}: splits are {', '.join(SPLITS)}")
    available = data.num_samples(split)
    if not available:
        raise ConfigError(f"{key}: {_none_in(data, split)}")
    chosen = np.linspace(0, available - 1, min(num or available, available)).astype(int)
    return [int(number) for number in chosen]


def _none_in(data: Dataset, split: str) -> str:
    """What to say of a split without samples, and what can be done about it."""
    have = ", ".join(f"{info.num_samples} in {s}" for s, info in data.manifest.splits.items())
    total = sum(info.num_samples for info in data.manifest.splits.values())
    said = f"{data.location} has no samples in split {split} (but {have}): "
    instead = "or measure on what was learnt: --split train"
    if total < 2 * _WANTED:
        return (
            f"{said}with {total} in all there are too few to hold some back: pack more photos "
            f"with prepare.pack.{split}_fraction=0.1 and train on them, {instead}"
        )
    # the share that gives some to compare with, and never less than was usual before
    share = max(0.05, math.ceil(100 * _WANTED / total) / 100)
    return (
        f"{said}prepare again with prepare.pack.{split}_fraction={share:g} or more and train on "
        f"that, for what was learnt is not held out; {instead}"
    )


def reference_at(
    location: str | None, settings: MetricsConfig, resolution: int
) -> tuple[Reference | UserError, Reference | UserError]:
    """Images to compare with and those of train, of packed shards or a folder of files.

    Args:
        location: of them; None if none were given, which is a reason too.
        settings: which split of shards, and how many.
        resolution: side of the images that are compared with them.

    Raises:
        ConfigError: images of the folder are of another side.
        UserError: there is neither.
    """
    if location is None:
        nothing = UserError("there is nothing to compare with: give --reference DATA")
        return nothing, nothing
    if image_files(Path(location)):
        folder = Folder(Path(location))
        if folder.resolution != resolution:
            raise ConfigError(
                f"--reference {location}: its images are {folder.resolution}x"
                f"{folder.resolution}, those measured {resolution}x{resolution}: give packed "
                "shards, which are resized, or images of the same size"
            )
        return folder, UserError(f"{location}: a folder of images has no training split")
    data = open_dataset(location)
    split, num = settings.reference_split, settings.num_reference
    real = real_images(data, split, num, resolution, "metrics.reference_split")
    if isinstance(real, UserError):
        raise real
    return real, real_images(data, "train", None, resolution, "--reference")


def guide_diversity(family: Family, scalars: Mapping[str, float | None]) -> MetricValue:
    """What the family's probe says of its samples' diversity in guide space.

    Args:
        family: whose probe it was.
        scalars: of its health.
    """
    which = better(GUIDE_DIVERSITY)
    if not isinstance(family, Probes) or "diversity" not in scalars:
        reason = f"family {family.config.family.name} has no guide in whose space to measure"
        return MetricValue.missing(GUIDE_DIVERSITY, which, reason)
    value = scalars["diversity"]
    if value is None:
        return MetricValue.missing(GUIDE_DIVERSITY, which, "it is not finite: look at the images")
    num = int(getattr(getattr(family, "options", None), "probe_samples", 0))
    return MetricValue(GUIDE_DIVERSITY, value, None, which, num, None, None)


log = logging.getLogger(__name__)

BATCH = 32


@torch.no_grad()
def held_out_means(
    family: Family, networks: dict[str, nn.Module], data: Dataset, split: str, numbers: list[int]
) -> tuple[dict[str, float], int]:
    """The family's ``held_out``, averaged over all ranks' samples, and how many were sound.

    Ranks communicate only at the end. If ``data.on_error`` is ``skip``, a damaged sample is left
    out.

    Args:
        family: one with the ability ``MeasuresHeldOut``.
        networks: the moving averages.
        data: has the split.
        split: of the samples.
        numbers: of the samples, the same on every rank.

    Raises:
        ConfigError: all samples are damaged.
        CorruptSample: one is, and ``data.on_error`` is ``stop``.
        UserError, ShardsError, OSError: another failure of this rank; a ConfigError on the others.
    """
    if not isinstance(family, MeasuresHeldOut):
        raise TypeError(f"{type(family).__name__} measures nothing on held-out samples")
    mine = np.array_split(numbers, process_group.world_size())[process_group.rank()].tolist()
    sums: dict[str, float] = {}
    count = 0
    failure: Exception | None = None
    try:
        for batch in _batches(family, data, split, mine):
            size = len(batch["key"])
            for name, value in family.held_out(networks, batch).items():
                sums[name] = sums.get(name, 0.0) + float(value) * size
            count += size
        if not count:
            # this rank has no samples, but it has to know which sums the others will add
            batch = _read(family, data, split, numbers[:1], "skip")
            sums = dict.fromkeys(family.held_out(networks, batch), 0.0)
    except (UserError, ShardsError, OSError) as error:
        failure = error
    if process_group.any_rank(failure is not None):  # or the others would wait for this one
        said = gather_text(str(failure or ""))
        raise failure or ConfigError(next(text for text in said if text))
    local = torch.tensor([*sums.values(), count], dtype=torch.float64)
    *totals, num = process_group.all_reduce_sum(local).tolist()
    if not num:
        raise ConfigError(
            f"{data.location}: all {len(numbers)} requested samples of split {split} are damaged: "
            "run `dinogen shards verify` for the whole list"
        )
    return {name: total / num for name, total in zip(sums, totals, strict=True)}, int(num)


def _batches(family: Family, data: Dataset, split: str, numbers: list[int]) -> Iterator[Batch]:
    """The samples in parts, without damaged ones if the run skips those too."""
    for first in range(0, len(numbers), BATCH):
        part = numbers[first : first + BATCH]
        try:
            yield _read(family, data, split, part)
        except CorruptSample:
            if family.config.data.on_error == "stop":
                raise
            sound = [n for n in part if _is_sound(family, data, split, n)]
            if sound:
                yield _read(family, data, split, sound)


def _is_sound(family: Family, data: Dataset, split: str, number: int) -> bool:
    try:
        _read(family, data, split, [number])
    except CorruptSample as error:
        log.warning("left out: %s", error)
        return False
    return True


def _read(
    family: Family,
    data: Dataset,
    split: str,
    numbers: list[int],
    on_error: Literal["stop", "skip"] = "stop",
) -> Batch:
    """What the family reads of some samples, on the device."""
    inputs = family.inputs
    read = data.read(
        numbers,
        split=split,
        image_size=inputs.image_size,
        levels=inputs.levels,
        on_error=on_error,
        need_labels=inputs.labels,
    )
    batch = cast(Batch, read)
    check_labels(family, batch)
    ((micro, _),) = to_device(batch, 1, family.device)
    return micro
