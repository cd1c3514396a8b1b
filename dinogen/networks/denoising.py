"""What all networks of diffusion and flow share: embeddings, conditions, tokens for alignment.

Each predicts from images with noise and a time. All take the same conditions: a class, and a global
vector such as a feature of the whole image (Li et al. 2023, "Return of Unconditional Generation: A
Self-supervised Representation Generation Method"). All can give the hidden tokens of one block,
projected to the width of a frozen network's features (Yu et al. 2024, "Representation Alignment for
Generation", section 3.2).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dinogen.networks.casts import cast_together

LONGEST_PERIOD = 10_000


class Drop(Protocol):
    """Dropout of the activations of residual or transformer blocks."""

    def __call__(self, h: Tensor, block: int) -> Tensor:
        """Drop some of those (B, ...) of the block with this number."""


def time_embedding(t: Tensor, size: int, exact_end: bool = False, scale: float = 1.0) -> Tensor:
    """Sines and cosines of time steps (B,) -> (B, size) float32.

    Frequencies fall from 1 to nearly 1/10000 (Vaswani et al. 2017, "Attention Is All You Need",
    section 3.5), the sines first.

    Args:
        t: time steps.
        size: an even number.
        exact_end: the last frequency is exactly 1/10000.
        scale: the time steps are multiplied by it.
    """
    exponents = torch.arange(size // 2, device=t.device) / (size // 2 - exact_end)
    frequencies = torch.exp(-math.log(LONGEST_PERIOD) * exponents)
    t = t.float() if scale == 1 else t.float() * scale
    angles = t[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], 1)


class NoSuchLayer(ValueError):
    """The network has no block of this number; the message names those that it has."""


@dataclass(frozen=True)
class Alignment:
    """Which hidden tokens are aligned with features, and how they are projected.

    Attributes:
        layer: the block after which tokens are taken, counted from 1.
        channels: of the features.
        hidden: width of the projector's hidden layers.
    """

    layer: int
    channels: int
    hidden: int = 2048


class Projector(nn.Module):
    """Three linear layers with SiLU between them, as Yu et al. 2024 have it."""

    def __init__(self, num_in: int, hidden: int, num_out: int) -> None:
        super().__init__()
        self.fc0 = nn.Linear(num_in, hidden)
        self.fc1 = nn.Linear(hidden, hidden)
        self.fc2 = nn.Linear(hidden, num_out)
        for layer in (self.fc0, self.fc1, self.fc2):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, N, I) -> (B, N, O) float32."""
        own = cast_together(self.fc0, self.fc1, self.fc2)
        h = F.silu(F.linear(tokens, *own[0]))
        h = F.silu(F.linear(h, *own[1]))
        return F.linear(h, *own[2]).float()


class LatentScale(nn.Module):
    """Brings each channel of latents to mean 0 and deviation 1, and back.

    Its numbers are buffers of the network that is trained on such latents, so they go with its
    weights.

    Args:
        channels: C of the latents.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("deviation", torch.ones(channels))

    @torch.no_grad()
    def set(self, mean: Tensor, deviation: Tensor) -> None:
        """Take over the mean and the standard deviation (C,) of the data."""
        self.mean.copy_(mean)
        self.deviation.copy_(deviation)

    def normalized(self, z: Tensor) -> Tensor:
        """Latents (B, C, s, s) of an autoencoder, with mean 0 and deviation 1 over the data."""
        return (z - self.mean[:, None, None]) / self.deviation[:, None, None]

    def restored(self, x: Tensor) -> Tensor:
        """The latents (B, C, s, s) of which :meth:`normalized` makes ``x``."""
        return x * self.deviation[:, None, None] + self.mean[:, None, None]


class DenoisingNetwork(nn.Module):
    """Predicts from images with noise; the base of the U-Net and of the diffusion transformer.

    Attributes:
        grids: side of the map or token grid after each block, in the order of the forward.
        null_embedding: (embed_dim,), learnt: stands for a global vector that is not given. None
            without ``embed_dim``.
        latent_scale: of the latents that it predicts from; None where it predicts from images.
    """

    grids: tuple[int, ...]
    latent_scale: LatentScale | None
    null_embedding: nn.Parameter | None

    def _add_conditions(
        self,
        size: int,
        widths: Sequence[int],
        grids: Sequence[int],
        embed_dim: int,
        align: Mapping[str, int] | None,
    ) -> None:
        """Build what the last two arguments ask for; called after all other modules are built.

        So the others start from the same random numbers with and without.

        Args:
            size: of the embedding of time and label.
            widths: channels after each block.
            grids: side after each block.
            embed_dim: size of the global vector; 0 for none.
            align: attributes of an :class:`Alignment`; None for no projector.

        Raises:
            NoSuchLayer: there is no such layer.
        """
        self.grids = tuple(grids)
        self.embed = nn.Linear(embed_dim, size) if embed_dim else None
        self.null_embedding = nn.Parameter(torch.zeros(embed_dim)) if embed_dim else None
        self.align = None if align is None else Alignment(**align)
        self.projector = None
        if self.align is not None:
            self.grid_of(self.align.layer)
            width = widths[self.align.layer - 1]
            self.projector = Projector(width, self.align.hidden, self.align.channels)

    def grid_of(self, layer: int) -> int:
        """Side of the map or token grid after a block.

        Args:
            layer: number of the block, counted from 1 in the order of the forward.

        Raises:
            NoSuchLayer: there is no such block.
        """
        if not 1 <= layer <= len(self.grids):
            sides = ", ".join(str(grid) for grid in sorted(set(self.grids), reverse=True))
            raise NoSuchLayer(
                f"layer {layer}: there are layers 1 to {len(self.grids)} (grids of side {sides})"
            )
        return self.grids[layer - 1]

    def with_tokens(
        self,
        x: Tensor,
        t: Tensor,
        label: Tensor | None = None,
        drop: Drop | None = None,
        embedding: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Predict, and project the hidden tokens of the aligned layer.

        Args:
            x: (B, C, R, R).
            t: (B,).
            label: (B,) int64.
            drop: dropout.
            embedding: (B, embed_dim).

        Returns:
            The same as a plain call, and tokens (B, g * g, channels) float32, row by row, g being
            :meth:`grid_of` the aligned layer.

        Raises:
            ValueError: the network was built without ``align``.
        """
        if self.projector is None:
            raise ValueError("the network has no projector: build it with align")
        # a plain call with a flag, as engines compile what a call runs
        found: tuple[Tensor, Tensor] = self(x, t, label, drop, embedding, tokens=True)
        return found

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
        """Predict.

        Args:
            x: (B, C, R, R) images or latents with noise.
            t: (B,) times, as integers or floats; embedded by frequencies from 1 to 1/10000, so that
                times from 0 to 1 should be scaled to 0 to 1000.
            label: (B,) int64 classes; needed if, and only if, the network knows classes.
            drop: dropout of the blocks, which are numbered from 0 in their order.
            embedding: (B, embed_dim) float32 global vectors, if the network has them; None: the
                learnt ``null_embedding`` for all.
            tokens: return what :meth:`with_tokens` returns.

        Returns:
            (B, C, R, R) float32.
        """
        raise NotImplementedError

    def _conditioned(self, conditions: Tensor, embedding: Tensor | None) -> Tensor:
        """Conditions (B, size) with the global vectors added, if the network has them."""
        if self.embed is None:
            if embedding is not None:
                raise ValueError("the network takes no embedding: build it with embed_dim")
            return conditions
        vector = self.null_embedding if embedding is None else embedding
        added: Tensor = self.embed(vector)
        return conditions + added

    def _with_projected(
        self, output: Tensor, hidden: Tensor | None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """The output, and with hidden tokens (B, N, W) those projected."""
        if hidden is None:
            return output
        assert self.projector is not None
        return output, self.projector(hidden)
