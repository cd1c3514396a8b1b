"""Layers that several networks share: attention, spectral norm, resampling, minibatch deviation.

StyleGAN2 (Karras et al. 2020) resamples with the binomial filter [1, 3, 3, 1] in both directions;
why to filter at all: Zhang 2019, "Making Convolutional Networks Shift-Invariant Again".
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

NUM_FIRST_ITERATIONS = 15


class SelfAttention(nn.Module):
    """x + gamma * attention(x) over all locations of a map, gamma learnt from 0.

    Zhang et al. 2019, "Self-Attention Generative Adversarial Networks", equations 1 to 3; queries
    and keys have an eighth of the channels, values half, as in the authors' code. Softmax is over
    plain dot products, without the usual division by the root of their length. Written out because
    fused attention has no second derivative, which the gradient penalty needs.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        narrow, half = max(1, channels // 8), max(1, channels // 2)
        self.query = nn.Conv2d(channels, narrow, 1, bias=False)
        self.key = nn.Conv2d(channels, narrow, 1, bias=False)
        self.value = nn.Conv2d(channels, half, 1, bias=False)
        self.out = nn.Conv2d(half, channels, 1, bias=False)
        self.gamma = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> the same shape."""
        query, key, value = (f(x).flatten(2) for f in (self.query, self.key, self.value))
        weights = torch.softmax(query.transpose(1, 2) @ key, dim=-1)
        attended = (value @ weights.transpose(1, 2)).unflatten(2, x.shape[2:])
        changed: Tensor = self.gamma * self.out(attended)
        return x + changed


class SpectralNorm(nn.Module):
    """Parametrization of a weight W as W / sigma, sigma its estimated largest singular value.

    Miyato et al. 2018, "Spectral Normalization for Generative Adversarial Networks", section 2.1.
    sigma = u' W v with u, v from power iteration. torch's own iterates in every forward; how many
    those are depends on microbatches, so this one iterates only in :func:`update_spectral_norms`.

    Args:
        weight: (O, ...), taken as a matrix of O rows.
    """

    u: Tensor
    v: Tensor

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        matrix = weight.detach().flatten(1)
        self.register_buffer("u", F.normalize(torch.randn_like(matrix[:, 0]), dim=0))
        self.register_buffer("v", torch.zeros_like(matrix[0]))
        # On meta there is nothing to iterate on, and torch would take 5 ms each to find that out.
        for _ in range(0 if weight.is_meta else NUM_FIRST_ITERATIONS):
            self.iterate(weight)

    @torch.no_grad()
    def iterate(self, weight: Tensor) -> None:
        """One power iteration on the weight before division."""
        matrix = weight.flatten(1)
        self.v.copy_(F.normalize(matrix.T @ self.u, dim=0))
        self.u.copy_(F.normalize(matrix @ self.v, dim=0))

    def forward(self, weight: Tensor) -> Tensor:
        """W -> W / sigma, in float32 under autocast too."""
        # u' W v as a sum of products: autocast would make matrix products half precision
        sigma = (weight.flatten(1) * (self.u[:, None] * self.v)).sum()
        return weight / sigma


def spectral_norm(layer: nn.Module) -> nn.Module:
    """Divide the layer's weight by its largest singular value from now on; initialise it before."""
    assert isinstance(layer.weight, Tensor)
    return parametrize.register_parametrization(layer, "weight", SpectralNorm(layer.weight))


def update_spectral_norms(network: nn.Module) -> None:
    """One power iteration for every spectrally normalised weight, to be called once per step."""
    for module in network.modules():
        if isinstance(module, parametrize.ParametrizationList):
            for parametrization in module:
                if isinstance(parametrization, SpectralNorm):
                    parametrization.iterate(module.original)


def minibatch_std(x: Tensor, group_size: int) -> Tensor:
    """Append one channel: how much the samples of a group differ.

    Karras et al. 2018, "Progressive Growing of GANs", section 3: the standard deviation over the
    group of each feature at each location, averaged to one number. A group is a contiguous run of
    samples (the last may be shorter), so it does not depend on ranks whose share of the batch is a
    multiple of it.

    Args:
        x: (B, C, H, W).
        group_size: samples per group.

    Returns:
        (B, C + 1, H, W).
    """
    whole = len(x) // group_size * group_size
    parts = [part for part in (x[:whole], x[whole:]) if len(part)]
    stds = [_std(part.float(), min(group_size, len(part))) for part in parts]
    channel = torch.cat(stds).view(-1, 1, 1, 1).expand(-1, 1, *x.shape[2:])
    return torch.cat([x, channel.to(x.dtype)], dim=1)


def _std(x: Tensor, group_size: int) -> Tensor:
    """(B, C, H, W) -> (B,), for a batch of whole groups."""
    groups = x.unflatten(0, (-1, group_size))
    variance = groups.var(dim=1, correction=0)
    # the small number is in the paper's code: the root's gradient is infinite at zero
    std: Tensor = (variance + 1e-8).sqrt().flatten(1).mean(1)
    return std.repeat_interleave(group_size)


def binomial() -> Tensor:
    """The filter [1, 3, 3, 1] / 8 along both axes, (4, 4) float32 of sum 1."""
    taps = torch.tensor([1.0, 3.0, 3.0, 1.0]) / 8
    return torch.outer(taps, taps)


def filter_down(x: Tensor, kernel: Tensor, down: int = 1, padding: int = 0) -> Tensor:
    """Correlate each channel with the kernel, and keep each ``down``-th pixel.

    A linear map whose derivative is its transpose, :func:`filter_up`, and the other way round: the
    second derivative that torch knows of a grouped convolution is one convolution per channel.

    Args:
        x: (B, C, H, W).
        kernel: (T, T), the same for all channels; no gradient flows to it.
        down: every ``down``-th pixel is kept, beginning with the first.
        padding: zeros around the image.

    Returns:
        (B, C, H', W') of the type of x, with H' = (H + 2 * padding - T) // down + 1.
    """
    found: Tensor = _FilterDown.apply(x, kernel, down, padding)
    return found


def filter_up(x: Tensor, kernel: Tensor, up: int, padding: int, size: tuple[int, int]) -> Tensor:
    """Put ``up - 1`` zeros after each pixel, convolve each channel with the kernel, crop.

    The transpose of :func:`filter_down`, and twice differentiable as that is.

    Args:
        x: (B, C, H, W).
        kernel: (T, T), the same for all channels; no gradient flows to it.
        up: distance of the pixels afterwards.
        padding: rows and columns cropped before the first pixel.
        size: what is left behind that, such that ``filter_down`` of it has the size of x.

    Returns:
        (B, C, *size) of the type of x.
    """
    found: Tensor = _FilterUp.apply(x, kernel, up, padding, size)
    return found


class _FilterDown(torch.autograd.Function):
    """See :func:`filter_down`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, kernel: Tensor, down: int, padding: int) -> Tensor:
        weight = kernel.to(x.dtype)
        ctx.weight, ctx.down, ctx.padding, ctx.size = weight, down, padding, x.shape[2:]
        with torch.autocast(x.device.type, enabled=False):
            channels = x.shape[1]
            weight = weight.expand(channels, 1, -1, -1)
            return F.conv2d(x, weight, stride=down, padding=padding, groups=channels)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        back = _FilterUp.apply(gradient, ctx.weight, ctx.down, ctx.padding, ctx.size)
        return back, None, None, None


class _FilterUp(torch.autograd.Function):
    """See :func:`filter_up`."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, kernel: Tensor, up: int, padding: int, size: tuple[int, int]
    ) -> Tensor:
        weight = kernel.to(x.dtype)
        ctx.weight, ctx.up, ctx.padding = weight, up, padding
        batch, channels = x.shape[:2]
        # not conv_transpose2d, for which GPUs have no kernel of one filter per channel
        found: Tensor = torch.ops.aten.convolution_backward(
            x,
            x.new_empty(batch, channels, *size),
            weight.expand(channels, 1, -1, -1),
            None,
            [up, up],
            [padding, padding],
            [1, 1],
            False,
            [0, 0],
            channels,
            (True, False, False),
        )[0]
        return found

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None, None]:
        back = _FilterDown.apply(gradient, ctx.weight, ctx.up, ctx.padding)
        return back, None, None, None, None


def upsample(x: Tensor, kernel: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, C, 2H, 2W) by four taps; brightness stays if the kernel's sum is 4."""
    return filter_up(x, kernel, 2, 1, (2 * x.shape[2], 2 * x.shape[3]))


def conv_up(x: Tensor, weight: Tensor, kernel: Tensor) -> Tensor:
    """Upsample by 2, then convolve 3x3: in one transposed convolution, then the filter.

    The two are linear, so their order matters at the border only; this one multiplies no zeros.

    Args:
        x: (B, I, H, W).
        weight: (O, I, 3, 3).
        kernel: (4, 4), symmetric, of sum 4.

    Returns:
        (B, O, 2H, 2W).
    """
    y = F.conv_transpose2d(x, weight.flip(2, 3).transpose(0, 1), stride=2)
    return filter_down(y, kernel, padding=1)


def conv_down(x: Tensor, weight: Tensor, kernel: Tensor) -> Tensor:
    """Filter, then convolve 1x1 or 3x3 with stride 2.

    Args:
        x: (B, I, H, W), H and W even.
        weight: (O, I, K, K), K 1 or 3.
        kernel: (4, 4) of sum 1.

    Returns:
        (B, O, H / 2, W / 2).
    """
    if weight.shape[2] == 1:
        # filtering only where a pixel is kept
        return F.conv2d(filter_down(x, kernel, down=2, padding=1), weight)
    return F.conv2d(filter_down(x, kernel, padding=2), weight, stride=2)
