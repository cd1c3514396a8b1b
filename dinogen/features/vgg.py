"""Frozen VGG-16 features at relu1_2, relu2_2 and relu3_3, for perceptual losses.

Simonyan and Zisserman 2015, "Very Deep Convolutional Networks for Large-Scale Image Recognition"
(configuration D), with torchvision's layers and weights.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from dinogen._torchvision import ensure_torchvision
from dinogen.distributed import rng
from dinogen.errors import ConfigError
from dinogen.features.base import GuideInfo, guide_dtype
from dinogen.features.transformer import IMAGENET_MEAN, IMAGENET_STD
from dinogen.files import weights_sha256
from dinogen.hub import local_path

BY_NAME = "vgg16"
RANDOM = "random"
TAPS = {3: "relu1_2", 8: "relu2_2", 15: "relu3_3"}
_LAYERS: list[str | int] = [64, 64, "M", 128, 128, "M", 256, 256, 256]
_PREFIX = "features."  # of torchvision's names

_logger = logging.getLogger(__name__)


class VggFeatures(nn.Module):
    """The three maps; frozen and always in eval mode.

    Computes in the dtype of the layers' weights, regardless of autocast, and returns float32.

    Args:
        layers: torchvision's ``features`` up to relu3_3, in float32 or bfloat16.
        info: its identity.
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, layers: nn.Sequential, info: GuideInfo) -> None:
        super().__init__()
        self.layers = layers.eval().requires_grad_(False)
        self.info = info
        self.training = False
        self.dtype: torch.dtype = next(layers.parameters()).dtype
        mean = torch.tensor(IMAGENET_MEAN).view(1, 3, 1, 1)
        std = torch.tensor(IMAGENET_STD).view(1, 3, 1, 1)
        self.register_buffer("scale", 0.5 / std, persistent=False)
        self.register_buffer("shift", (0.5 - mean) / std, persistent=False)

    def train(self, mode: bool = True) -> VggFeatures:
        """Does nothing: the features are frozen in eval mode."""
        return self

    def forward(self, images: Tensor) -> list[Tensor]:
        """(B, 3, R, R) RGB in [-1, 1] -> maps of 64 channels at R, 128 at R/2 and 256 at R/4."""
        x = (images.float() * self.scale + self.shift).to(self.dtype)
        maps = []
        with torch.autocast(images.device.type, enabled=False):
            for number, layer in enumerate(self.layers):
                x = layer(x)
                if number in TAPS:
                    maps.append(x.float())
        return maps


def load_vgg(weights: str, device: torch.device, key: str) -> VggFeatures:
    """Load VGG-16 up to relu3_3.

    Args:
        weights: ``vgg16`` for torchvision's IMAGENET1K_V1, from torch's hub cache or downloaded;
            the path of a .safetensors or .pth file with tensors named ``features.0.weight`` and so
            on, as torchvision names them (others are ignored); or ``random`` for seeded random
            weights, which every result then mentions.
        device: where it will run; its weights are in :func:`guide_dtype` of it.
        key: of the config, named in errors.

    Raises:
        ConfigError: the weights are not available, or are not those of VGG-16; names the key and
            the remedy.
    """
    ensure_torchvision()
    from torchvision.models.vgg import make_layers

    with rng.torch_seed(0, BY_NAME):
        layers: nn.Sequential = make_layers(_LAYERS)
        _randomize(layers)
    if weights == RANDOM:
        _logger.warning(
            "RANDOM VGG: %s is 'random': seeded random weights; a loss with them is only good for "
            "a trial",
            key,
        )
    else:
        _load(layers, _by_name(key) if weights == BY_NAME else _from_file(weights, key), key)
    info = GuideInfo(
        name="vgg16",
        path=weights,
        revision="IMAGENET1K_V1" if weights == BY_NAME else None,
        weights_sha256=weights_sha256(layers.state_dict()),
        num_channels=256,
        layer=max(TAPS),
        random=weights == RANDOM,
    )
    return VggFeatures(layers.to(guide_dtype(device)), info).to(device)


def _by_name(key: str) -> Mapping[str, Any]:
    from torchvision.models import VGG16_Weights

    source = VGG16_Weights.IMAGENET1K_V1
    try:
        found: dict[str, Any] = source.get_state_dict(
            progress=False, check_hash=True, map_location="cpu", weights_only=True
        )
    except Exception as error:  # network, disk, hash and loader raise many types
        folder = Path(torch.hub.get_dir()) / "checkpoints"
        raise ConfigError(
            f"{key}: {BY_NAME} is missing or damaged in {folder}, and cannot be downloaded "
            f"({_first_line(error)}): on a machine with network download {source.url}, then put it "
            f"there or set {key} to its path"
        ) from error
    return found


def _from_file(path: str, key: str) -> Mapping[str, Any]:
    file = local_path(path, key)
    if not file.is_file():
        raise ConfigError(
            f"{key}: {path} is not a file: give {BY_NAME}, or the path of its weights as "
            f".safetensors or .pth"
        )
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        found: Any = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # the readers raise many types
        raise ConfigError(
            f"{key}: {path} cannot be read as weights ({_first_line(error)}): download the file "
            "again"
        ) from error
    if not isinstance(found, Mapping):
        raise ConfigError(f"{key}: {path} holds a {type(found).__name__}: save a state dict there")
    return found


def _load(layers: nn.Sequential, found: Mapping[str, Any], key: str) -> None:
    own = layers.state_dict()
    wrong = [
        f"{_PREFIX}{name}"
        for name, tensor in own.items()
        if getattr(found.get(_PREFIX + name), "shape", None) != tensor.shape
    ]
    if wrong:
        raise ConfigError(
            f"{key}: not the weights of VGG-16: {', '.join(wrong[:3])}"
            f"{', ...' if len(wrong) > 3 else ''} missing or of another shape: give the whole file "
            f"of torchvision's vgg16 (without batch norm)"
        )
    layers.load_state_dict({name: found[_PREFIX + name] for name in own})


def _randomize(layers: nn.Sequential) -> None:
    for layer in layers:
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            assert layer.bias is not None
            nn.init.zeros_(layer.bias)


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else repr(error)
