"""Backbones of LPIPS in torchvision's format, of random weights; LPIPS by torchvision alone."""

from __future__ import annotations

import math
from pathlib import Path

import torch
import torch.nn.functional as F

from dinogen._torchvision import ensure_torchvision

ensure_torchvision()

MODELS = {"alex": "alexnet", "vgg": "vgg16", "squeeze": "squeezenet1_1"}
# torchvision's layers whose outputs LPIPS compares: each network's ReLUs or fire modules
TAPS = {
    "alex": (1, 4, 7, 9, 11),
    "vgg": (3, 8, 15, 22, 29),
    "squeeze": (1, 4, 7, 9, 10, 11, 12),
}
MEAN = torch.tensor([-0.030, -0.088, -0.188]).view(1, 3, 1, 1)
STD = torch.tensor([0.458, 0.448, 0.450]).view(1, 3, 1, 1)


def save_backbone(net: str, path: Path) -> Path:
    """Save random weights whose maps neither vanish nor explode; only what is before the pool."""
    import torchvision.models

    with torch.device("meta"):
        model = getattr(torchvision.models, MODELS[net])(weights=None)
    generator = torch.Generator().manual_seed(len(net))
    weights = {}
    for name, shape in ((n, t.shape) for n, t in model.state_dict().items()):
        if name.startswith("features."):
            std = math.sqrt(2 / math.prod(shape[1:])) if len(shape) > 1 else 0.1
            weights[name] = torch.randn(shape, generator=generator) * std
    weights["classifier.1.weight"] = torch.zeros(2, 2)  # ignored
    torch.save(weights, path)
    return path


def lpips_by_hand(
    net: str, backbone: Path, heads: Path, a: torch.Tensor, b: torch.Tensor
) -> torch.Tensor:
    """Zhang et al. 2018, equation 1, layer by layer in float64, on uint8 images as they are."""
    import torchvision.models

    with torch.device("meta"):
        layers = getattr(torchvision.models, MODELS[net])(weights=None).features
    stored = torch.load(backbone, weights_only=True)
    own = {name: stored[f"features.{name}"] for name in layers.state_dict()}
    layers.load_state_dict(own, assign=True)
    layers.double().eval()
    linear = torch.load(heads, map_location="cpu", weights_only=True)
    x = torch.cat([a, b]).double() / 127.5 - 1
    x = (x - MEAN) / STD
    total = torch.zeros(len(a), dtype=torch.float64)
    with torch.no_grad():
        for number, layer in enumerate(layers):
            x = layer(x)
            if number in TAPS[net]:
                weight = linear[f"lin{TAPS[net].index(number)}.model.1.weight"].double()
                one, other = F.normalize(x.clone(), dim=1).chunk(2)
                total += (weight * (one - other) ** 2).sum(1).mean((1, 2))
    return total


def random_images(num: int, size: int, seed: int = 0) -> torch.Tensor:
    """Smooth random images with some noise, (num, 3, size, size) uint8."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(num, 3, 4, 4, generator=generator)
    smooth = F.interpolate(coarse, (size, size), mode="bilinear") * 220
    noise = torch.rand(num, 3, size, size, generator=generator) * 35
    return (smooth + noise).to(torch.uint8)
