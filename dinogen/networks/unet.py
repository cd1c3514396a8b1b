"""The residual U-Net of diffusion: time embedding, skip connections, multi-head self-attention.

The shape is that of Ho et al. 2020, "Denoising Diffusion Probabilistic Models" (appendix B), with
scales and shifts from the time embedding as in Nichol and Dhariwal 2021, "Improved Denoising
Diffusion Probabilistic Models" (section 2.2), and heads of a fixed width as in Dhariwal and Nichol
2021, "Diffusion Models Beat GANs on Image Synthesis" (section 3). Dropout stands where Ho et al.
have it; the caller says what is dropped, for a random state of the module's own would be lost when
a run resumes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dinogen.networks.casts import cast_together, conv
from dinogen.networks.denoising import DenoisingNetwork, Drop, LatentScale, time_embedding
from dinogen.networks.layers import GroupNorm, nearest_conv

Resample = Literal["up", "down"]

MAX_GROUPS = 32
MIN_PER_GROUP = 4


@dataclass(frozen=True)
class Variant:
    """What U-Nets that were trained elsewhere do otherwise; the defaults are what ours do.

    OpenAI's guided-diffusion and improved-diffusion, the TensorFlow code of Ho et al. 2020, and
    diffusers' UNet2DModel differ in these points alone.

    Attributes:
        norm_groups: groups of every group norm; None: see :class:`Norm`.
        norm_eps: added to the variance of a group.
        scale: the embedding scales a block's second norm and shifts it; without, it is added to
            what comes before that norm (Ho et al. 2020).
        num_heads: heads of every attention, whatever their width; None: see ``head_channels``.
        middle_norm: the attention in the middle has a group norm, as all others.
        resampling: the side is halved and doubled by a convolution, or by a residual block around
            mean pooling and nearest upsampling (Brock et al. 2019, "Large Scale GAN Training for
            High Fidelity Natural Image Synthesis", appendix B).
        downsample_padding: zeros of the convolution that halves the side: on all sides, or at the
            right and bottom alone, as in TensorFlow.
        last_frequency: the time embedding's frequencies end nearly at 1/10000 or exactly there.
        time_scale: time steps are multiplied by it before they are embedded.
        time_channels: size of the time embedding; None: ``base_channels``.
    """

    norm_groups: int | None = None
    norm_eps: float = 1e-5
    scale: bool = True
    num_heads: int | None = None
    middle_norm: bool = True
    resampling: Literal["conv", "block"] = "conv"
    downsample_padding: Literal["all", "end"] = "all"
    last_frequency: Literal["near", "exact"] = "near"
    time_scale: float = 1.0
    time_channels: int | None = None


OURS = Variant()


class Norm(GroupNorm):
    """Group norm in as many groups as there can be: at most 32, of at least 4 channels each.

    A group of one channel would remove what the convolution's bias adds, whose gradient
    then is rounding noise that Adam takes for a direction.

    Raises:
        ValueError: the groups of the variant do not divide the channels.
    """

    def __init__(self, channels: int, variant: Variant = OURS) -> None:
        most = max(1, min(MAX_GROUPS, channels // MIN_PER_GROUP))
        groups = variant.norm_groups or max(n for n in range(1, most + 1) if channels % n == 0)
        if channels % groups:
            raise ValueError(
                f"unet.norm_groups {groups} do not divide {channels} channels: choose a divisor of "
                "base_channels, or leave it out"
            )
        super().__init__(groups, channels, variant.norm_eps)

    def modulated(self, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        """With a scale and a shift (B, C, 1, 1) of each sample instead of its own."""
        return torch.addcmul(shift, self.normalized(x, None, None), scale)


def zeroed(conv: nn.Conv2d) -> nn.Conv2d:
    """The same convolution with weights 0: a branch that starts as if it were not there."""
    for parameter in conv.parameters():
        nn.init.zeros_(parameter)
    return conv


class SelfAttention(nn.Module):
    """x + attention over all locations of x (B, C, H, W), in heads of ``head_channels`` each.

    Raises:
        ValueError: the heads do not divide the channels.
    """

    def __init__(self, channels: int, head_channels: int, variant: Variant = OURS) -> None:
        super().__init__()
        if variant.num_heads is not None and channels % variant.num_heads:
            raise ValueError(
                f"unet.num_heads {variant.num_heads} do not divide {channels} channels: choose a "
                "divisor of base_channels"
            )
        if variant.num_heads is None and channels % head_channels:
            raise ValueError(
                f"head_channels {head_channels} do not divide {channels} channels: choose a "
                "divisor of base_channels"
            )
        self.num_heads = variant.num_heads or channels // head_channels
        self.norm: Norm | nn.Identity = Norm(channels, variant)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.proj = zeroed(nn.Conv2d(channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> the same shape."""
        # The fused kernels want the numbers of a head side by side; in channels_last they are.
        *of_norm, of_qkv, of_proj = cast_together(self.norm, self.qkv, self.proj)
        h = self.norm.normalized(x, *of_norm[0]) if isinstance(self.norm, Norm) else x
        qkv = conv(self.qkv, h, of_qkv).flatten(2).mT.contiguous()
        q, k, v = qkv.unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(q, k, v)  # (B, heads, H*W, head channels)
        out = out.transpose(1, 2).flatten(2).mT.unflatten(2, x.shape[2:])
        return x + conv(self.proj, out, of_proj)


class ResBlock(nn.Module):
    """Two 3x3 convolutions with a skip, scaled and shifted by the embedding; then attention.

    Args:
        in_channels: of x.
        out_channels: of what comes out.
        embedding: size of the embedding.
        head_channels: width of an attention head; None for no attention.
        variant: says whether the embedding scales too.
        resample: halve or double the side, in both branches.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        embedding: int,
        head_channels: int | None,
        variant: Variant = OURS,
        resample: Resample | None = None,
    ) -> None:
        super().__init__()
        self.scales = variant.scale
        self.resample = resample
        self.norm0 = Norm(in_channels, variant)
        self.conv0 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.affine = nn.Linear(embedding, (1 + self.scales) * out_channels)
        self.norm1 = Norm(out_channels, variant)
        self.conv1 = zeroed(nn.Conv2d(out_channels, out_channels, 3, padding=1))
        same = in_channels == out_channels
        self.skip = nn.Identity() if same else nn.Conv2d(in_channels, out_channels, 1)
        self.attention = (
            nn.Identity()
            if head_channels is None
            else SelfAttention(out_channels, head_channels, variant)
        )

    def forward(
        self,
        x: Tensor,
        scale: Tensor | None,
        shift: Tensor,
        drop: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor:
        """x (B, I, H, W) -> (B, O, H, W), or half or twice the side.

        Args:
            x: what comes in.
            scale: (B, O) of :func:`modulations`, as is ``shift``.
            shift: (B, O).
            drop: comes before the second convolution.
        """
        own = cast_together(self.norm0, self.conv0, self.conv1, self.skip)
        h = F.silu(self.norm0.normalized(x, *own[0]))
        if self.resample == "down":
            x, h = F.avg_pool2d(x, 2), F.avg_pool2d(h, 2)
        if self.resample == "up":
            x, h = F.interpolate(x, scale_factor=2.0), nearest_conv(h, *own[1])
        else:
            h = conv(self.conv0, h, own[1])
        if scale is None:
            h = F.silu(self.norm1(h + shift[..., None, None]))
        else:
            h = F.silu(self.norm1.modulated(h, scale[..., None, None], shift[..., None, None]))
        h = conv(self.conv1, h if drop is None else drop(h), own[2])
        if isinstance(self.skip, nn.Conv2d):
            x = conv(self.skip, x, own[3])
        out: Tensor = self.attention(x + h)
        return out


def modulations(
    blocks: Sequence[ResBlock], embedding: Tensor, dtype: torch.dtype
) -> Iterator[tuple[Tensor | None, Tensor]]:
    """What each block's second norm is scaled and shifted by, its own weights included.

    Of all blocks in one product: single ones are small, and a GPU would wait for their launches.
    Blocks that do not scale get None, and what to add before that norm.

    Args:
        blocks: in their order.
        embedding: (B, E).
        dtype: of what comes out.

    Returns:
        For each block a scale and a shift, (B, O) each.
    """
    widths = [block.norm1.num_channels for block in blocks]
    weight = torch.cat([block.affine.weight for block in blocks])
    bias = torch.cat([block.affine.bias for block in blocks])
    affine = F.linear(F.silu(embedding), weight, bias).float()
    if not blocks[0].scales:
        return ((None, shift) for shift in affine.to(dtype).split(widths, 1))
    # each block's scales come before its shifts
    pairs = [one.chunk(2, 1) for one in affine.split([2 * width for width in widths], 1)]
    scale, shift = (torch.cat(list(ones), 1) for ones in zip(*pairs, strict=True))
    factor = 1 + scale
    scale = factor * torch.cat([block.norm1.weight for block in blocks])
    shift = torch.addcmul(shift, factor, torch.cat([block.norm1.bias for block in blocks]))
    return zip(scale.to(dtype).split(widths, 1), shift.to(dtype).split(widths, 1), strict=True)


class Up(nn.Module):
    """Nearest upsample, then a 3x3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, 2H, 2W)."""
        return nearest_conv(x, self.conv.weight, self.conv.bias)


class DownAtEnd(nn.Conv2d):
    """A 3x3 convolution of stride 2 that adds zeros at the right and bottom alone."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, 2H, 2W) -> (B, C, H, W)."""
        return super().forward(F.pad(x, (0, 1, 0, 1)))


class UNet(DenoisingNetwork):
    """(images with noise, time steps) -> what the schedule predicts.

    At the start it says 0 everywhere, for the last convolution of each branch is 0.

    Args:
        resolution: side of the images; each level after the first halves it.
        base_channels: channels of the first level; an even number.
        channel_multipliers: of each level, times ``base_channels``.
        num_blocks: residual blocks of each level on the way down; one more on the way up.
        attention_resolutions: sides at which every block attends; the middle always does.
        head_channels: width of an attention head.
        num_classes: 0 for none. Label ``num_classes`` means no class.
        variant: of a U-Net that was trained elsewhere, or the attributes of a :class:`Variant`.
        in_channels: of what it reads and predicts; 3 for images.
        embed_dim: size of a global vector that conditions it; 0 for none.
        align: attributes of an :class:`~dinogen.networks.denoising.Alignment`: which hidden tokens
            :meth:`with_tokens` gives. A layer is a residual block, with its attention.
        scaled_latents: it predicts from normalised latents, and keeps their scale.

    Raises:
        ValueError: an argument does not fit the others; it says which, and what would.
    """

    def __init__(
        self,
        resolution: int,
        base_channels: int = 128,
        channel_multipliers: Sequence[int] = (1, 2, 3, 4),
        num_blocks: int = 2,
        attention_resolutions: Sequence[int] = (16, 8),
        head_channels: int = 64,
        num_classes: int = 0,
        variant: Variant | Mapping[str, Any] = OURS,
        in_channels: int = 3,
        embed_dim: int = 0,
        align: Mapping[str, int] | None = None,
        scaled_latents: bool = False,
    ) -> None:
        super().__init__()
        _check(resolution, base_channels, channel_multipliers, attention_resolutions)
        self.variant = variant = variant if isinstance(variant, Variant) else Variant(**variant)
        self.time_channels = variant.time_channels or base_channels
        if self.time_channels % 2:
            raise ValueError(f"{self.time_channels} time channels: half are sines, half cosines")
        size = 4 * self.time_channels
        self.time = nn.Sequential(
            nn.Linear(self.time_channels, size), nn.SiLU(), nn.Linear(size, size)
        )
        self.label = nn.Embedding(num_classes + 1, size) if num_classes else None

        def block(num_in: int, num_out: int, side: int) -> ResBlock:
            heads = head_channels if side in attention_resolutions else None
            return ResBlock(num_in, num_out, size, heads, variant)

        def down(width: int) -> nn.Module:
            if variant.resampling == "block":
                return ResBlock(width, width, size, None, variant, "down")
            if variant.downsample_padding == "end":
                return DownAtEnd(width)
            return nn.Conv2d(width, width, 3, stride=2, padding=1)

        def up(width: int) -> nn.Module:
            if variant.resampling == "block":
                return ResBlock(width, width, size, None, variant, "up")
            return Up(width)

        widths = [base_channels * multiplier for multiplier in channel_multipliers]
        self.conv_in = nn.Conv2d(in_channels, base_channels, 3, padding=1)
        skips = [channels := base_channels]
        self.down = nn.ModuleList()
        for level, width in enumerate(widths):
            for _ in range(num_blocks):
                self.down.append(block(channels, width, resolution >> level))
                skips.append(channels := width)
            if level + 1 < len(widths):
                self.down.append(down(width))
                skips.append(width)
        self.middle = nn.ModuleList(
            [
                ResBlock(channels, channels, size, head_channels, variant),
                ResBlock(channels, channels, size, None, variant),
            ]
        )
        if not variant.middle_norm:
            self.get_submodule("middle.0.attention").norm = nn.Identity()
        self.up = nn.ModuleList()
        for level, width in reversed(list(enumerate(widths))):
            for _ in range(num_blocks + 1):
                self.up.append(block(channels + skips.pop(), width, resolution >> level))
                channels = width
            if level:
                self.up.append(up(width))
        self.norm_out = Norm(channels, variant)
        self.conv_out = zeroed(nn.Conv2d(channels, in_channels, 3, padding=1))
        widths = [one.norm1.num_channels for one in self._blocks()]
        self._add_conditions(size, widths, list(self._sides(resolution)), embed_dim, align)
        self.latent_scale = LatentScale(in_channels) if scaled_latents else None

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        label: Tensor | None = None,
        drop: Drop | None = None,
        embedding: Tensor | None = None,
        *,
        tokens: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """As in the base."""
        conditions = self.time(
            time_embedding(
                t,
                self.time_channels,
                self.variant.last_frequency == "exact",
                self.variant.time_scale,
            )
        )
        if self.label is not None:
            conditions = conditions + self.label(label)
        conditions = self._conditioned(conditions, embedding)
        if x.device.type == "cpu":
            # its convolutions are a sixth faster so; group norm on a GPU copies to the other format
            x = x.contiguous(memory_format=torch.channels_last)
        x = self.conv_in(x)
        numbered = enumerate(modulations(self._blocks(), conditions, x.dtype))
        hidden: list[Tensor] = []

        def block(module: nn.Module, x: Tensor) -> Tensor:
            number, (scale, shift) = next(numbered)
            of_this = None if drop is None else functools.partial(drop, block=number)
            out: Tensor = module(x, scale, shift, of_this)
            if tokens and self.align is not None and number + 1 == self.align.layer:
                hidden.append(out)
            return out

        skips = [x]
        for module in self.down:
            x = block(module, x) if isinstance(module, ResBlock) else module(x)
            skips.append(x)
        for module in self.middle:
            x = block(module, x)
        for module in self.up:
            if not isinstance(module, ResBlock):
                x = module(x)
            elif module.resample:
                x = block(module, x)
            else:
                x = block(module, torch.cat([x, skips.pop()], 1))
        out: Tensor = self.conv_out(F.silu(self.norm_out(x)))
        return self._with_projected(out.float(), hidden[0].flatten(2).mT if hidden else None)

    def _blocks(self) -> list[ResBlock]:
        """The residual blocks, in the order of the forward."""
        return [module for module in self.modules() if isinstance(module, ResBlock)]

    def _sides(self, side: int) -> Iterator[int]:
        """The side of what comes out of each residual block."""
        for module in (*self.down, *self.middle, *self.up):
            if isinstance(module, ResBlock):
                side = {None: side, "down": side // 2, "up": 2 * side}[module.resample]
                yield side
            else:
                side = 2 * side if isinstance(module, Up) else side // 2


def _check(
    resolution: int,
    base_channels: int,
    channel_multipliers: Sequence[int],
    attention_resolutions: Sequence[int],
) -> None:
    if base_channels % 2:
        raise ValueError(f"base_channels {base_channels} is odd: half are sines, half cosines")
    num_levels = len(channel_multipliers)
    if not num_levels or resolution % (1 << num_levels - 1):
        raise ValueError(
            f"channel_multipliers {list(channel_multipliers)}: a resolution of {resolution} cannot "
            f"be halved {num_levels - 1} times: give fewer"
        )
    sides = [resolution >> level for level in range(num_levels)]
    if wrong := [side for side in attention_resolutions if side not in sides]:
        raise ValueError(f"attention_resolutions: there is no side {wrong[0]}: sides are {sides}")
