"""The section ``text:`` of a guided run: what stands for the text in training, and its weight."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from dinogen.config import Section


class TextOptions(Section):
    """Keys of ``text:``; the network is that of ``clip:``, which has embedded the data as well."""

    embed_dim: int = Field(
        512, ge=1, description="size of the embeddings of clip: 512 of CLIP's ViT-B, 768 of ViT-L"
    )
    condition: Literal["images", "captions"] = Field(
        "images",
        description="what is asked for in training: each real picture's own embedding (needs no "
        "captions), or that of its caption",
    )
    noise: float = Field(
        0.75,
        ge=0,
        description="of images: length of the noise that makes their embeddings as far from "
        "themselves as captions are",
    )
    dropout: float = Field(
        0.2, ge=0, lt=1, description="share of samples that are asked for nothing"
    )
    clip_weight: float = Field(
        1.0,
        ge=0,
        description="weight of 1 - cos between the embedding of a picture and what was asked for",
    )
    joint_weight: float = Field(
        1.0,
        ge=0,
        description="how much, beside features, what was asked for counts in objectives between "
        "distributions: they compare what belongs together; 0: features alone",
    )
    mapping_layers: int = Field(2, ge=1, description="dense layers that join z and embedding")

    @property
    def level(self) -> str:
        """The level that holds what is asked for."""
        return "text" if self.condition == "captions" else "clip"
