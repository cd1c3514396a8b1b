"""Means over held-out samples, each counted exactly once on any number of ranks."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Literal, cast

import numpy as np
import torch
from torch import nn

from dinogen.batch import Batch
from dinogen.config import ConfigError
from dinogen.distributed import process_group
from dinogen.distributed.process_group import gather_text
from dinogen.errors import UserError
from dinogen.families.abilities import MeasuresHeldOut
from dinogen.families.base import Family
from dinogen.training.data import check_labels
from dinogen.training.engines.base import split as to_device
from shards.errors import CorruptSample, ShardsError
from shards.read.dataset import Dataset

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
