"""The DINOv3 guide: patch tokens of its vision transformers, or stages of its ConvNeXts.

Siméoni et al., "DINOv3", 2025. The networks are those of transformers. The transformers have a CLS
token and registers; positions are rotations of queries and keys (RoPE), so that every image size
is as good. The ConvNeXts have four stages, whose maps have a location per 4, 8, 16 and 32 pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dinogen.config import GuideConfig
from dinogen.features.base import guide_dtype
from dinogen.features.transformer import (
    Kind,
    TransformerGuide,
    load_transformer,
    read_config,
    transformer_channels,
)

DEFAULT_PATH = "facebook/dinov3-vits16-pretrain-lvd1689m"
_CONVNEXT = "dinov3_convnext"
KIND = Kind(
    name="dinov3",
    title="DINOv3",
    example=DEFAULT_PATH,
    networks={"dinov3_vit": "DINOv3ViTModel", _CONVNEXT: "DINOv3ConvNextModel"},
)


class Dinov3Guide(TransformerGuide):
    """``DINOv3ViTModel``."""

    kind = KIND

    @staticmethod
    def parts(model: Any) -> tuple[nn.ModuleList, nn.Module]:
        """Blocks and final norm of a network."""
        return model.model.layer, model.norm

    def embed(self, pixels: Tensor) -> tuple[Tensor, dict[str, Any]]:
        """(B, 3, S, S) normalized -> (B, prefix + locations, C), and the rotations."""
        hidden = self.model.embeddings(pixels)
        cos, sin = self.model.rope_embeddings(pixels)
        prefix = hidden.shape[1] - len(cos)  # CLS and registers are not rotated
        rotations = F.pad(cos, (0, 0, prefix, 0), value=1.0), F.pad(sin, (0, 0, prefix, 0))
        return hidden, {"position_embeddings": rotations}


class Dinov3ConvNextGuide(TransformerGuide):
    """``DINOv3ConvNextModel``: stages instead of blocks.

    A map has a location per 4, 8, 16 or 32 pixels. Of several stages, the last chosen one sets the
    grid, and the larger maps of those before it are averaged to it. The final norm belongs to stage
    4 alone.
    """

    kind = replace(KIND, arguments={"attn_implementation": "eager"})  # it has none

    @staticmethod
    def parts(model: Any) -> tuple[nn.ModuleList, nn.Module]:
        """Stages and final norm of a network."""
        return model.model.stages, model.layer_norm

    @classmethod
    def prepare(cls, model: Any) -> None:
        """There is no attention to fuse."""

    @staticmethod
    def widths(config: Any) -> list[int]:
        """C of each stage, from the network's config."""
        return [int(size) for size in config.hidden_sizes]

    @staticmethod
    def pixels_per_location(config: Any, blocks: Sequence[int]) -> int:
        """Stride of the last chosen stage."""
        return 4 << (max(blocks) - 1)

    def tokens(self, pixels: Tensor) -> Tensor:
        """(B, 3, S, S) normalized -> (B, locations, C of all chosen stages)."""
        stages, norm = self.parts(self.model)
        grid = pixels.shape[-1] // self.patch_size
        found: dict[int, Tensor] = {}
        x = pixels
        for number, stage in enumerate(stages, start=1):
            x = stage(x)
            if number in self.blocks:
                tokens = F.avg_pool2d(x.float(), x.shape[-1] // grid).flatten(2).transpose(1, 2)
                is_last = number == len(self.model.config.hidden_sizes)
                found[number] = norm(tokens.to(x.dtype)) if is_last else tokens
        return torch.cat([found[number] for number in self.blocks], 2)


def load(config: GuideConfig, device: torch.device) -> TransformerGuide:
    """Load DINOv3; see :func:`dinogen.features.transformer.load_transformer`.

    ``layer`` counts the stages of a ConvNeXt.
    """
    return load_transformer(_guide(config), config, device, guide_dtype(device))


def layer_channels(config: GuideConfig) -> tuple[int, ...]:
    """See :func:`dinogen.features.transformer.transformer_channels`."""
    return transformer_channels(_guide(config), config)


def _guide(config: GuideConfig) -> type[TransformerGuide]:
    is_convnext = read_config(config, KIND).model_type == _CONVNEXT
    return Dinov3ConvNextGuide if is_convnext else Dinov3Guide
