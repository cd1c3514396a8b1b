"""Tiny checkpoints of every kind of vision transformer that a guide reads.

Weights of every kind are unlike zero: the initial zeros and ones would hide whole terms.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from dinogen._torchvision import ensure_torchvision

HIDDEN, NUM_LAYERS = 32, 3
SHAPE = {"hidden_size": HIDDEN, "num_hidden_layers": NUM_LAYERS, "num_attention_heads": 2}
SHAPE["intermediate_size"] = 48
# kind: name of its guide, side of its patches
KINDS = {
    "dinov3": ("dinov3", 16),
    "dinov3_gated": ("dinov3", 8),
    "siglip": ("siglip", 16),
    "siglip_vision": ("siglip", 14),
    "naflex": ("siglip", 8),
    "vit": ("vit", 16),
    "dino": ("vit", 8),
    "deit": ("vit", 32),
    "ijepa": ("vit", 14),
    "timm": ("timm", 14),
    "timm_dinov3": ("timm", 16),
    "timm_siglip": ("timm", 16),
    "timm_distilled": ("timm", 16),
}
TIMM = {
    "timm": ("vit_small_patch14_reg4_dinov2", {"img_size": 70}),
    "timm_dinov3": ("vit_small_patch16_dinov3", {"img_size": 64}),
    "timm_siglip": ("vit_base_patch16_siglip_256", {"img_size": 64}),
    "timm_distilled": ("deit_tiny_distilled_patch16_224", {"img_size": 64}),
}
TIMM_SHAPE = {"embed_dim": HIDDEN, "depth": NUM_LAYERS, "num_heads": 2}
MEAN, STD = [0.4, 0.5, 0.6], [0.2, 0.25, 0.3]


def shaken(model: Any) -> Any:
    """The model with noise on each of its parameters."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model.eval()


def build(kind: str, **changes: Any) -> Any:
    """A network of transformers or timm."""
    ensure_torchvision()
    import transformers as hf

    patch = KINDS[kind][1]
    shape = {**SHAPE, "patch_size": patch, "image_size": 5 * patch, **changes}
    if kind in TIMM:
        timm = pytest.importorskip("timm")
        architecture, arguments = TIMM[kind]
        return shaken(timm.create_model(architecture, **TIMM_SHAPE, **arguments, **changes))
    if kind == "dinov3":
        config = hf.DINOv3ViTConfig(num_register_tokens=4, **shape)
        return shaken(hf.DINOv3ViTModel(config))
    if kind == "dinov3_gated":
        return shaken(hf.DINOv3ViTModel(hf.DINOv3ViTConfig(use_gated_mlp=True, **shape)))
    if kind == "siglip":  # with the tower for text, as on the hub
        text = {**SHAPE, "vocab_size": 16, "max_position_embeddings": 4}
        config = hf.SiglipConfig(text_config=text, vision_config=shape)
        return shaken(hf.SiglipModel(config))
    if kind == "siglip_vision":
        return shaken(hf.SiglipVisionModel(hf.SiglipVisionConfig(**shape)))
    if kind == "naflex":
        del shape["image_size"]
        return shaken(hf.Siglip2VisionModel(hf.Siglip2VisionConfig(num_patches=25, **shape)))
    if kind == "vit":  # a classifier, whose tensors have the prefix "vit."
        return shaken(hf.ViTForImageClassification(hf.ViTConfig(num_labels=5, **shape)))
    if kind == "dino":
        return shaken(hf.ViTModel(hf.ViTConfig(**shape), add_pooling_layer=False))
    if kind == "deit":
        return shaken(hf.DeiTModel(hf.DeiTConfig(**shape)))
    assert kind == "ijepa"
    return shaken(hf.IJepaModel(hf.IJepaConfig(**shape)))


def write(kind: str, folder: Path, seed: int = 0, preprocessor: bool = True, **changes: Any) -> Any:
    """Write a checkpoint folder; returns the network that it holds."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = build(kind, **changes)
    if kind in TIMM:
        folder.mkdir(parents=True)
        save_file(model.state_dict(), folder / "model.safetensors")
        config = {
            "architecture": TIMM[kind][0],
            "num_features": model.num_features,
            "num_classes": model.num_classes,
            "model_args": {**TIMM_SHAPE, **TIMM[kind][1], **changes},
            "pretrained_cfg": {"mean": MEAN, "std": STD, "input_size": [3, 70, 70]},
        }
        (folder / "config.json").write_text(json.dumps(config))
        return model
    model.save_pretrained(folder)
    if preprocessor:
        settings = {"image_mean": MEAN, "image_std": STD, "do_normalize": True}
        (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    return model
