"""Results of operators whose shape torch cannot know without values, themselves without values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def _whole(like: Tensor, *shape: int) -> Tensor:
    return like.new_empty(shape, dtype=torch.int64)


def _nonzero(x: Tensor) -> Tensor:
    return _whole(x, x.numel(), x.dim())


def _masked_select(x: Tensor, mask: Tensor) -> Tensor:
    return x.new_empty(torch.broadcast_shapes(x.shape, mask.shape).numel())


def _unique(x: Tensor, *args: Any, **more: Any) -> tuple[Tensor, Tensor, Tensor]:
    return x.flatten(), _whole(x, *x.shape), _whole(x, x.numel())


def _bincount(x: Tensor, weights: Tensor | None = None, minlength: int = 0) -> Tensor:
    return _whole(x, max(1, minlength))


def _repeats(repeats: Tensor, *, output_size: int | None = None) -> Tensor:
    return _whole(repeats, repeats.numel() if output_size is None else output_size)


def _true(*args: Any) -> bool:
    return True


# As if all values were different and none of them 0. The host has to know them.
READING: dict[str, Callable[..., Any]] = {
    "aten::bincount": _bincount,
    "aten::equal": _true,
    "aten::is_nonzero": _true,
    "aten::masked_select": _masked_select,
    "aten::nonzero": _nonzero,
    "aten::repeat_interleave": _repeats,
    "aten::unique_consecutive": _unique,
    "aten::_unique2": _unique,
}


def _per_channel(x: Tensor) -> Tensor:
    return x.new_empty(x.shape[1], dtype=torch.float32)


def _two(x: Tensor, *args: Any) -> tuple[Tensor, ...]:
    return _per_channel(x), _per_channel(x)


def _four(x: Tensor, *args: Any) -> tuple[Tensor, ...]:
    return *_two(x), *_two(x)


def _like(x: Tensor, *args: Any) -> Tensor:
    return torch.empty_like(x)


def _sampled(x: Tensor, grid: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:2], *grid.shape[1:3])


def _two_like(x: Tensor, y: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(y)


# cuDNN's, and batch norm over several ranks, which only GPUs have.
RESULTS: dict[str, Callable[..., Any]] = {
    "aten::batch_norm_stats": _two,
    "aten::batch_norm_gather_stats_with_counts": _two,
    "aten::batch_norm_elemt": _like,
    "aten::batch_norm_backward_reduce": _four,
    "aten::batch_norm_backward_elemt": _like,
    "aten::cudnn_grid_sampler": _sampled,
    "aten::cudnn_grid_sampler_backward": _two_like,
}
