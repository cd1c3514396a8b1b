"""The DINOv3 guide: patch tokens of its vision transformers, or stages of its ConvNeXts.

Siméoni et al., "DINOv3", 2025. The networks are those of transformers. The transformers have a CLS
token and registers; positions are rotations of queries and keys (RoPE), so that every image size
is as good. The ConvNeXts have four stages, whose maps have a location per 4, 8, 16 and 32 pixels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dinogen.config import GuideConfig
from dinogen.features.base import guide_dtype
from dinogen.features.transformer import (
    Kind,
    TransformerGuide,
    hidden_sizes,
    load_transformer,
)

DEFAULT_PATH = "facebook/dinov3-vits16-pretrain-lvd1689m"
_CONVNEXT = "dinov3_convnext"


class Dinov3Guide(TransformerGuide):
    """``DINOv3ViTModel``."""

    kind = Kind(
        name="dinov3",
        title="DINOv3",
        example=DEFAULT_PATH,
        networks={"dinov3_vit": "DINOv3ViTModel"},
    )

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


def load(config: GuideConfig, device: torch.device) -> Dinov3Guide:
    """Load DINOv3; see :func:`dinogen.features.transformer.load_transformer`."""
    return load_transformer(Dinov3Guide, config, device, guide_dtype(device))


def layer_channels(config: GuideConfig) -> tuple[int, ...]:
    """See :func:`dinogen.features.transformer.hidden_sizes`."""
    return hidden_sizes(config, Dinov3Guide.kind)
