"""Rows of all ranks, of which each may have another number."""

from __future__ import annotations

import torch
from torch import Tensor

from dinogen import dist


def gather_rows(tensor: Tensor) -> tuple[Tensor, int]:
    """Tensors of all ranks that differ in their number of rows, joined in rank order.

    Args:
        tensor: (n, ...), alike on all ranks but for n, which may be 0.

    Returns:
        (all rows; which of them is this rank's first), not differentiable.
    """
    sizes = dist.all_gather(torch.tensor([len(tensor)])).tolist()
    most = max(sizes)
    padded = tensor.new_zeros(most, *tensor.shape[1:])
    padded[: len(tensor)] = tensor.detach()
    parts = dist.all_gather(padded).unflatten(0, (len(sizes), most))
    rows = torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])
    return rows, sum(sizes[: dist.rank()])
