"""The network that generates a global feature of an image: residual blocks of two linear layers."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dinogen.networks.casts import cast_together
from dinogen.networks.denoising import time_embedding


class Block(nn.Module):
    """x + what two linear layers make of x (B, width) and of an embedding of the time."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm_1 = nn.LayerNorm(width)
        self.linear_1 = nn.Linear(width, width)
        self.embedding = nn.Linear(width, width)
        self.norm_2 = nn.LayerNorm(width)
        self.linear_2 = nn.Linear(width, width)
        nn.init.zeros_(self.linear_2.weight)
        nn.init.zeros_(self.linear_2.bias)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """Of the shape of x.

        Args:
            x: (B, width).
            embedding: of the time and the class, after its activation, (B, width).
        """
        of_1, of_embedding, of_2 = cast_together(self.linear_1, self.embedding, self.linear_2)
        h = F.linear(F.silu(self.norm_1(x)), *of_1) + F.linear(embedding, *of_embedding)
        return x + F.linear(F.silu(self.norm_2(h)), *of_2)


class RepresentationMLP(nn.Module):
    """R of Li et al. 2024, "Return of Unconditional Generation: A Self-supervised Representation
    Generation Method": the network of its representation diffusion model (section 3.2).

    A linear layer to ``width``, ``depth`` residual blocks, each LayerNorm, SiLU and a linear layer
    twice, with the embedding of the time (and class) added between the two, and a linear layer
    back. What a block adds, and the output, begin at zero.

    R also knows the statistics of the feature, so that its checkpoints and exported files carry
    them: it works on features of mean 0 and deviation 1 in every channel.

    Args:
        channels: of the feature.
        width: of the blocks, an even number.
        depth: number of blocks.
        num_classes: of the labels; 0 for none.

    Attributes:
        mean: (channels,) float32 buffer, over the training images.
        std: the same of the deviation.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, channels: int, width: int, depth: int, num_classes: int = 0) -> None:
        super().__init__()
        self.width = width
        self.first = nn.Linear(channels, width)
        self.time = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.label = nn.Embedding(num_classes, width) if num_classes else None
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))
        self.last_norm = nn.LayerNorm(width)
        self.last = nn.Linear(width, channels)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("std", torch.ones(channels))

    def forward(self, x: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        """What R says of features with noise, (B, channels) float32.

        Args:
            x: normalised features with noise, (B, channels).
            t: (B,), as the family scales it; 0 to 1000 from features to noise.
            label: (B,) int64; only if there are classes.
        """
        embedding = self.time(time_embedding(t, self.width))
        if self.label is not None:
            assert label is not None
            embedding = embedding + self.label(label)
        embedding = F.silu(embedding)
        h = self.first(x)
        for block in self.blocks:
            h = block(h, embedding)
        out: Tensor = self.last(F.silu(self.last_norm(h)))
        return out.float()

    def normalized(self, features: Tensor) -> Tensor:
        """Stored features (B, channels) with mean 0 and deviation 1 in every channel, float32."""
        return (features.float() - self.mean) / self.std


class Embedded(nn.Module):
    """A network G by the inputs that its graph has, in their order."""

    def __init__(self, G: nn.Module) -> None:
        super().__init__()
        self.G = G

    def forward(
        self, x: Tensor, t: Tensor, embedding: Tensor, label: Tensor | None = None
    ) -> Tensor:
        """As :meth:`dinogen.networks.denoising.DenoisingNetwork.forward`."""
        output: Tensor = self.G(x, t, label, None, embedding)
        return output
