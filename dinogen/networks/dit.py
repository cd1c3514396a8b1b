"""The diffusion transformer: patches of an image as tokens, conditions by adaptive layer norm.

Peebles and Xie 2023, "Scalable Diffusion Models with Transformers" (section 3.2, the adaLN-Zero
block). Three things are of later work, and can be left out: layer norm of queries and keys, which
keeps attention from saturating (Dehghani et al. 2023, "Scaling Vision Transformers to 22 Billion
Parameters", section 2); register tokens, which take up what the network would store in patches of
little content (Darcet et al. 2024, "Vision Transformers Need Registers"); a guidance strength as an
input, for generators that make an image in one step.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dinogen.networks.casts import cast_together
from dinogen.networks.denoising import (
    LONGEST_PERIOD,
    DenoisingNetwork,
    Drop,
    LatentScale,
    time_embedding,
)

# Table 1 of Peebles and Xie 2023; their names go on with the side of a patch, as in XL/2.
SIZES = {
    "S": {"width": 384, "depth": 12, "num_heads": 6},
    "B": {"width": 768, "depth": 12, "num_heads": 12},
    "L": {"width": 1024, "depth": 24, "num_heads": 16},
    "XL": {"width": 1152, "depth": 28, "num_heads": 16},
}
NUM_FREQUENCIES = 256
EPS = 1e-6
STD = 0.02
SPAN = 16


def positions(side: int, width: int, device: torch.device | None = None) -> Tensor:
    """Sines and cosines of the two coordinates of each token of a grid.

    Coordinates run from 0 up to :data:`SPAN` on every grid, so that a location of an image has the
    same position at every resolution. On a grid of 16, that of the paper, they are whole numbers.

    Args:
        side: of the grid.
        width: of the tokens, a multiple of 4: a quarter each are sines and cosines of the column,
            then of the row, with frequencies that fall from 1 to nearly 1/10000.
        device: of what is returned.

    Returns:
        (side * side, width) float32, row by row.
    """
    place = torch.arange(side, dtype=torch.float64, device=device) * (SPAN / side)
    exponents = torch.arange(width // 4, dtype=torch.float64, device=device) / (width // 4)
    angles = place[:, None] * LONGEST_PERIOD**-exponents
    one = torch.cat([angles.sin(), angles.cos()], 1)
    columns, rows = one.expand(side, -1, -1), one[:, None].expand(-1, side, -1)
    return torch.cat([columns, rows], 2).flatten(0, 1).float()


def layer_norm(x: Tensor, weight: Tensor | None = None) -> Tensor:
    """Layer norm of the last axis of x (..., W), in the type of x under autocast too.

    Autocast would cast x to float32, and what comes out back.
    """
    with torch.autocast(x.device.type, enabled=False):
        return F.layer_norm(x, x.shape[-1:], weight, eps=EPS)


class Block(nn.Module):
    """Self-attention and an MLP, each after a layer norm that the conditions scale and shift.

    The conditions weigh both branches too, at the start by 0: the block then is the identity.

    Args:
        width: of the tokens.
        num_heads: of the attention.
        qk_norm: layer norm of the queries and of the keys of each head, whose weights all heads
            share.
    """

    def __init__(self, width: int, num_heads: int, qk_norm: bool) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.modulation = nn.Linear(width, 6 * width)
        self.qkv = nn.Linear(width, 3 * width)

        def norm() -> nn.Module:
            return nn.LayerNorm(width // num_heads, bias=False) if qk_norm else nn.Identity()

        self.norm_q, self.norm_k = norm(), norm()
        self.proj = nn.Linear(width, width)
        self.fc0 = nn.Linear(width, 4 * width)
        self.fc1 = nn.Linear(4 * width, width)

    def forward(
        self, x: Tensor, conditions: Tensor, drop: Callable[[Tensor], Tensor] | None = None
    ) -> Tensor:
        """x (B, N, W) -> the same shape and type.

        Args:
            x: tokens.
            conditions: (B, W), after the nonlinearity.
            drop: comes before the second layer of the MLP.
        """
        of_modulation, of_qkv, of_proj, of_fc0, of_fc1, *of_norms = cast_together(
            self.modulation, self.qkv, self.proj, self.fc0, self.fc1, self.norm_q, self.norm_k
        )
        modulation = F.linear(conditions, *of_modulation).unflatten(1, (6, 1, -1))
        shift0, scale0, gate0, shift1, scale1, gate1 = modulation.unbind(1)
        h = torch.addcmul(shift0, layer_norm(x), 1 + scale0)
        # (3, B, heads, N, head width): the fused kernels want the numbers of a head side by side
        heads = F.linear(h, *of_qkv).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        q, k, v = heads
        if of_norms:
            q, k = (layer_norm(one, norm[0]) for one, norm in zip((q, k), of_norms, strict=True))
        h = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = torch.addcmul(x, gate0, F.linear(h, *of_proj))
        h = torch.addcmul(shift1, layer_norm(x), 1 + scale1)
        h = F.gelu(F.linear(h, *of_fc0), approximate="tanh")
        h = F.linear(h if drop is None else drop(h), *of_fc1)
        return torch.addcmul(x, gate1, h)


class DiT(DenoisingNetwork):
    """(images or latents with noise, times) -> what the schedule predicts.

    At the start it says 0 everywhere. It takes other resolutions than its own, if the patch divides
    them; positions scale with them.

    Args:
        resolution: side of what it reads and predicts.
        patch: side of a patch, which is one token.
        width: of the tokens; a multiple of 4 and of ``num_heads``.
        depth: number of blocks.
        num_heads: of each attention.
        num_registers: tokens that belong to no patch.
        qk_norm: normalise queries and keys.
        in_channels: of what it reads and predicts; 3 for images.
        num_classes: 0 for none. Label ``num_classes`` means no class.
        embed_dim: size of a global vector that conditions it; 0 for none.
        align: attributes of an :class:`~dinogen.networks.denoising.Alignment`: which hidden tokens
            :meth:`with_tokens` gives. A layer is a block.
        guidance_input: it is told a guidance strength, embedded as the time is.
        out_activation: of the output; tanh for one that makes images itself.
        scaled_latents: it predicts from normalised latents, and keeps their scale.

    Raises:
        ValueError: an argument does not fit the others; it says which, and what would.
    """

    positions: Tensor

    def __init__(
        self,
        resolution: int,
        patch: int,
        width: int,
        depth: int,
        num_heads: int,
        num_registers: int = 0,
        qk_norm: bool = True,
        in_channels: int = 3,
        num_classes: int = 0,
        embed_dim: int = 0,
        align: Mapping[str, int] | None = None,
        guidance_input: bool = False,
        out_activation: Literal["tanh"] | None = None,
        scaled_latents: bool = False,
    ) -> None:
        super().__init__()
        _check(resolution, patch, width, num_heads)
        self.patch = patch
        self.side = resolution // patch
        self.out_activation = out_activation
        numbers = in_channels * patch**2
        self.patches = nn.Linear(numbers, width)
        self.time = _embedding(width)
        self.label = nn.Embedding(num_classes + 1, width) if num_classes else None
        self.guidance = _embedding(width) if guidance_input else None
        self.registers = nn.Parameter(torch.empty(num_registers, width)) if num_registers else None
        self.blocks = nn.ModuleList(Block(width, num_heads, qk_norm) for _ in range(depth))
        self.modulation = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, numbers)
        self._initialise()
        self._add_conditions(width, [width] * depth, [self.side] * depth, embed_dim, align)
        self.latent_scale = LatentScale(in_channels) if scaled_latents else None
        # in no checkpoint: it follows from the arguments
        self.register_buffer("positions", positions(self.side, width), persistent=False)

    def _initialise(self) -> None:
        """As the authors' code does."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for embedding in (self.time, self.guidance):
            if embedding is not None:
                nn.init.normal_(embedding.get_parameter("0.weight"), std=STD)
                nn.init.normal_(embedding.get_parameter("2.weight"), std=STD)
        if self.label is not None:
            nn.init.normal_(self.label.weight, std=STD)
        if self.registers is not None:
            nn.init.normal_(self.registers, std=STD)
        for block in self.blocks:
            nn.init.zeros_(block.get_parameter("modulation.weight"))
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.out.weight)

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        label: Tensor | None = None,
        drop: Drop | None = None,
        embedding: Tensor | None = None,
        guidance: Tensor | None = None,
        *,
        tokens: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """As in the base.

        ``guidance`` (B,) float32 is needed if, and only if, the network was built with
        ``guidance_input``.
        """
        conditions = self._conditions(t, label, embedding, guidance)
        side = x.shape[2] // self.patch
        x = self.patches(F.pixel_unshuffle(x, self.patch).flatten(2).mT)
        x = x + self._positions(side).to(x.dtype)
        if self.registers is not None:
            registers = self.registers.to(x.dtype).expand(x.shape[0], -1, -1)
            x = torch.cat([x, registers], 1)
        hidden = None
        for number, block in enumerate(self.blocks):
            of_this = None if drop is None else functools.partial(drop, block=number)
            x = block(x, conditions, of_this)
            if tokens and self.align is not None and number + 1 == self.align.layer:
                hidden = x[:, : side**2]
        shift, scale = self.modulation(conditions).unflatten(1, (2, 1, -1)).unbind(1)
        x = torch.addcmul(shift, layer_norm(x[:, : side**2]), 1 + scale)
        out = F.pixel_shuffle(self.out(x).float().mT.unflatten(2, (side, side)), self.patch)
        return self._with_projected(out.tanh() if self.out_activation else out, hidden)

    def _conditions(
        self,
        t: Tensor,
        label: Tensor | None,
        embedding: Tensor | None,
        guidance: Tensor | None,
    ) -> Tensor:
        """(B, W), after the nonlinearity that each modulation begins with."""
        conditions = self.time(time_embedding(t, NUM_FREQUENCIES))
        if self.label is not None:
            conditions = conditions + self.label(label)
        if (guidance is None) != (self.guidance is None):
            raise ValueError("guidance is given if, and only if, there is guidance_input")
        if self.guidance is not None and guidance is not None:
            conditions = conditions + self.guidance(time_embedding(guidance, NUM_FREQUENCIES))
        return F.silu(self._conditioned(conditions, embedding))

    def _positions(self, side: int) -> Tensor:
        if side == self.side:
            return self.positions
        return positions(side, self.positions.shape[1], self.positions.device)


def _embedding(width: int) -> nn.Sequential:
    """Of the frequencies of a time or a guidance strength."""
    return nn.Sequential(nn.Linear(NUM_FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))


def _check(resolution: int, patch: int, width: int, num_heads: int) -> None:
    if patch < 1 or resolution % patch:
        raise ValueError(
            f"patch {patch} does not divide the resolution {resolution}: choose a divisor"
        )
    if width % num_heads or width % 4:
        raise ValueError(
            f"width {width} has to be a multiple of num_heads {num_heads}, and of 4 for positions"
        )
