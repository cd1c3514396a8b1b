"""LPIPS: how different two images look, by the networks and linear heads of the lpips library.

Zhang et al. 2018, "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric",
equation 1, version 0.1 of the authors' heads.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from dinogen._torchvision import ensure_torchvision
from dinogen.distributed import process_group
from dinogen.files import weights_sha256
from dinogen.hub import local_path
from dinogen.metrics.extractors.base import ExtractorInfo, NotAvailable, exactly, resized

KEY = "metrics.lpips_backbone"
# The heads were fitted to patches of this side, and the networks have no map left below 32.
SMALLEST = 64
# by lpips' name: torchvision's model, and its weights
BACKBONES = {
    "alex": ("alexnet", "AlexNet_Weights.IMAGENET1K_V1"),
    "vgg": ("vgg16", "VGG16_Weights.IMAGENET1K_V1"),
    "squeeze": ("squeezenet1_1", "SqueezeNet1_1_Weights.IMAGENET1K_V1"),
}


class Perceptual:
    """LPIPS between uint8 images (N, 3, R, R) of any side; smaller than 64 they are enlarged.

    Args:
        network: the library's, with its weights, on the device.
        info: of the network.
        device: where it computes.
    """

    def __init__(self, network: nn.Module, info: ExtractorInfo, device: torch.device) -> None:
        self.network = network.eval().requires_grad_(False)
        self.info = info
        self.device = device

    def embed(self, images: Tensor) -> Tensor:
        """Rows whose squared Euclidean distance is LPIPS, so each image is looked at once.

        Equation 1 is a weighted sum of squares over channels, averaged over places; its weights
        are not negative, so their roots can be multiplied into the features.

        Args:
            images: (N, 3, R, R) uint8 RGB, on any device.

        Returns:
            (N, D) float32 on the device; D grows with R: 32 thousand for ``alex`` at 64, 640
            thousand at 256, and 7.9 million for ``vgg`` at 256.
        """
        with exactly(self.device):
            side = max(SMALLEST, images.shape[-1])
            return self.rows(resized(images, side, "bilinear", self.device) / 127.5 - 1)

    def rows(self, images: Tensor) -> Tensor:
        """As :meth:`embed`, but of (N, 3, R, R) float32 in [-1, 1], with a gradient to them."""
        from lpips import normalize_tensor

        network: Any = self.network
        if images.shape[-1] < SMALLEST:
            size = (SMALLEST, SMALLEST)
            images = F.interpolate(images, size, mode="bilinear", antialias=True)
        rows = []
        for maps, head in zip(
            network.net(network.scaling_layer(images)), network.lins, strict=True
        ):
            scale = head.model[-1].weight.sqrt() / math.sqrt(maps.shape[2] * maps.shape[3])
            rows.append((normalize_tensor(maps) * scale).flatten(1))
        return torch.cat(rows, 1)

    def distance(self, a: Tensor, b: Tensor) -> Tensor:
        """LPIPS of each image of ``a`` and its counterpart in ``b``, (N,) float32 on the CPU."""
        return (self.embed(a) - self.embed(b)).square().sum(1).cpu()


def load_perceptual(net: str, backbone: str | None, device: torch.device) -> Perceptual:
    """Load LPIPS onto a device; all ranks together, so that all have it or none.

    Args:
        net: ``alex``, ``vgg`` or ``squeeze``.
        backbone: path of torchvision's weights of that network (.pth or .safetensors, tensors
            named ``features.0.weight`` and so on, others are ignored); None for the file that
            torchvision keeps in torch's hub cache. Nothing is downloaded: ranks would do it all
            at once, and a node without network would hang. The heads come with the library.
        device: where it will run.

    Raises:
        NotAvailable: the weights are not available, here or on another rank; names the remedy.
    """
    found: Perceptual | None = None
    failed: NotAvailable | None = None
    try:
        found = _load(net, backbone, device)
    except NotAvailable as error:
        failed = error
    if process_group.any_rank(failed is not None):
        raise failed or NotAvailable(
            f"{KEY}: it is missing on another node: give a path that all nodes can read"
        )
    assert found is not None
    return found


def _load(net: str, backbone: str | None, device: torch.device) -> Perceptual:
    ensure_torchvision()
    import lpips

    file = _backbone_file(net, backbone)
    stored = _read(file)
    # Without memory: torchvision would draw 138 million weights of a whole VGG first.
    with torch.device("meta"), warnings.catch_warnings():
        # lpips calls torchvision by an older spelling
        warnings.simplefilter("ignore", UserWarning)
        network = lpips.LPIPS(pretrained=False, net=net, pnet_rand=True, verbose=False)
    heads_file = Path(lpips.__file__).parent / "weights" / "v0.1" / f"{net}.pth"
    heads = torch.load(heads_file, map_location="cpu", weights_only=True)
    weights: dict[str, Tensor] = {}
    wrong = []
    for name, parameter in network.named_parameters(remove_duplicate=False):
        part, _, rest = name.partition(".")
        if part == "net":  # net.slice2.3.weight is features.3.weight
            source = f"features.{rest.partition('.')[2]}"
            tensor = stored.get(source)
            if getattr(tensor, "shape", None) != parameter.shape:
                wrong.append(source)
                continue
        else:  # lins.0 is lin0
            tensor = heads[f"lin{rest}" if part == "lins" else name]
            assert (tensor >= 0).all(), "LPIPS weights are not negative"
        assert isinstance(tensor, Tensor)
        weights[name] = tensor.float()
    if wrong:
        raise NotAvailable(
            f"{KEY}: {file} does not hold torchvision's {BACKBONES[net][0]}: {', '.join(wrong[:3])}"
            f"{', ...' if len(wrong) > 3 else ''} missing or of another shape: give that network's "
            "weights, whole"
        )
    network.load_state_dict(weights, strict=False, assign=True)
    info = ExtractorInfo(
        name=f"lpips_{net}",
        weights_sha256=weights_sha256(weights),
        resize=f"bilinear antialias {SMALLEST} if smaller",
        num_channels=sum(network.chns),
        num_logits=0,
        random=False,
    )
    return Perceptual(network.to(device), info, device)


def _backbone_file(net: str, path: str | None) -> Path:
    from torchvision.models import get_weight

    model, weights = BACKBONES[net]
    if path is None:
        url: str = get_weight(weights).url
        file = Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]
        remedy = f"fetch {url} on a machine with network, and put it there or set {KEY} to its path"
    else:
        file = local_path(path, KEY)
        remedy = f"give the path of torchvision's {model} weights as .pth or .safetensors"
    if not file.is_file():
        raise NotAvailable(f"{KEY}: LPIPS ({net}) needs {file}, which is not there: {remedy}")
    return file


def _read(file: Path) -> Mapping[str, Any]:
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        found: Any = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # the readers raise many kinds; all mean this
        lines = str(error).strip().splitlines() or [repr(error)]
        raise NotAvailable(
            f"{KEY}: {file} cannot be read as weights ({lines[0]}): get the file again, whole"
        ) from error
    if not isinstance(found, Mapping):
        raise NotAvailable(f"{KEY}: {file} holds a {type(found).__name__}: save a state dict there")
    return found
