"""Rows of all ranks, of which each may have another number."""

from __future__ import annotations

import torch
from torch import Tensor

from dinogen import dist


def gather_counts(num: int) -> list[int]:
    """``num`` of every rank, in rank order."""
    counts: list[int] = dist.all_gather(torch.tensor([num])).tolist()
    return counts


def gather_rows(tensor: Tensor, counts: list[int]) -> Tensor:
    """Tensors (n, ...) of all ranks, alike but for n, joined in rank order.

    Args:
        tensor: this rank's.
        counts: n of every rank, which may be 0, as :func:`gather_counts` gives them.
    """
    if dist.world_size() == 1:
        return tensor.detach()
    most = max(counts)
    padded = tensor.new_zeros(most, *tensor.shape[1:])
    padded[: len(tensor)] = tensor.detach()
    parts = dist.all_gather(padded).unflatten(0, (len(counts), most))
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])


def gather_text(text: str) -> list[str]:
    """``text`` of every rank, in rank order."""
    data = torch.tensor(list(text.encode()), dtype=torch.uint8)
    counts = gather_counts(len(data))
    return [bytes(part.tolist()).decode() for part in gather_rows(data, counts).split(counts)]
