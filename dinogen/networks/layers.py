"""Layers that several networks share: attention, spectral norm, resampling, minibatch deviation.

StyleGAN2 (Karras et al. 2020) resamples with the binomial filter [1, 3, 3, 1] in both directions;
why to filter at all: Zhang 2019, "Making Convolutional Networks Shift-Invariant Again".
"""

from __future__ import annotations

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
