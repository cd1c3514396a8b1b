"""The DINOv2 guide: patch tokens of a frozen vision transformer, with or without registers.

Oquab et al., "DINOv2: Learning Robust Visual Features without Supervision", 2023; Darcet et al.,
"Vision Transformers Need Registers", 2023. The networks are those of transformers.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dinogen._torchvision import ensure_torchvision
from dinogen.config import GuideConfig
from dinogen.features.base import GuideError, GuideInfo, guide_dtype
from dinogen.features.checkpoint import (
    GUIDE,
    checkpoint_folder,
    damage_as_guide_error,
    hash_folder,
    quiet_transformers,
    read_model,
)

RANDOM_KEY = "dinogen_random_weights"
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

_logger = logging.getLogger(__name__)


class Dinov2Guide(nn.Module):
    """Patch tokens after the final layer norm, as a map; CLS and registers are dropped.

    With several blocks, their maps are concatenated along the channels, each after that norm.
    Computes in the dtype of the model's weights, regardless of autocast, and returns float32. The
    network interpolates its position embedding to the image's size. Always in eval mode.

    Args:
        model: ``Dinov2Model`` or ``Dinov2WithRegistersModel``, in float32 or bfloat16.
        info: its identity.
        blocks: whose tokens are concatenated, counted from 1; empty for only the last block.
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, model: nn.Module, info: GuideInfo, blocks: Sequence[int] = ()) -> None:
        super().__init__()
        self.model = model.eval().requires_grad_(False)
        self.info = info
        self.blocks = tuple(blocks)
        self.training = False
        config: Any = model.config
        self.patch_size = int(config.patch_size)
        self.dtype: torch.dtype = next(model.parameters()).dtype
        self.num_prefix = 1 + int(getattr(config, "num_register_tokens", 0))
        mean = torch.tensor(IMAGENET_MEAN).view(1, 3, 1, 1)
        std = torch.tensor(IMAGENET_STD).view(1, 3, 1, 1)
        self.register_buffer("scale", 0.5 / std, persistent=False)
        self.register_buffer("shift", (0.5 - mean) / std, persistent=False)

    def train(self, mode: bool = True) -> Dinov2Guide:
        """Does nothing: a guide is frozen in eval mode."""
        return self

    def input_size(self, grid: int) -> int:
        """Side in pixels of the image whose feature map is exactly grid x grid."""
        return self.patch_size * grid

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, S, S) RGB in [-1, 1], S a multiple of the patch -> (B, C, S/patch, S/patch).

        Raises:
            ValueError: another shape.
        """
        height, width = images.shape[-2:]
        if height != width or height % self.patch_size:
            raise ValueError(
                f"DINOv2 needs square images of a multiple of {self.patch_size} pixels, "
                f"not {height}x{width}"
            )
        pixels = images.float() * self.scale + self.shift
        with torch.autocast(images.device.type, enabled=False):
            hidden = self._tokens(pixels.to(self.dtype))
        patches = hidden[:, self.num_prefix :].float().transpose(1, 2)
        grid = height // self.patch_size
        return patches.reshape(len(images), -1, grid, grid)

    def _tokens(self, pixels: Tensor) -> Tensor:
        """All tokens, (B, prefix + locations, C)."""
        model: Any = self.model
        if not self.blocks:
            last: Tensor = model(pixel_values=pixels).last_hidden_state
            return last
        hidden: Tensor = model.embeddings(pixels)
        found: dict[int, Tensor] = {}
        for number, block in enumerate(model.encoder.layer, start=1):
            hidden = block(hidden)
            if number in self.blocks:
                found[number] = model.layernorm(hidden)
        return torch.cat([found[number] for number in self.blocks], 2)


class _Attention(nn.Module):
    """Attention of a frozen block, with one product for queries, keys and values.

    Args:
        attention: that of transformers, which has a product for each.
    """

    def __init__(self, attention: Any) -> None:
        super().__init__()
        parts = [attention.q_proj, attention.k_proj, attention.v_proj]
        self.num_heads: int = attention.num_attention_heads
        self.scaling: float = attention.scaling
        self.widths: list[int] = [part.out_features for part in parts]
        has_bias = parts[0].bias is not None
        self.qkv = nn.Linear(parts[0].in_features, sum(self.widths), has_bias)
        self.o_proj: nn.Linear = attention.o_proj
        with torch.no_grad():
            self.qkv.weight.copy_(torch.cat([part.weight for part in parts]))
            if has_bias:
                self.qkv.bias.copy_(torch.cat([part.bias for part in parts]))

    def forward(self, hidden_states: Tensor, **_: Any) -> tuple[Tensor, None]:
        """(B, T, C) -> (B, T, C) and no weights, as transformers calls it."""
        q, k, v = (
            part.unflatten(2, (self.num_heads, -1)).transpose(1, 2)
            for part in self.qkv(hidden_states).split(self.widths, 2)
        )
        found = F.scaled_dot_product_attention(q, k, v, scale=self.scaling)
        projected: Tensor = self.o_proj(found.transpose(1, 2).flatten(2))
        return projected, None


@torch.no_grad()
def fuse(model: Any) -> None:
    """Make a frozen network of transformers compute the same in fewer steps.

    Queries, keys and values come from one product, and the scales of a block's two branches are
    part of the weights before them. To be called while the weights are float32.
    """
    for block in model.encoder.layer:
        block.attention = _Attention(block.attention)
        last = block.mlp.fc2 if hasattr(block.mlp, "fc2") else block.mlp.down_proj
        for linear, scale in (
            (block.attention.o_proj, block.layer_scale1),
            (last, block.layer_scale2),
        ):
            linear.weight.mul_(scale.lambda1[:, None])
            linear.bias.mul_(scale.lambda1)
        block.layer_scale1, block.layer_scale2 = nn.Identity(), nn.Identity()


def load(config: GuideConfig, device: torch.device) -> Dinov2Guide:
    """Load DINOv2 by hub name or from a local checkpoint folder; safetensors only.

    Args:
        config: ``path`` and ``revision`` of the checkpoint; ``layer`` counts blocks: 1 is the
            output of the first block, -1 of the last; several are concatenated. The final layer
            norm is applied to every layer.
        device: where it will run; its weights are in :func:`guide_dtype` of it.

    Raises:
        GuideError: the weights are missing, damaged or incomplete, or belong to another network;
            or there is no such layer.
    """
    folder, revision = checkpoint_folder(config.path, config.revision)
    with damage_as_guide_error(GUIDE.key, config.path):
        model, model_config = _read_model(folder, config.path)
        weights = hash_folder(folder, "*.safetensors")
    layers = config.layer if isinstance(config.layer, tuple) else (config.layer,)
    blocks = _keep_layers(model, layers)
    random = bool(getattr(model_config, RANDOM_KEY, False))
    if random:
        _logger.warning(
            "RANDOM GUIDE: %s has seeded random weights; its features are only good for a trial",
            config.path,
        )
    info = GuideInfo(
        name="dinov2",
        path=config.path,
        revision=revision,
        weights_sha256=weights,
        num_channels=int(model_config.hidden_size) * len(blocks),
        layer=blocks if len(blocks) > 1 else blocks[0],
        random=random,
    )
    several = blocks if len(blocks) > 1 else ()
    fuse(model)
    return Dinov2Guide(model.to(guide_dtype(device)), info, several).to(device)


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
    ensure_torchvision()
    import transformers

    if folder.exists():
        raise GuideError(f"{folder} exists: remove it, or write the random guide elsewhere")
    shape: dict[str, Any] = {
        "hidden_size": hidden_size,
        "num_hidden_layers": num_layers,
        "num_attention_heads": num_heads,
        "patch_size": patch_size,
        "image_size": image_size,
        RANDOM_KEY: True,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: Any
        if num_registers:
            model = transformers.Dinov2WithRegistersModel(
                transformers.Dinov2WithRegistersConfig(num_register_tokens=num_registers, **shape)
            )
        else:
            model = transformers.Dinov2Model(transformers.Dinov2Config(**shape))
    partial = folder.with_name(f".{folder.name}.partial")
    with quiet_transformers():
        model.save_pretrained(partial)
    for file in partial.iterdir():
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
    partial.rename(folder)


def _read_model(folder: Path, path: str) -> tuple[Any, Any]:
    """The network in float32, and its config; ``path`` is the folder as the user wrote it."""
    ensure_torchvision()
    import transformers

    config: Any = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    classes: dict[str, Any] = {
        "dinov2": transformers.Dinov2Model,
        "dinov2_with_registers": transformers.Dinov2WithRegistersModel,
    }
    if config.model_type not in classes:
        raise GuideError(
            f"guide.path: {path} holds a {config.model_type!r} network: give a DINOv2 checkpoint, "
            "such as facebook/dinov2-small"
        )
    model = read_model(classes[config.model_type], folder, config, GUIDE.key, path)
    return model, config


def _keep_layers(model: Any, layers: Sequence[int | str]) -> list[int]:
    """Remove the blocks after the last of ``layers``; returns their numbers from the front."""
    num_layers = len(model.encoder.layer)
    resolved = []
    for layer in layers:
        number = layer if isinstance(layer, int) else 0
        number = number if number >= 0 else num_layers + 1 + number
        if not 1 <= number <= num_layers:
            raise GuideError(
                f"guide.layer: {layer} is not one of the network's {num_layers} blocks: "
                f"use 1 to {num_layers}, or -1 for the last"
            )
        resolved.append(number)
    if len(set(resolved)) < len(resolved):
        raise GuideError(f"guide.layer: {list(layers)}: -1 is block {num_layers}: list it once")
    model.encoder.layer = model.encoder.layer[: max(resolved)]
    return resolved
