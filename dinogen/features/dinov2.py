"""The DINOv2 guide: patch tokens of a frozen vision transformer, with or without registers.

Oquab et al., "DINOv2: Learning Robust Visual Features without Supervision", 2023; Darcet et al.,
"Vision Transformers Need Registers", 2023. The networks are those of transformers.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dinogen.config import GuideConfig
from dinogen.features import transformer
from dinogen.features.base import GuideError, guide_dtype
from dinogen.features.checkpoint import checkpoint_folder
from dinogen.features.transformer import (
    RANDOM_KEY,
    Kind,
    TransformerGuide,
    layers_of,
    load_transformer,
    write_random,
)

DEFAULT_PATH = "facebook/dinov2-small"
# Oquab et al. 2023, table 17
_HIDDEN_SIZES = {"small": 384, "base": 768, "large": 1024, "giant": 1536}
_PUBLISHED = re.compile(rf"facebook/dinov2-(?:with-registers-)?({'|'.join(_HIDDEN_SIZES)})")


class Dinov2Guide(TransformerGuide):
    """``Dinov2Model`` or ``Dinov2WithRegistersModel``, with CLS and register tokens.

    The network interpolates its position embedding to the image's size.
    """

    kind = Kind(
        name="dinov2",
        title="DINOv2",
        example=DEFAULT_PATH,
        networks={
            "dinov2": "Dinov2Model",
            "dinov2_with_registers": "Dinov2WithRegistersModel",
        },
        fixed=True,
    )

    @staticmethod
    def parts(model: Any) -> tuple[nn.ModuleList, nn.Module]:
        """Blocks and final norm of a network."""
        return model.encoder.layer, model.layernorm

    def embed(self, pixels: Tensor) -> tuple[Tensor, dict[str, Any]]:
        """(B, 3, S, S) normalized -> (B, prefix + locations, C)."""
        return self.model.embeddings(pixels), {}


def fuse(model: Any) -> None:
    """Make a frozen network of transformers compute the same in fewer steps.

    See :func:`dinogen.features.transformer.fuse`.
    """
    transformer.fuse(model.encoder.layer)


def load(config: GuideConfig, device: torch.device) -> Dinov2Guide:
    """Load DINOv2; see :func:`dinogen.features.transformer.load_transformer`."""
    return load_transformer(Dinov2Guide, config, device, guide_dtype(device))


def layer_channels(config: GuideConfig) -> tuple[int, ...]:
    """C of each layer of the config; Meta's own checkpoints are known by name.

    Raises:
        GuideError: there is no such checkpoint, or its config.json is damaged.
    """
    return (_hidden_size(config),) * len(layers_of(config))


def _hidden_size(config: GuideConfig) -> int:
    published = _PUBLISHED.fullmatch(config.path)
    if published and not Path(config.path).exists():
        return _HIDDEN_SIZES[published[1]]
    folder, _ = checkpoint_folder(config.path, config.revision, Dinov2Guide.kind.wanted)
    try:
        settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        return int(settings["hidden_size"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise GuideError(
            f"guide.path: {config.path} is damaged (config.json has no hidden_size): download the "
            "whole checkpoint again"
        ) from error


def make_random_dinov2(
    folder: Path,
    *,
    seed: int,
    hidden_size: int = 384,
    num_layers: int = 12,
    num_heads: int = 6,
    patch_size: int = 14,
    image_size: int = 224,
    num_registers: int = 0,
) -> None:
    """Write a checkpoint folder of DINOv2's architecture with seeded random weights.

    Its config says that the weights are random, and loading it logs a warning. The same arguments
    give the same weights.

    Args:
        folder: written whole or not at all; must not exist yet.
        seed: of the weights.
        hidden_size: C; the default shape is DINOv2-small's.
        num_layers: transformer blocks.
        num_heads: attention heads; divides ``hidden_size``.
        patch_size: pixels.
        image_size: pixels; sets the grid of the position embedding.
        num_registers: register tokens; 0 makes the network without registers.

    Raises:
        GuideError: the folder exists.
    """
    shape: dict[str, Any] = {
        "hidden_size": hidden_size,
        "num_hidden_layers": num_layers,
        "num_attention_heads": num_heads,
        "patch_size": patch_size,
        "image_size": image_size,
        RANDOM_KEY: True,
    }

    def build(transformers: Any) -> Any:
        if not num_registers:
            return transformers.Dinov2Model(transformers.Dinov2Config(**shape))
        return transformers.Dinov2WithRegistersModel(
            transformers.Dinov2WithRegistersConfig(num_register_tokens=num_registers, **shape)
        )

    write_random(folder, seed, build)
