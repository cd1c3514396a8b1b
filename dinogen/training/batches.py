"""Cuts a rank's batch into microbatches, of which every rank makes the same number."""

from __future__ import annotations

import math
from typing import Any

import torch

from dinogen.families.base import Batch


def num_micros(batch: int, world_size: int, micro_batch: int | None) -> int:
    """Microbatches per step, the same on every rank, as each may take part in collectives.

    Args:
        batch: global batch.
        world_size: number of ranks.
        micro_batch: most samples of a rank in one part; None for its whole share.
    """
    share = math.ceil(batch / world_size)
    return math.ceil(share / (micro_batch or share))


def split(batch: Batch, num_parts: int, device: torch.device) -> list[tuple[dict[str, Any], int]]:
    """Cut a rank's batch into microbatches on the device; ``position`` stays on the CPU.

    Args:
        batch: as the stream gives it, of one sample at least.
        num_parts: as many as every rank makes.
        device: where tensors go.

    Returns:
        Parts and their numbers of samples, as equal as can be. Where there are more parts than
        samples, a part repeats a sample and counts 0.
    """
    size = len(batch["key"])
    parts = []
    for i in range(num_parts):
        first, end = size * i // num_parts, size * (i + 1) // num_parts
        part = slice(first, end) if end > first else slice(size - 1, size)
        micro: dict[str, Any] = {}
        for name, value in batch.items():
            if name == "pyramid":
                micro[name] = {g: v[part].to(device, non_blocking=True) for g, v in value.items()}
            elif isinstance(value, torch.Tensor) and name != "position":
                micro[name] = value[part].to(device, non_blocking=True)
            else:
                micro[name] = value[part]
        parts.append((micro, end - first))
    return parts
