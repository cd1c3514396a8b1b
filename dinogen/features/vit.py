"""The ViT guide: patch tokens of a plain vision transformer: ViT, DINO, DeiT or I-JEPA.

Dosovitskiy et al., "An Image is Worth 16x16 Words", 2021; Caron et al., "Emerging Properties in
Self-Supervised Vision Transformers", 2021 (DINO, a ViT); Touvron et al., "Training data-efficient
image transformers", 2021; Assran et al., "Self-Supervised Learning from Images with a
Joint-Embedding Predictive Architecture", 2023. The networks are those of transformers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dinogen.config import GuideConfig
from dinogen.features.base import guide_dtype
from dinogen.features.transformer import (
    Kind,
    TransformerGuide,
    load_transformer,
    transformer_channels,
)

DEFAULT_PATH = "facebook/dino-vits16"


class VitGuide(TransformerGuide):
    """``ViTModel`` and its kin; the position embedding is interpolated (bicubic)."""

    kind = Kind(
        name="vit",
        title="ViT",
        example=DEFAULT_PATH,
        networks={"vit": "ViTModel", "deit": "DeiTModel", "ijepa": "IJepaModel"},
        arguments={"add_pooling_layer": False},
        usual=((0.5,) * 3, (0.5,) * 3),
    )

    @staticmethod
    def parts(model: Any) -> tuple[nn.ModuleList, nn.Module]:
        """Blocks and final norm of a network."""
        return model.layers, model.layernorm

    def embed(self, pixels: Tensor) -> tuple[Tensor, dict[str, Any]]:
        """(B, 3, S, S) normalized -> (B, prefix + locations, C)."""
        return self.model.embeddings(pixels, interpolate_pos_encoding=True), {}


def load(config: GuideConfig, device: torch.device) -> VitGuide:
    """Load a ViT; see :func:`dinogen.features.transformer.load_transformer`."""
    return load_transformer(VitGuide, config, device, guide_dtype(device))


def layer_channels(config: GuideConfig) -> tuple[int, ...]:
    """See :func:`dinogen.features.transformer.transformer_channels`."""
    return transformer_channels(VitGuide, config)
