"""The SigLIP guide: patch tokens of the image tower of SigLIP or SigLIP 2.

Zhai et al., "Sigmoid Loss for Language Image Pre-Training", 2023; Tschannen et al., "SigLIP 2:
Multilingual Vision-Language Encoders with Improved Semantic Understanding, Localization, and Dense
Features", 2025. The networks are those of transformers, with or without the tower for text. They
have no CLS token, and the attention pooling behind the last block is left out. SigLIP 2 of one
resolution is a SigLIP network; NaFlex, of any, embeds patches in its own way.
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
    load_transformer,
    transformer_channels,
)

DEFAULT_PATH = "google/siglip2-base-patch16-256"


class SiglipGuide(TransformerGuide):
    """``SiglipVisionModel``, or ``Siglip2VisionModel`` of a NaFlex checkpoint.

    The position embedding is interpolated: bicubic, of NaFlex bilinear with antialias.
    """

    kind = Kind(
        name="siglip",
        title="SigLIP",
        example=DEFAULT_PATH,
        networks={
            "siglip": "SiglipVisionModel",
            "siglip_vision_model": "SiglipVisionModel",
            "siglip2": "Siglip2VisionModel",
            "siglip2_vision_model": "Siglip2VisionModel",
        },
        usual=((0.5,) * 3, (0.5,) * 3),
    )

    @staticmethod
    def parts(model: Any) -> tuple[nn.ModuleList, nn.Module]:
        """Blocks and final norm of a network."""
        return model.encoder.layers, model.post_layernorm

    @classmethod
    def prepare(cls, model: Any) -> None:
        """Leave out the pooling, and embed whole images."""
        super().prepare(model)
        model.head = nn.Identity()
        if model.config.model_type == "siglip2_vision_model":
            model.embeddings = _NaflexEmbeddings(model.embeddings)

    def embed(self, pixels: Tensor) -> tuple[Tensor, dict[str, Any]]:
        """(B, 3, S, S) normalized -> (B, locations, C)."""
        embeddings = self.model.embeddings
        whole = isinstance(embeddings, _NaflexEmbeddings)
        how = {} if whole else {"interpolate_pos_encoding": True}
        return embeddings(pixels, **how), {"attention_mask": None}


class _NaflexEmbeddings(nn.Module):
    """NaFlex's embedding of whole square images; transformers' own reads patches that are cut out.

    Args:
        embeddings: ``Siglip2VisionEmbeddings``, whose linear layer becomes a convolution.
    """

    position: Tensor

    def __init__(self, embeddings: Any) -> None:
        super().__init__()
        linear, side = embeddings.patch_embedding, embeddings.patch_size
        weight = linear.weight.detach().unflatten(1, (side, side, -1)).permute(0, 3, 1, 2)
        self.patches = nn.Conv2d(weight.shape[1], weight.shape[0], side, side)
        with torch.no_grad():
            self.patches.weight.copy_(weight)
            self.patches.bias.copy_(linear.bias)  # type: ignore[union-attr]
        grid = embeddings.position_embedding_size
        position = embeddings.position_embedding.weight.detach().unflatten(0, (grid, grid))
        self.register_buffer("position", position.permute(2, 0, 1)[None].clone(), persistent=False)

    def forward(self, pixels: Tensor) -> Tensor:
        """(B, 3, S, S) -> (B, locations, C)."""
        patches = self.patches(pixels)
        position = F.interpolate(
            self.position.float(),  # bfloat16 has no antialias on CPUs
            size=patches.shape[-2:],
            mode="bilinear",
            align_corners=False,
            antialias=True,
        )
        tokens: Tensor = (patches + position.to(patches.dtype)).flatten(2).transpose(1, 2)
        return tokens


def load(config: GuideConfig, device: torch.device) -> SiglipGuide:
    """Load SigLIP; see :func:`dinogen.features.transformer.load_transformer`."""
    return load_transformer(SiglipGuide, config, device, guide_dtype(device))


def layer_channels(config: GuideConfig) -> tuple[int, ...]:
    """See :func:`dinogen.features.transformer.transformer_channels`."""
    return transformer_channels(SiglipGuide, config)
