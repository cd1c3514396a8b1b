"""Convolutions whose second derivatives are convolutions with small kernels too.

torch computes a part of the second derivative, the one to the weight, as a convolution of maps with
maps, whose kernel is as large as an image. It is the gradient of a weight like any other, and here
it is computed as such. Gradient penalties and path length take such derivatives.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor


class _Kind(NamedTuple):
    stride: int
    padding: int
    transposed: bool


def conv2d(x: Tensor, weight: Tensor, stride: int = 1, padding: int = 0) -> Tensor:
    """As ``torch.nn.functional.conv2d``, differentiable to any order; follows autocast.

    Args:
        x: (B, I, H, W).
        weight: (O, I, K, K).
        stride: along both axes.
        padding: zeros on each side.
    """
    found: Tensor = _Convolve.apply(*_cast(x, weight), _Kind(stride, padding, False))
    return found


def conv_transpose2d(x: Tensor, weight: Tensor, stride: int = 1, padding: int = 0) -> Tensor:
    """As ``torch.nn.functional.conv_transpose2d``, in the same way; ``weight`` is (I, O, K, K)."""
    found: Tensor = _Convolve.apply(*_cast(x, weight), _Kind(stride, padding, True))
    return found


def _cast(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    if not torch.is_autocast_enabled(x.device.type):
        return x, weight
    dtype = torch.get_autocast_dtype(x.device.type)
    return x.to(dtype), weight.to(dtype)


class _Convolve(torch.autograd.Function):
    """Maps (B, I, H, W) and a weight to maps."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, kind: _Kind) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.kind = kind
        stride, padding = [kind.stride] * 2, [kind.padding] * 2
        found: Tensor = torch.ops.aten.convolution(
            x, weight, None, stride, padding, [1, 1], kind.transposed, [0, 0], 1
        )
        return found

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        to_x, to_weight, _ = ctx.needs_input_grad
        if not torch.is_grad_enabled():  # both in one call
            return *_gradients(gradient, x, weight, ctx.kind, to_x, to_weight), None
        to_x, to_weight = to_x and _is_asked_for(ctx, 0), to_weight and _is_asked_for(ctx, 1)
        return (
            _ToMaps.apply(gradient, x, weight, ctx.kind) if to_x else None,
            _ToWeight.apply(gradient, x, weight, ctx.kind) if to_weight else None,
            None,
        )


def _is_asked_for(ctx: Any, number: int) -> bool:
    """Whether this backward pass needs the gradient to an input.

    A penalty differentiates to the images first: gradients to the weights would be thrown away.
    """
    node = ctx.next_functions[number][0]
    # of a leaf it is not known
    return hasattr(node, "variable") or bool(torch._C._will_engine_execute_node(node))


class _ToMaps(torch.autograd.Function):
    """The gradient to the maps, which follows from that of the result and the weight."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, x: Tensor, weight: Tensor, kind: _Kind) -> Tensor:
        ctx.save_for_backward(gradient, weight)
        ctx.kind = kind
        found = _gradients(gradient, x, weight, kind, True, False)[0]
        assert found is not None
        return found

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> tuple[Tensor | None, ...]:
        gradient, weight = ctx.saved_tensors
        to_gradient, _, to_weight, _ = ctx.needs_input_grad
        return (
            _Convolve.apply(v, weight, ctx.kind) if to_gradient else None,
            None,
            _ToWeight.apply(gradient, v, weight, ctx.kind) if to_weight else None,
            None,
        )


class _ToWeight(torch.autograd.Function):
    """The gradient to the weight, which follows from that of the result and the maps."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, x: Tensor, weight: Tensor, kind: _Kind) -> Tensor:
        ctx.save_for_backward(gradient, x)
        ctx.kind = kind
        found = _gradients(gradient, x, weight, kind, False, True)[1]
        assert found is not None
        return found

    @staticmethod
    def backward(ctx: Any, u: Tensor) -> tuple[Tensor | None, ...]:
        gradient, x = ctx.saved_tensors
        to_gradient, to_x, _, _ = ctx.needs_input_grad
        return (
            _Convolve.apply(x, u, ctx.kind) if to_gradient else None,
            _ToMaps.apply(gradient, x, u, ctx.kind) if to_x else None,
            None,
            None,
        )


def _gradients(
    gradient: Tensor, x: Tensor, weight: Tensor, kind: _Kind, to_x: bool, to_weight: bool
) -> tuple[Tensor | None, Tensor | None]:
    stride, padding, wanted = [kind.stride] * 2, [kind.padding] * 2, [to_x, to_weight, False]
    of_x, of_weight, _ = torch.ops.aten.convolution_backward(
        gradient, x, weight, None, stride, padding, [1, 1], kind.transposed, [0, 0], 1, wanted
    )
    return of_x, of_weight
