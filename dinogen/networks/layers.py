"""Layers that several networks share: attention, spectral norm, resampling, minibatch deviation.

StyleGAN2 (Karras et al. 2020) resamples with the binomial filter [1, 3, 3, 1] in both directions;
why to filter at all: Zhang 2019, "Making Convolutional Networks Shift-Invariant Again".
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from dinogen.networks.casts import cast_together, conv
from dinogen.networks.convolution import conv2d, conv_transpose2d

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
        own = cast_together(self.query, self.key, self.value, self.out)
        query, key, value = (F.conv2d(x, *weights).flatten(2) for weights in own[:3])
        weights = torch.softmax(query.transpose(1, 2) @ key, dim=-1)
        attended = (value @ weights.transpose(1, 2)).unflatten(2, x.shape[2:])
        changed = conv(self.out, attended, own[3])
        # gamma's own type would be that of all that follows
        return x + self.gamma.to(changed.dtype) * changed


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
            iterate([(self, weight)])

    def forward(self, weight: Tensor) -> Tensor:
        """W -> W / sigma, in float32 under autocast too."""
        divided: Tensor = _DividedBySigma.apply(weight, self.u, self.v)
        return divided


class _DividedBySigma(torch.autograd.Function):
    """W / (u' W v), whose gradient is (G - sum(G W / sigma) u v') / sigma (equation 12)."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, u: Tensor, v: Tensor) -> Tensor:
        with torch.autocast(weight.device.type, enabled=False):
            sigma = torch.dot(u, weight.flatten(1) @ v)
        divided = weight / sigma
        ctx.save_for_backward(divided, sigma, u, v)
        return divided

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        divided, sigma, u, v = ctx.saved_tensors
        share = torch.dot(gradient.flatten(), divided.flatten())
        of_weight = torch.addr(gradient.flatten(1), u, share * v, alpha=-1).div_(sigma)
        return of_weight.view_as(divided), None, None


def spectral_norm(layer: nn.Module) -> nn.Module:
    """Divide the layer's weight by its largest singular value from now on; initialise it before."""
    assert isinstance(layer.weight, Tensor)
    norm = SpectralNorm(layer.weight)
    # unsafe: not tried at once, for a weight may be on meta, which knows no autocast
    return parametrize.register_parametrization(layer, "weight", norm, unsafe=True)


def update_spectral_norms(network: nn.Module) -> None:
    """One power iteration for every spectrally normalised weight, to be called once per step."""
    iterate(
        [
            (parametrization, module.original)
            for module in network.modules()
            if isinstance(module, parametrize.ParametrizationList)
            for parametrization in module
            if isinstance(parametrization, SpectralNorm)
        ]
    )


@torch.no_grad()
def iterate(weights: Sequence[tuple[SpectralNorm, Tensor]]) -> None:
    """One power iteration on each weight before division."""
    if not weights:
        return
    us, vs = [norm.u for norm, _ in weights], [norm.v for norm, _ in weights]
    matrices = [weight.flatten(1) for _, weight in weights]
    found = [matrix.T @ u for matrix, u in zip(matrices, us, strict=True)]
    torch._foreach_copy_(vs, _normalized(found))
    found = [matrix @ v for matrix, v in zip(matrices, vs, strict=True)]
    torch._foreach_copy_(us, _normalized(found))


def _normalized(vectors: list[Tensor]) -> list[Tensor]:
    """As ``F.normalize``, all in a few launches."""
    norms = torch._foreach_clamp_min(torch._foreach_norm(vectors), 1e-12)
    return list(torch._foreach_div(vectors, norms))


class GroupNorm(nn.GroupNorm):
    """Group norm in the type of x, also under autocast.

    Autocast would cast x to float32, and leave it so for what follows up to the next convolution.
    A GPU's kernel sums in float32 for half precision too.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> the same shape and type."""
        return self.normalized(x, self.weight, self.bias)

    def normalized(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        """With another weight and bias (C,), or without."""
        if weight is not None and bias is not None:
            weight, bias = weight.to(x.dtype), bias.to(x.dtype)
        with torch.autocast(x.device.type, enabled=False):
            return F.group_norm(x, self.num_groups, weight, bias, self.eps)


class InstanceNorm(nn.InstanceNorm2d):
    """Instance norm with weights, whose second derivative is a few products.

    torch differentiates its own twice in some fifty steps, and gradient penalties need that.
    """

    def __init__(self, channels: int) -> None:
        super().__init__(channels, affine=True)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> the same shape and type."""
        return self.normalized(x, self.weight, self.bias)

    def normalized(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """With another weight and bias (C,)."""
        assert bias is not None
        x, parameters = x.contiguous(), (weight.to(x.dtype), bias.to(x.dtype))
        normalized: Tensor = _InstanceNorm.apply(x, *parameters, self.eps)
        return normalized


class _InstanceNorm(torch.autograd.Function):
    """y = weight * (x - mean) * rstd + bias over each map."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        batch, channels = x.shape[:2]
        size = (batch, channels, x[0, 0].numel(), channels)
        with torch.autocast(x.device.type, enabled=False):
            y, mean, rstd = torch.native_group_norm(x, weight, bias, *size, eps)
        ctx.save_for_backward(x, weight, mean, rstd)
        normalized: Tensor = y
        return normalized

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        return *_InstanceNormBackward.apply(gradient, *ctx.saved_tensors), None


class _InstanceNormBackward(torch.autograd.Function):
    """Gradients of x, weight and bias; that of x can be differentiated once more.

    With P(u) = u - mean(u) - x' mean(u x') for the normalised x', it is weight rstd P(gradient).
    """

    @staticmethod
    def forward(
        ctx: Any, gradient: Tensor, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(gradient, x, weight, mean, rstd)
        return _instance_norm_backward(gradient, x, weight, mean, rstd, (True, True, True))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(
        ctx: Any, of_x: Tensor, of_weight: Tensor | None, of_bias: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, None, None]:
        assert of_weight is None and of_bias is None, "weights' gradients have no derivative"
        gradient, x, weight, mean, rstd = ctx.saved_tensors
        only_x = (True, False, False)
        first = _instance_norm_backward(gradient, x, None, mean, rstd, only_x)[0]
        second = _instance_norm_backward(of_x, x, None, mean, rstd, only_x)[0]
        scale, dims = rstd.to(x.dtype)[..., None, None], (2, 3)
        x = (x - mean.to(x.dtype)[..., None, None]) * scale
        overlap = (of_x * first).mean(dims, keepdim=True)
        bent = x * overlap
        bent.addcmul_(second, (gradient * x).mean(dims, keepdim=True))
        bent.addcmul_(first, (of_x * x).mean(dims, keepdim=True))
        weights = weight[:, None, None]
        of_weights = overlap.sum((0, 2, 3)) * first[0, 0].numel()
        return weights * second, bent.mul_(-weights * scale), of_weights, None, None


def _instance_norm_backward(
    gradient: Tensor,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    wanted: tuple[bool, bool, bool],
) -> tuple[Tensor, Tensor, Tensor]:
    batch, channels = x.shape[:2]
    size = (batch, channels, x[0, 0].numel(), channels)
    found: tuple[Tensor, Tensor, Tensor] = torch.ops.aten.native_group_norm_backward(
        gradient.contiguous(), x, mean, rstd, weight, *size, wanted
    )
    return found


def leaky_relu(x: Tensor, slope: float) -> Tensor:
    """As torch's, for discriminators under a gradient penalty.

    Its second derivative is none, where torch's is a map of zeros that flows on from there.
    """
    y: Tensor = _LeakyRelu.apply(x, slope)
    return y


class _LeakyRelu(torch.autograd.Function):
    """See :func:`leaky_relu`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, slope: float) -> Tensor:
        y = F.leaky_relu(x, slope)
        ctx.slope = slope
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _LeakyReluBackward.apply(gradient, ctx.saved_tensors[0].detach(), ctx.slope), None


class _LeakyReluBackward(torch.autograd.Function):
    """A gradient times 1 or the slope, as y is positive or not."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, y: Tensor, slope: float) -> Tensor:
        ctx.slope = slope
        ctx.save_for_backward(y)
        found: Tensor = torch.ops.aten.leaky_relu_backward(gradient, y, slope, True)
        return found

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return _LeakyReluBackward.apply(gradient, *ctx.saved_tensors, ctx.slope), None, None


def nearest_conv(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Nearest upsample by 2, then convolve 3x3, in one transposed convolution.

    Along an axis an even place sees w0 of the pixel before and w1 + w2 of its own, an odd one
    w0 + w1 of its own and w2 of the pixel after: four ninths of the products.

    Args:
        x: (B, I, H, W).
        weight: (O, I, 3, 3).
        bias: (O,).

    Returns:
        (B, O, 2H, 2W).
    """
    with torch.autocast(x.device.type, enabled=False):
        # sums of neighbours: w2, w2 + w1, w1 + w0, w0
        sums = F.avg_pool2d(weight.flip(2, 3), 2, stride=1, padding=1, divisor_override=1)
    return F.conv_transpose2d(x, sums.transpose(0, 1), bias, stride=2, padding=1)


def minibatch_std(x: Tensor, group_size: int, num_batches: int = 1) -> Tensor:
    """Append one channel: how much the samples of a group differ.

    Karras et al. 2018, "Progressive Growing of GANs", section 3: the standard deviation over the
    group of each feature at each location, averaged to one number. A group is a contiguous run of
    samples of one batch (the last may be shorter), so it does not depend on ranks whose share of
    the batch is a multiple of it.

    Args:
        x: (B, C, H, W).
        group_size: samples per group.
        num_batches: batches of equal size that x holds.

    Returns:
        (B, C + 1, H, W).
    """
    size = len(x) // num_batches
    # batches of whole groups are one batch of whole groups
    batches = (x,) if size % group_size == 0 else x.split(size)
    parts = [part for batch in batches for part in _whole_and_rest(batch, group_size) if len(part)]
    stds = [_std(part.float(), min(group_size, len(part))) for part in parts]
    std = stds[0] if len(stds) == 1 else torch.cat(stds)
    channel = std.view(-1, 1, 1, 1).expand(-1, 1, *x.shape[2:])
    return torch.cat([x, channel.to(x.dtype)], dim=1)


def _whole_and_rest(x: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    whole = len(x) // group_size * group_size
    return x[:whole], x[whole:]


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
    y = conv_transpose2d(x, weight.flip(2, 3).transpose(0, 1), stride=2)
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
        return conv2d(filter_down(x, kernel, down=2, padding=1), weight)
    return conv2d(filter_down(x, kernel, padding=2), weight, stride=2)
