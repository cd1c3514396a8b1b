"""The Inception guide: maps of FID's InceptionV3 up to Mixed_6e, with batch norm folded.

Szegedy et al., "Rethinking the Inception Architecture for Computer Vision", 2016, with the weights
inception-2015-12-05 that define FID (Heusel et al., 2017). Its average pools do not count padding.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from dinogen.config import GuideConfig
from dinogen.features.base import GuideError, GuideInfo, guide_dtype
from dinogen.files import weights_sha256

# In the network's order, with their channels; -1 means the last.
LAYERS = {"pool1": 64, "pool2": 192, "mixed_5d": 288, "mixed_6e": 768}
LAST = "mixed_6e"
NUM_CHANNELS = LAYERS[LAST]
_STRIDE = 16
_MARGIN = 27  # pixels lost by the convolutions without padding


class ConvReLU(nn.Module):
    """Convolution with bias, then ReLU."""

    def __init__(
        self,
        num_in: int,
        num_out: int,
        kernel: int | tuple[int, int],
        stride: int = 1,
        padding: int | tuple[int, int] = 0,
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(num_in, num_out, kernel, stride, padding)

    def forward(self, x: Tensor) -> Tensor:
        """(B, num_in, H, W) -> (B, num_out, H', W'), not negative."""
        return F.relu(self.conv(x), inplace=True)


class MixedA(nn.Module):
    """Mixed_5b to 5d: 1x1, 5x5, double 3x3 and pooled branches at one resolution."""

    def __init__(self, num_in: int, num_pool: int) -> None:
        super().__init__()
        self.branch1x1 = ConvReLU(num_in, 64, 1)
        self.branch5x5_1 = ConvReLU(num_in, 48, 1)
        self.branch5x5_2 = ConvReLU(48, 64, 5, padding=2)
        self.branch3x3dbl_1 = ConvReLU(num_in, 64, 1)
        self.branch3x3dbl_2 = ConvReLU(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = ConvReLU(96, 96, 3, padding=1)
        self.branch_pool = ConvReLU(num_in, num_pool, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, num_in, H, W) -> (B, 224 + num_pool, H, W)."""
        wide = self.branch5x5_2(self.branch5x5_1(x))
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat((self.branch1x1(x), wide, double, self.branch_pool(_mean3x3(x))), 1)


class MixedB(nn.Module):
    """Mixed_6a: halves the resolution."""

    def __init__(self, num_in: int) -> None:
        super().__init__()
        self.branch3x3 = ConvReLU(num_in, 384, 3, stride=2)
        self.branch3x3dbl_1 = ConvReLU(num_in, 64, 1)
        self.branch3x3dbl_2 = ConvReLU(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = ConvReLU(96, 96, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """(B, num_in, H, W) -> (B, 480 + num_in, (H - 1) // 2, (W - 1) // 2)."""
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat((self.branch3x3(x), double, F.max_pool2d(x, 3, 2)), 1)


class MixedC(nn.Module):
    """Mixed_6b to 6e: 7x7 convolutions factorised into 1x7 and 7x1."""

    def __init__(self, num_middle: int) -> None:
        super().__init__()
        row, column = ((1, 7), (0, 3)), ((7, 1), (3, 0))
        self.branch1x1 = ConvReLU(768, 192, 1)
        self.branch7x7_1 = ConvReLU(768, num_middle, 1)
        self.branch7x7_2 = ConvReLU(num_middle, num_middle, row[0], padding=row[1])
        self.branch7x7_3 = ConvReLU(num_middle, 192, column[0], padding=column[1])
        self.branch7x7dbl_1 = ConvReLU(768, num_middle, 1)
        self.branch7x7dbl_2 = ConvReLU(num_middle, num_middle, column[0], padding=column[1])
        self.branch7x7dbl_3 = ConvReLU(num_middle, num_middle, row[0], padding=row[1])
        self.branch7x7dbl_4 = ConvReLU(num_middle, num_middle, column[0], padding=column[1])
        self.branch7x7dbl_5 = ConvReLU(num_middle, 192, row[0], padding=row[1])
        self.branch_pool = ConvReLU(768, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 768, H, W) -> (B, 768, H, W)."""
        single = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        double = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        double = self.branch7x7dbl_5(self.branch7x7dbl_4(double))
        return torch.cat((self.branch1x1(x), single, double, self.branch_pool(_mean3x3(x))), 1)


class InceptionTrunk(nn.Module):
    """InceptionV3 from the pixels to one of its layers; modules are named as in the weights file.

    Args:
        last: the last layer that is built, so that early ones cost little.
    """

    def __init__(self, last: str = LAST) -> None:
        super().__init__()
        depth = list(LAYERS).index(last)
        self.Conv2d_1a_3x3 = ConvReLU(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = ConvReLU(32, 32, 3)
        self.Conv2d_2b_3x3 = ConvReLU(32, 64, 3, padding=1)
        if depth > 0:
            self.Conv2d_3b_1x1 = ConvReLU(64, 80, 1)
            self.Conv2d_4a_3x3 = ConvReLU(80, 192, 3)
        if depth > 1:
            self.Mixed_5b = MixedA(192, 32)
            self.Mixed_5c = MixedA(256, 64)
            self.Mixed_5d = MixedA(288, 64)
        if depth > 2:
            self.Mixed_6a = MixedB(288)
            self.Mixed_6b = MixedC(128)
            self.Mixed_6c = MixedC(160)
            self.Mixed_6d = MixedC(160)
            self.Mixed_6e = MixedC(192)
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


def load(config: GuideConfig, device: torch.device) -> InceptionGuide:
    """Load the folded weights from one safetensors file.

    Args:
        config: ``path`` is the file, or a folder with only this file; its tensors are named
            ``Mixed_6e.branch1x1.conv.weight``, ``....bias`` and so on. ``layer`` is one or several
            of :data:`LAYERS`, -1 the last; layers after the last requested one are ignored.
        device: where it will run; its weights are in :func:`guide_dtype` of it.

    Raises:
        GuideError: no such file, other tensors in it, or there is no such layer.
    """
    requested = config.layer if isinstance(config.layer, tuple) else (config.layer,)
    layers = [LAST if layer == -1 else str(layer) for layer in requested]
    if wrong := [layer for layer in layers if layer not in LAYERS]:
        raise GuideError(
            f"guide.layer: {wrong[0]}: the Inception guide has the layers {', '.join(LAYERS)}; "
            "-1 is the last"
        )
    file = _weights_file(config.path)
    trunk = InceptionTrunk(max(layers, key=list(LAYERS).index))
    try:
        stored = load_file(file)
        wanted = {name: stored[name] for name in trunk.state_dict() if name in stored}
        trunk.load_state_dict(wanted)
    except (SafetensorError, RuntimeError) as error:
        raise GuideError(
            f"guide.path: {config.path} does not hold the folded FID InceptionV3: "
            f"{_first_lines(error)}"
        ) from error
    info = GuideInfo(
        name="inception",
        path=config.path,
        revision=None,
        weights_sha256=weights_sha256(wanted),
        num_channels=sum(LAYERS[layer] for layer in layers),
        layer=-1 if layers == [LAST] else layers[0] if len(layers) == 1 else layers,
        random=False,
    )
    return InceptionGuide(trunk.to(guide_dtype(device)), info, layers).to(device)


def _weights_file(path: str) -> Path:
    file = Path(path).expanduser()
    if file.is_dir():
        found = list(file.glob("*.safetensors"))
        if len(found) != 1:
            raise GuideError(
                f"guide.path: {path} is a folder: give the file in it (it holds "
                f"{len(found) or 'no'} .safetensors files)"
            )
        return found[0]
    if not file.is_file():
        raise GuideError(
            f"guide.path: {path} is not a file: give the safetensors file of the FID "
            "InceptionV3 with batch norm folded into X.conv.weight and X.conv.bias"
        )
    return file


def _to_grid(features: Tensor, grid: int) -> Tensor:
    if features.shape[-1] == grid:
        return features
    return F.adaptive_avg_pool2d(features, grid)


def _mean3x3(x: Tensor) -> Tensor:
    return F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)


def _first_lines(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
