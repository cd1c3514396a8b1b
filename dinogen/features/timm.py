"""The timm guide: patch tokens of a vision transformer that timm knows.

Wightman, "PyTorch Image Models", https://github.com/huggingface/pytorch-image-models. Those whose
position embedding takes every image size: timm's ``vit_*`` with and without registers, ``deit_*``,
``deit3_*``, ``eva02_*`` and its own conversion of DINOv3, with CLS tokens or pooled by attention,
which is left out.
"""

from __future__ import annotations

import importlib
import itertools
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from dinogen._torchvision import ensure_torchvision
from dinogen.config import GuideConfig
from dinogen.features.base import GuideError, guide_dtype
from dinogen.features.checkpoint import (
    GUIDE,
    Wanted,
    checkpoint_folder,
    damage_as_guide_error,
    missing_weights,
    wrong_shape,
)
from dinogen.features.transformer import (
    IMAGENET,
    RANDOM_KEY,
    Checkpoint,
    Kind,
    TransformerGuide,
    describe,
    hash_with_normalisation,
    layers_of,
    resolve_layers,
)

DEFAULT_PATH = "timm/vit_small_patch14_dinov2.lvd142m"
_WEIGHTS = "model.safetensors"  # some folders hold them under open_clip's names too
_WANTED = Wanted(GUIDE.key, DEFAULT_PATH, ("config.json", _WEIGHTS))


class TimmGuide(TransformerGuide):
    """A network of timm's classes ``VisionTransformer`` and ``Eva``."""

    kind = Kind("timm", "timm", DEFAULT_PATH, {})

    def tokens(self, pixels: Tensor) -> Tensor:
        """(B, 3, S, S) normalized -> (B, locations, C of all chosen blocks)."""
        found: list[Tensor] = self.model.forward_intermediates(
            pixels,
            indices=[number - 1 for number in self.blocks],
            norm=True,
            output_fmt="NLC",
            intermediates_only=True,
        )
        in_order = dict(zip(sorted(self.blocks), found, strict=True))
        chosen = [in_order[number] for number in self.blocks]
        return chosen[0] if len(chosen) == 1 else torch.cat(chosen, 2)


class _Rotations(nn.Module):
    """timm's rotary position embedding, kept for each grid.

    timm makes it on the host and copies it to the device, for which every step would wait.

    Args:
        rope: timm's own.
    """

    def __init__(self, rope: Any) -> None:
        super().__init__()
        self.rope = rope
        self._kept: dict[tuple[int, int, torch.device], Tensor] = {}

    def get_embed(self, shape: tuple[int, int]) -> Tensor:
        """As timm's, for a grid of height x width."""
        device = next(itertools.chain(self.rope.buffers(), self.rope.parameters())).device
        key = (*shape, device)
        if key not in self._kept:
            # also a forward with gradients uses what one without has made
            with torch.inference_mode(False), torch.no_grad():
                self._kept[key] = self.rope.get_embed(shape=shape)
        return self._kept[key]


def load(config: GuideConfig, device: torch.device) -> TimmGuide:
    """Load a network of timm by hub name or from a local folder, as timm writes it for the hub.

    Args:
        config: ``path`` and ``revision`` of the folder with config.json, which says how images are
            normalized, and model.safetensors; ``layer`` counts blocks: 1 is the output of the
            first block, -1 of the last; several are concatenated. The final norm, if the network
            has one, is applied to every layer.
        device: where it will run; its weights are in :func:`guide_dtype` of it.

    Raises:
        GuideError: timm is not installed or does not know the network; the weights are missing,
            damaged or incomplete; it is no transformer for all image sizes; or there is no such
            layer.
    """
    folder, revision, settings = _settings(config)
    model = _build(config, settings)
    layers = resolve_layers(len(model.blocks), layers_of(config))
    model.prune_intermediate_layers([max(layers) - 1], prune_norm=False, prune_head=True)
    with damage_as_guide_error(GUIDE.key, config.path):
        told = settings.get("pretrained_cfg", settings)
        normalisation = told.get("mean", IMAGENET[0]), told.get("std", IMAGENET[1])
        _fill(model, folder / _WEIGHTS, config)
    weights = hash_with_normalisation(folder, config, normalisation, _WEIGHTS)
    found = Checkpoint(model, folder, revision, bool(settings.get(RANDOM_KEY, False)))
    if getattr(model, "rope", None) is not None:
        model.rope = _Rotations(model.rope)
    channels = [int(model.embed_dim)] * len(layers)
    info = describe(config, "timm", found, weights, layers, channels)
    patch_size = int(model.feature_info[-1]["reduction"])
    return TimmGuide(model.to(guide_dtype(device)), info, layers, patch_size, normalisation).to(
        device
    )


def layer_channels(config: GuideConfig) -> tuple[int, ...]:
    """C of each layer of the config; the network is built, but without memory for its weights.

    Raises:
        GuideError: as :func:`load`, but for the weights.
    """
    _, _, settings = _settings(config)
    with torch.device("meta"):
        model = _build(config, settings)
    return (int(model.embed_dim),) * len(layers_of(config))


def _settings(config: GuideConfig) -> tuple[Path, str | None, dict[str, Any]]:
    """The checkpoint's folder and hub commit, and what its config.json says."""
    folder, revision = checkpoint_folder(config.path, config.revision, _WANTED)
    with damage_as_guide_error(GUIDE.key, config.path):
        settings: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if "architecture" not in settings:
            raise GuideError(
                f"guide.path: {config.path} holds a {settings.get('model_type')!r} network of "
                f"transformers: give a timm checkpoint, such as {DEFAULT_PATH}"
            )
    return folder, revision, settings


def _build(config: GuideConfig, settings: dict[str, Any]) -> Any:
    """The network with random weights, without its head."""
    ensure_torchvision()
    try:
        import timm
        from timm.models import Eva, VisionTransformer, is_model
    except ImportError as error:
        raise GuideError(
            "guide.name: timm needs the package timm: pip install 'dinogen[timm]'"
        ) from error
    architecture = str(settings["architecture"])
    if not is_model(architecture):
        raise GuideError(
            f"guide.path: {config.path}: timm {timm.__version__} does not know {architecture}: "
            "upgrade timm, or choose another network"
        )
    arguments = {**(settings.get("model_args") or {}), "num_classes": 0, "dynamic_img_size": True}
    try:
        model: Any = timm.create_model(architecture, pretrained=False, **arguments)
    except TypeError:
        model = None  # its class has no dynamic_img_size
    if not isinstance(model, (VisionTransformer, Eva)):
        raise GuideError(
            f"guide.path: {config.path}: timm's {architecture} is not one of the vision "
            f"transformers that take every image size: give a vit_, deit3_ or eva02_, such as "
            f"{DEFAULT_PATH}"
        )
    return model


def _fill(model: Any, file: Path, config: GuideConfig) -> None:
    """Set all weights, after the conversion that timm has for this kind of network."""
    stored: dict[str, Tensor] = load_file(file)
    module = importlib.import_module(type(model).__module__)
    stored = module.checkpoint_filter_fn(stored, model)
    wanted = model.state_dict()
    if missing := sorted(set(wanted) - set(stored)):
        raise missing_weights(GUIDE.key, config.path, missing)
    for name, tensor in wanted.items():
        if stored[name].shape != tensor.shape:
            raise wrong_shape(GUIDE.key, config.path, name, stored[name].shape, tensor.shape)
    model.load_state_dict({name: stored[name].float() for name in wanted})
