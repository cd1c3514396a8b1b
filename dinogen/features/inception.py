"""The Inception guide: maps of FID's InceptionV3 up to Mixed_6e, with batch norm folded.

Szegedy et al., "Rethinking the Inception Architecture for Computer Vision", 2016, with the weights
inception-2015-12-05 that define FID (Heusel et al., 2017). The blocks are torch-fidelity's, whose
average pools do not count padding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from dinogen import hub
from dinogen._torchvision import ensure_torchvision
from dinogen.config import GuideConfig
from dinogen.features.base import GuideError, GuideInfo, guide_dtype, named_layers
from dinogen.files import weights_sha256

DEFAULT_PATH = "weights-inception-2015-12-05-6726825d.pth"
# In the network's order, with their channels; -1 means the last.
LAYERS = {"pool1": 64, "pool2": 192, "mixed_5d": 288, "mixed_6e": 768}
LAST = "mixed_6e"
NUM_CHANNELS = LAYERS[LAST]
_STRIDE = 16
_MARGIN = 27  # pixels lost by the convolutions without padding
_EPSILON = 1e-3  # of each batch norm
_REMEDY = (
    "give torch-fidelity's weights-inception-2015-12-05-6726825d.pth (docs/metrics.md, Weights), "
    "or safetensors of it with batch norm folded into X.conv.weight and X.conv.bias"
)


class InceptionTrunk(nn.Module):
    """InceptionV3 from the pixels to one of its layers; modules are named as in the weights file.

    Each convolution has a bias in place of its batch norm.

    Args:
        last: the last layer that is built, so that early ones cost little.
    """

    def __init__(self, last: str = LAST) -> None:
        super().__init__()
        ensure_torchvision()  # torch-fidelity imports it
        from torch_fidelity import feature_extractor_inceptionv3 as fidelity

        depth = list(LAYERS).index(last)
        block = fidelity.BasicConv2d
        self.Conv2d_1a_3x3 = block(3, 32, kernel_size=3, stride=2)
        self.Conv2d_2a_3x3 = block(32, 32, kernel_size=3)
        self.Conv2d_2b_3x3 = block(32, 64, kernel_size=3, padding=1)
        if depth > 0:
            self.Conv2d_3b_1x1 = block(64, 80, kernel_size=1)
            self.Conv2d_4a_3x3 = block(80, 192, kernel_size=3)
        if depth > 1:
            self.Mixed_5b = fidelity.InceptionA(192, pool_features=32)
            self.Mixed_5c = fidelity.InceptionA(256, pool_features=64)
            self.Mixed_5d = fidelity.InceptionA(288, pool_features=64)
        if depth > 2:
            self.Mixed_6a = fidelity.InceptionB(288)
            self.Mixed_6b = fidelity.InceptionC(768, channels_7x7=128)
            self.Mixed_6c = fidelity.InceptionC(768, channels_7x7=160)
            self.Mixed_6d = fidelity.InceptionC(768, channels_7x7=160)
            self.Mixed_6e = fidelity.InceptionC(768, channels_7x7=192)
        for module in self.modules():
            if isinstance(module, block):
                module.conv.bias = nn.Parameter(torch.zeros(module.conv.out_channels))
                module.bn = nn.Identity()
        self._depth = depth

    def maps(self, x: Tensor) -> dict[str, Tensor]:
        """(B, 3, S, S) RGB in [-1, 1] -> the maps of all its layers by name."""
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        found = {"pool1": F.max_pool2d(x, 3, 2)}
        if self._depth > 0:
            x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(found["pool1"]))
            found["pool2"] = F.max_pool2d(x, 3, 2)
        if self._depth > 1:
            found["mixed_5d"] = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(found["pool2"])))
        if self._depth > 2:
            x = self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(found["mixed_5d"])))
            found["mixed_6e"] = self.Mixed_6e(self.Mixed_6d(x))
        return found

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, S, S) RGB in [-1, 1] -> the map of its last layer."""
        return list(self.maps(x).values())[-1]


class InceptionGuide(nn.Module):
    """Maps of one or several layers; frozen and always in eval mode.

    Computes in the dtype of the trunk's weights, regardless of autocast, and returns float32.

    Args:
        trunk: the network, in float32 or bfloat16.
        info: its identity.
        layers: concatenated along the channels in this order.
    """

    def __init__(
        self, trunk: InceptionTrunk, info: GuideInfo, layers: Sequence[str] = (LAST,)
    ) -> None:
        super().__init__()
        self.trunk = trunk.eval().requires_grad_(False)
        self.info = info
        self.layers = tuple(layers)
        self.dtype: torch.dtype = next(trunk.parameters()).dtype
        self.training = False

    def train(self, mode: bool = True) -> InceptionGuide:
        """Does nothing: a guide is frozen in eval mode."""
        return self

    def input_size(self, grid: int) -> int:
        """Side in pixels of the image whose Mixed_6e map is exactly grid x grid.

        Earlier layers see the same image; their maps are larger, and are averaged to the grid.
        """
        return _STRIDE * grid + _MARGIN

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, S, S) RGB in [-1, 1] with S = ``input_size(g)`` -> (B, C, g, g).

        Raises:
            ValueError: another shape.
        """
        height, width = images.shape[-2:]
        if height != width or height <= _MARGIN or (height - _MARGIN) % _STRIDE:
            raise ValueError(
                f"Inception needs square images of {_STRIDE} * grid + {_MARGIN} pixels, "
                f"not {height}x{width}"
            )
        grid = (height - _MARGIN) // _STRIDE
        with torch.autocast(images.device.type, enabled=False):
            maps = self.trunk.maps(images.to(self.dtype))
            found = [_to_grid(maps[layer].float(), grid) for layer in self.layers]
        return found[0] if len(found) == 1 else torch.cat(found, 1)


def layer_channels(config: GuideConfig) -> tuple[int, ...]:
    """C of each layer of the config.

    Raises:
        GuideError: there is no such layer.
    """
    return tuple(LAYERS[name] for name in named_layers(config, list(LAYERS), LAST, "Inception"))


def load(config: GuideConfig, device: torch.device) -> InceptionGuide:
    """Load the weights from torch-fidelity's file, or from one with batch norm folded.

    Args:
        config: ``path`` is torch-fidelity's ``.pth``; or a safetensors file, or a folder with only
            this file, whose tensors are named ``Mixed_6e.branch1x1.conv.weight``, ``....bias`` and
            so on. ``layer`` is one or several of :data:`LAYERS`, -1 the last; layers after the last
            requested one are ignored.
        device: where it will run; its weights are in :func:`guide_dtype` of it.

    Raises:
        GuideError: no such file, other tensors in it, or there is no such layer.
    """
    layers = named_layers(config, list(LAYERS), LAST, "Inception")
    file, revision = _weights_file(config.path, config.revision)
    trunk = InceptionTrunk(max(layers, key=list(LAYERS).index))
    try:
        stored = _read(file)
        wanted = {name: stored[name] for name in trunk.state_dict() if name in stored}
        trunk.load_state_dict(wanted)
    except Exception as error:  # of pickle, zipfile and safetensors: all mean that it is not it
        raise GuideError(
            f"guide.path: {config.path} does not hold the FID InceptionV3: "
            f"{_first_lines(error)}: {_REMEDY}"
        ) from error
    info = GuideInfo(
        name="inception",
        path=config.path,
        revision=revision,
        weights_sha256=weights_sha256(wanted),
        num_channels=sum(LAYERS[layer] for layer in layers),
        layer=-1 if layers == [LAST] else layers[0] if len(layers) == 1 else layers,
        random=False,
    )
    return InceptionGuide(trunk.to(guide_dtype(device)), info, layers).to(device)


def _weights_file(path: str, revision: str | None) -> tuple[Path, str | None]:
    """The file, and the hub commit (None for one of this machine)."""
    commit = None
    if hub.is_address(path):
        try:
            fetched = hub.fetch(hub.parse_section(path, revision, "guide.path"))
        except hub.HubError as error:
            text = str(error).removeprefix("guide.path: ")
            raise GuideError(f"guide.path: {text}") from error
        file, commit = fetched.path, fetched.commit
    else:
        file = Path(path).expanduser()
    if file.is_dir():
        found = list(file.glob("*.safetensors"))
        if len(found) != 1:
            raise GuideError(
                f"guide.path: {path} is a folder: give the file in it (it holds "
                f"{len(found) or 'no'} .safetensors files)"
            )
        return found[0], commit
    if not file.is_file():
        raise GuideError(f"guide.path: {path} is not a file: {_REMEDY}")
    return file, commit


def _read(file: Path) -> dict[str, Tensor]:
    """The tensors of a file by name, batch norm folded in."""
    if file.suffix == ".safetensors":
        return load_file(file)
    stored = torch.load(file, map_location="cpu", weights_only=True)
    if not isinstance(stored, dict) or not all(isinstance(x, Tensor) for x in stored.values()):
        raise ValueError("it is no state dict")
    return fold_batch_norm(stored)


def fold_batch_norm(stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Convolutions that compute what they and their batch norm, in eval mode, compute together.

    Args:
        stored: ``X.conv.weight`` (O, I, H, W), and of its batch norm ``X.bn.weight``, ``bias``,
            ``running_mean`` and ``running_var`` (O,).

    Returns:
        ``X.conv.weight`` and ``X.conv.bias``, float32, of each X that has all of them.
    """
    folded: dict[str, Tensor] = {}
    for name in stored:
        place, dot, rest = name.rpartition(".conv.weight")
        parts = [f"{place}.bn.{part}" for part in ("weight", "bias", "running_mean", "running_var")]
        if not dot or rest or not all(part in stored for part in parts):
            continue
        weight, bias, mean, variance = (stored[part].double() for part in parts)
        factor = weight / (variance + _EPSILON).sqrt()
        folded[name] = (stored[name].double() * factor[:, None, None, None]).float()
        folded[f"{place}.conv.bias"] = (bias - mean * factor).float()
    return folded


def _to_grid(features: Tensor, grid: int) -> Tensor:
    if features.shape[-1] == grid:
        return features
    return F.adaptive_avg_pool2d(features, grid)


def _first_lines(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
