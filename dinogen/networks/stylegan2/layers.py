"""Layers that StyleGAN2's generator and discriminator share, and the mapping network.

Weights are drawn from N(0, 1) and scaled in the forward pass, so that Adam's steps are as large
for every layer (equalised learning rate: Karras et al. 2018, "Progressive Growing of GANs",
section 4.1). Only convolutions follow autocast, and only in blocks that may: see
:func:`autocast_if`.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dinogen.networks.convolution import conv2d
from dinogen.networks.layers import binomial, conv_down

LEAK = 0.2
# keeps float16 in range: Karras et al. 2020, "Training GANs with Limited Data", appendix D
CLAMP = 256.0


def channels_at(resolution: int, base: int, most: int) -> int:
    """Channels of the layers that work at a resolution."""
    return max(1, min(most, base // resolution))


def sizes_up_to(resolution: int) -> list[int]:
    """4, 8, ..., resolution.

    Raises:
        ValueError: it is not a power of two from 4.
    """
    if resolution < 4 or resolution & (resolution - 1):
        raise ValueError(f"resolution {resolution} is not a power of two from 4")
    return [4 << i for i in range((resolution // 4).bit_length())]


def follows_autocast(size: int, resolution: int, num_half: int) -> bool:
    """Whether a block may compute in half precision: the ``num_half`` largest, never 4x4.

    Karras et al. 2020, "Training GANs with Limited Data", appendix D, take the four largest.
    """
    return size > max(4, resolution >> num_half)


def autocast_if(allowed: bool, device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """The surrounding autocast if ``allowed``, else float32."""
    if allowed:
        return contextlib.nullcontext()
    return torch.autocast(device.type, enabled=False)


def in_float16(device: torch.device) -> bool:
    """Whether convolutions here compute in float16, whose range is small."""
    kind = device.type
    return torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) == torch.float16


def activate(x: Tensor, bias: Tensor, gain: float = math.sqrt(2)) -> Tensor:
    """LeakyReLU of x + bias per channel, times a gain, clamped in proportion to it; x's dtype.

    The gain of sqrt 2 keeps the variance. Twice differentiable, in half of the launches that torch
    needs for the single operations.
    """
    y: Tensor = _Activate.apply(x, bias, gain)
    return y


class _Activate(torch.autograd.Function):
    """See :func:`activate`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor, gain: float) -> Tensor:
        ctx.gain, ctx.dtype = gain, bias.dtype
        # LeakyReLU is linear in positive factors
        shift = torch.mul(bias, gain, out=torch.empty_like(bias, dtype=x.dtype))
        y = torch.add(shift[:, None, None], x, alpha=gain)
        limit = _limit(gain)
        y = F.leaky_relu_(y, LEAK).clamp_(-limit, limit)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        (y,) = ctx.saved_tensors
        of_x = _Slope.apply(gradient, y, ctx.gain)
        return of_x, of_x.sum((0, 2, 3), dtype=ctx.dtype), None


class _Slope(torch.autograd.Function):
    """A gradient times the derivative of :func:`activate` where it gave y."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, y: Tensor, gain: float) -> Tensor:
        ctx.gain = gain
        ctx.save_for_backward(y)
        limit = _limit(gain)
        found: Tensor = torch.ops.aten.leaky_relu_backward(gradient, y, LEAK, True)
        found = torch.ops.aten.hardtanh_backward(found, y, -limit, limit)
        return found if gain == 1 else found.mul_(gain)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (y,) = ctx.saved_tensors
        return _Slope.apply(gradient, y, ctx.gain), None, None


def _limit(gain: float) -> float:
    return CLAMP * gain / math.sqrt(2)


def per_channel(values: Tensor, x: Tensor) -> Tensor:
    """(C,) or (B, C) values in the dtype of x (B, C, H, W) and in a shape that broadcasts to it."""
    return values.to(x.dtype)[..., None, None]


class Dense(nn.Module):
    """A linear layer with equalised learning rate, always in float32.

    Args:
        in_features: size of the input.
        out_features: size of the output.
        bias: what the bias starts at.
        lr_scale: how much slower than others the layer learns.
        active: whether LeakyReLU and the gain of sqrt 2 follow.
        gain: of what comes out.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: float = 0.0,
        lr_scale: float = 1.0,
        active: bool = False,
        gain: float = 1.0,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_features, in_features) / lr_scale)
        self.bias = nn.Parameter(torch.full((out_features,), bias / lr_scale))
        # LeakyReLU is linear in positive factors, so the gain may come first
        self.gain = lr_scale * gain * (math.sqrt(2) if active else 1.0)
        self.active = active

    def forward(self, x: Tensor) -> Tensor:
        """(B, I) -> (B, O) float32."""
        with autocast_if(False, x.device):
            alpha = self.gain / math.sqrt(self.weight.shape[1])
            x = torch.addmm(self.bias, x.float(), self.weight.T, beta=self.gain, alpha=alpha)
        return F.leaky_relu(x, LEAK) if self.active else x


class Conv(nn.Module):
    """A convolution with equalised learning rate, by ``down`` 2 after the FIR filter.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        size: of the kernel, 1 or 3.
        down: 1 or 2.
        active: whether bias, LeakyReLU and the gain of sqrt 2 follow; else there is no bias.
        gain: of what comes out.
    """

    kernel: Tensor

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        size: int,
        down: int = 1,
        active: bool = True,
        gain: float = 1.0,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels, size, size))
        self.bias = nn.Parameter(torch.zeros(out_channels)) if active else None
        self.down = down
        self.gain = gain
        self.register_buffer("kernel", binomial(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, I, H, W) -> (B, O, H / down, W / down)."""
        factor = 1 / math.sqrt(self.weight[0].numel())
        weight = self.weight * (factor if self.bias is not None else factor * self.gain)
        if self.down == 2:
            x = conv_down(x, weight, self.kernel)
        else:
            x = conv2d(x, weight, padding=weight.shape[2] // 2)
        return x if self.bias is None else activate(x, self.bias, self.gain * math.sqrt(2))


def normalize(x: Tensor) -> Tensor:
    """(B, N) with mean square 1 in each row."""
    return F.rms_norm(x, x.shape[1:], eps=1e-8)


class Mapping(nn.Module):
    """z and label -> w, by dense layers that learn a hundred times slower than all others.

    Args:
        z_dim: size of the latent; 0 to map labels alone, as the discriminator does.
        w_dim: size of w.
        num_layers: dense layers.
        num_classes: labels are 0 to this less 1; 0 for none.
    """

    def __init__(self, z_dim: int, w_dim: int, num_layers: int, num_classes: int = 0) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.embed = Dense(num_classes, w_dim) if num_classes else None
        sizes = [z_dim + (w_dim if num_classes else 0)] + [w_dim] * num_layers
        self.layers = nn.ModuleList(
            Dense(a, b, lr_scale=0.01, active=True) for a, b in itertools.pairwise(sizes)
        )

    def forward(self, z: Tensor | None, label: Tensor | None = None) -> Tensor:
        """z (B, z_dim) and label (B,) int64, what there is of them -> w (B, w_dim) float32."""
        parts = [] if z is None else [normalize(z.float())]
        if self.embed is not None:
            assert label is not None, "a conditional network needs labels"
            one_hot = F.one_hot(label, self.num_classes).float()
            parts.append(normalize(self.embed(one_hot)))
        x = torch.cat(parts, 1)
        for layer in self.layers:
            x = layer(x)
        return x
