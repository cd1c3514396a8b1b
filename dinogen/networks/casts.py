"""Weights of several layers in autocast's type, cast together.

Autocast casts each weight and each bias in a kernel of its own, and each gradient back in another.
In a small network these are a third of all launches.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Weights = tuple[Tensor, Tensor | None]
Weighted = nn.Conv2d | nn.Linear | nn.GroupNorm | nn.InstanceNorm2d | nn.LayerNorm


def cast_together(*layers: nn.Module) -> list[Weights]:
    """(weight, bias) of each layer that has any, in the type that autocast computes in here.

    One call casts what a block needs, not all of a large network: gradients of all these weights
    come at once, and under ddp those of other blocks travel meanwhile.
    """
    pairs: list[Weights] = [(f.weight, f.bias) for f in layers if isinstance(f, Weighted)]
    kind = pairs[0][0].device.type
    if not torch.is_autocast_enabled(kind):
        return pairs
    flat = [tensor for pair in pairs for tensor in pair if tensor is not None]
    cast = iter(_Cast.apply(torch.get_autocast_dtype(kind), *flat))
    return [(next(cast), None if bias is None else next(cast)) for _, bias in pairs]


class _Cast(torch.autograd.Function):
    """Tensors of one type in another."""

    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.dtype = tensors[0].dtype
        cast = [torch.empty_like(tensor, dtype=dtype) for tensor in tensors]
        torch._foreach_copy_(cast, list(tensors))
        return tuple(cast)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        found = [gradient for gradient in gradients if gradient is not None]
        cast = iter(_Cast.apply(ctx.dtype, *found) if found else ())
        return None, *(None if gradient is None else next(cast) for gradient in gradients)


def conv(layer: nn.Conv2d, x: Tensor, weights: Weights) -> Tensor:
    """The convolution with these weights in place of its own."""
    return F.conv2d(x, *weights, layer.stride, layer.padding)
