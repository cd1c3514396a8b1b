"""Resampling by FIR filters: zeros between pixels, a filter, every second pixel left out (upfirdn).

StyleGAN2 (Karras et al. 2020) resamples with the binomial filter [1, 3, 3, 1] in both directions;
why to filter at all: Zhang 2019, "Making Convolutional Networks Shift-Invariant Again".
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def binomial() -> Tensor:
    """The taps [1, 3, 3, 1] / 8 of one axis, (4,) float32."""
    return torch.tensor([1.0, 3.0, 3.0, 1.0]) / 8


def upfirdn(
    x: Tensor, taps: Tensor, up: int = 1, down: int = 1, padding: tuple[int, int] = (0, 0)
) -> Tensor:
    """Upsample by zeros, pad, convolve with the taps along both axes, keep each ``down``-th pixel.

    Args:
        x: (B, C, H, W).
        taps: (T,), of a true convolution: the first tap meets the last pixel of its window.
        up: each pixel is followed by ``up - 1`` zeros.
        down: every ``down``-th pixel is kept, beginning with the first.
        padding: zeros before and after, in upsampled pixels.

    Returns:
        (B, C, H', W') with H' = (H * up + sum(padding) - T) // down + 1.
    """
    batch, channels, height, width = x.shape
    if up > 1:
        x = F.pad(x[:, :, :, None, :, None], (0, up - 1, 0, 0, 0, up - 1))
        x = x.reshape(batch, channels, height * up, width * up)
    # conv2d correlates; both axes at once are four times faster than one after the other on a CPU
    row = taps.flip(0).to(x.dtype)
    kernel = torch.outer(row, row).expand(channels, 1, -1, -1)
    return F.conv2d(F.pad(x, padding * 2), kernel, stride=down, groups=channels)


def upsample(x: Tensor, taps: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, C, 2H, 2W) by four taps of sum 1; brightness stays."""
    return upfirdn(x, 2 * taps, up=2, padding=(2, 1))


def conv_up(x: Tensor, weight: Tensor, taps: Tensor) -> Tensor:
    """Upsample by 2, then convolve 3x3: in one transposed convolution, then the filter.

    The two are linear, so their order matters at the border only; this one multiplies no zeros.

    Args:
        x: (B, I, H, W).
        weight: (O, I, 3, 3).
        taps: four of sum 1.

    Returns:
        (B, O, 2H, 2W).
    """
    y = F.conv_transpose2d(x, weight.flip(2, 3).transpose(0, 1), stride=2)
    return upfirdn(y, 2 * taps, padding=(1, 1))


def conv_down(x: Tensor, weight: Tensor, taps: Tensor) -> Tensor:
    """Filter, then convolve 1x1 or 3x3 with stride 2.

    Args:
        x: (B, I, H, W), H and W even.
        weight: (O, I, K, K), K 1 or 3.
        taps: four of sum 1.

    Returns:
        (B, O, H / 2, W / 2).
    """
    if weight.shape[2] == 1:
        # filtering only where a pixel is kept
        return F.conv2d(upfirdn(x, taps, down=2, padding=(1, 1)), weight)
    return F.conv2d(upfirdn(x, taps, padding=(2, 2)), weight, stride=2)


def sample_at(images: Tensor, grid: Tensor) -> Tensor:
    """Bilinear samples of images; twice differentiable to the images on any torch, not to the grid.

    torch's own ``grid_sample`` has no second derivative before 2.13, and R1 needs one. Sampling is
    linear, so the derivative of its transpose is sampling again.

    Args:
        images: (B, C, H, W).
        grid: (B, h, w, 2) of x and y, -1 and 1 at the centres of the outermost pixels.

    Returns:
        (B, C, h, w); 0 beyond the images.
    """
    found: Tensor = _SampleAt.apply(images, grid)
    return found


class _SampleAt(torch.autograd.Function):
    """Samples of images at the places of a grid."""

    @staticmethod
    def forward(ctx: Any, images: Tensor, grid: Tensor) -> Tensor:
        ctx.save_for_backward(grid)
        ctx.shape = images.shape
        return F.grid_sample(images, grid.to(images), align_corners=True)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (grid,) = ctx.saved_tensors
        return _Spread.apply(gradient, grid, ctx.shape), None


class _Spread(torch.autograd.Function):
    """The transpose of :class:`_SampleAt`."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, grid: Tensor, shape: torch.Size) -> Tensor:
        ctx.save_for_backward(grid)
        bilinear, zeros, align_corners = 0, 0, True
        images: Tensor = torch.ops.aten.grid_sampler_2d_backward(
            gradient.contiguous(),
            gradient.new_zeros(shape),
            grid.to(gradient),
            bilinear,
            zeros,
            align_corners,
            (True, False),
        )[0]
        return images

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (grid,) = ctx.saved_tensors
        return _SampleAt.apply(gradient, grid), None, None
