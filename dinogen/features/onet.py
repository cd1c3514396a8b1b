"""The O-Net guide: maps of the MTCNN face detector's last network, whose weights are in a wheel.

Zhang et al. 2016, "Joint Face Detection and Alignment Using Multitask Cascaded Convolutional
Networks", with the weights of facenet-pytorch: on every machine, offline. The network was trained
on faces and nothing else, in crops of 48x48 pixels, and costs a CPU little.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinogen._torchvision import ensure_torchvision
from dinogen.config import GuideConfig
from dinogen.features.base import GuideError, GuideInfo, guide_dtype, named_layers
from dinogen.files import weights_sha256

DEFAULT_PATH = None  # facenet-pytorch holds the weights
# In the network's order, with their channels; -1 means the last.
LAYERS = {"conv1": 32, "conv2": 64, "conv3": 64, "pool3": 64, "conv4": 128}
LAST = "conv4"
# Input of 2 g + 20 pixels: the map of conv2 is the first with stride 2, and is g + 7 wide. At g = 4
# these are the fewest pixels of which conv4 leaves a map.
_STRIDE = 2
_MARGIN = 20
_SMALLEST = 4


class ONetGuide(nn.Module):
    """Maps of one or several layers, averaged to the grid; frozen and always in eval mode.

    Computes in the dtype of the network's weights, regardless of autocast, and returns float32.

    Args:
        net: facenet-pytorch's ``ONet``, in float32 or bfloat16.
        info: its identity.
        layers: of :data:`LAYERS`, concatenated along the channels in this order.
    """

    def __init__(self, net: nn.Module, info: GuideInfo, layers: Sequence[str] = (LAST,)) -> None:
        super().__init__()
        self.net = net.eval().requires_grad_(False)
        self.info = info
        self.layers = tuple(layers)
        self.dtype: torch.dtype = next(net.parameters()).dtype
        self.training = False

    def train(self, mode: bool = True) -> ONetGuide:
        """Does nothing: a guide is frozen in eval mode."""
        return self

    def input_size(self, grid: int) -> int:
        """Side in pixels of the image whose features are averaged to grid x grid.

        Maps that are smaller than the grid are repeated.

        Raises:
            ValueError: a grid below 4, whose image would be too small for the last layer.
        """
        if grid < _SMALLEST:
            raise ValueError(f"O-Net needs grids of {_SMALLEST} or more, not {grid}")
        return _STRIDE * grid + _MARGIN

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, S, S) RGB in [-1, 1] with S = ``input_size(g)`` -> (B, C, g, g).

        Raises:
            ValueError: another shape.
        """
        height, width = images.shape[-2:]
        grid = (height - _MARGIN) // _STRIDE
        if height != width or grid < _SMALLEST or height != self.input_size(grid):
            raise ValueError(
                f"O-Net needs square images of {_STRIDE} * grid + {_MARGIN} pixels, "
                f"not {height}x{width}"
            )
        with torch.autocast(images.device.type, enabled=False):
            # MTCNN divides by 128, not 127.5.
            found = maps(self.net, images.to(self.dtype) * (127.5 / 128))
            averaged = [F.adaptive_avg_pool2d(found[layer].float(), grid) for layer in self.layers]
        return torch.cat(averaged, 1)


def maps(net: Any, x: Tensor) -> dict[str, Tensor]:
    """(B, 3, S, S) RGB in about [-1, 1] -> the maps of :data:`LAYERS` by name."""
    found = {}
    for i in (1, 2, 3):
        pool, act, conv = (getattr(net, f"{kind}{i}") for kind in ("pool", "prelu", "conv"))
        found[f"conv{i}"] = act(conv(x))
        x = pool(found[f"conv{i}"])
    found["pool3"] = x
    found["conv4"] = net.prelu4(net.conv4(x))
    return found


def load_network(file: Path | None) -> Any:
    """facenet-pytorch's ``ONet`` on the CPU, float32.

    Args:
        file: its weights; those of the wheel if None.

    Raises:
        Exception: what the reader of the file raises; callers name the key and the remedy.
    """
    ensure_torchvision()
    from facenet_pytorch.models import mtcnn

    file = file or Path(mtcnn.__file__).parents[1] / "data" / "onet.pt"
    net = mtcnn.ONet(pretrained=False)
    net.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
    return net


def load(config: GuideConfig, device: torch.device) -> ONetGuide:
    """The guide; it ignores ``path`` and ``revision`` of the config.

    Args:
        config: ``layer`` is one or several of :data:`LAYERS`, -1 the last.
        device: where it will run; its weights are in :func:`guide_dtype` of it.

    Raises:
        GuideError: there is no such layer, or facenet-pytorch's weights are damaged.
    """
    layers = named_layers(config, list(LAYERS), LAST, "O-Net")
    try:
        net = load_network(None)
    except Exception as error:  # disk and loader raise many types
        raise GuideError(
            f"guide.name: onet: its weights in facenet-pytorch cannot be read "
            f"({' '.join(str(error).split())[:120]}): reinstall facenet-pytorch"
        ) from error
    info = GuideInfo(
        name="onet",
        path="facenet-pytorch",
        revision=None,
        weights_sha256=weights_sha256(net.state_dict()),
        num_channels=sum(LAYERS[layer] for layer in layers),
        layer=-1 if layers == [LAST] else layers[0] if len(layers) == 1 else layers,
        random=False,
    )
    return ONetGuide(net.to(guide_dtype(device)), info, layers).to(device)


def layer_channels(config: GuideConfig) -> tuple[int, ...]:
    """C of each layer of the config.

    Raises:
        GuideError: there is no such layer.
    """
    return tuple(LAYERS[name] for name in named_layers(config, list(LAYERS), LAST, "O-Net"))
