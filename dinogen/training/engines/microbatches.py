"""Cuts a rank's batch into microbatches, of which every rank makes the same number."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, cast

import torch

from dinogen.batch import Batch


def num_micros(batch: int, world_size: int, micro_batch: int | None) -> int:
    """Microbatches per step, the same on every rank, as each may take part in collectives.

    Args:
        batch: global batch.
        world_size: number of ranks.
        micro_batch: most samples of a rank in one part; None for its whole share.
    """
    share = math.ceil(batch / world_size)
    return math.ceil(share / (micro_batch or share))


def split(batch: Batch, num_parts: int, device: torch.device) -> list[tuple[Batch, int]]:
    """Cut a rank's batch into microbatches on the device; ``position`` stays on the CPU.

    Args:
        batch: as the stream gives it, of one sample at least.
        num_parts: as many as every rank makes.
        device: where tensors go.

    Returns:
        Parts and their numbers of samples, as equal as can be. Where there are more parts than
        samples, a part repeats a sample and counts 0. Each holds the whole reference batch.
    """
    size = len(batch["key"])
    reference: Batch | None = None
    if "reference_batch" in batch:
        reference = cast(Batch, _part(batch["reference_batch"], slice(None), device))
    parts = []
    for i in range(num_parts):
        first, end = size * i // num_parts, size * (i + 1) // num_parts
        part = slice(first, end) if end > first else slice(size - 1, size)
        own = {name: value for name, value in batch.items() if name != "reference_batch"}
        micro = cast(Batch, _part(own, part, device))
        if reference is not None:
            micro["reference_batch"] = reference
        parts.append((micro, end - first))
    return parts


def _part(batch: Mapping[Any, Any], part: slice, device: torch.device) -> dict[Any, Any]:
    taken: dict[Any, Any] = {}
    for name, value in batch.items():
        if isinstance(value, Mapping):
            taken[name] = _part(value, part, device)
        elif isinstance(value, torch.Tensor) and name != "position":
            taken[name] = value[part].to(device, non_blocking=True)
        else:
            taken[name] = value[part]
    return taken
