"""The extractor of faces: the last network of the MTCNN face detector, with weights in its wheel.

Zhang et al. 2016, "Joint Face Detection and Alignment Using Multitask Cascaded Convolutional
Networks" (O-Net, figure 2). It is on every machine, and it looks for nothing but faces: of other
images its metric values say little. The guide ``onet`` is the same network.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dinogen.features.onet import LAST, load_network, maps
from dinogen.files import weights_sha256
from dinogen.hub import local_path
from dinogen.metrics.extractors.base import (
    ExtractorInfo,
    FeatureExtractor,
    NotAvailable,
    exactly,
    resized,
)

SIDE = 48
NUM_CHANNELS = 256
FACE = 1  # of its two classes


class ONetExtractor:
    """The 256 features before its last layers, and the logits of no face and a face.

    Args:
        net: facenet-pytorch's ``ONet``, float32.
        sha256: hash of its weights.
        device: where it runs.
    """

    def __init__(self, net: Any, sha256: str, device: torch.device) -> None:
        self.net = net.eval().requires_grad_(False).to(device)
        self.device = device
        self.info = ExtractorInfo(
            "onet", sha256, f"bilinear antialias {SIDE}", NUM_CHANNELS, num_logits=2, random=False
        )

    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        """(N, 3, R, R) uint8 -> ``features`` (N, 256) and ``logits`` (N, 2) on the CPU."""
        net = self.net
        with exactly(self.device):
            x = (resized(images, SIDE, "bilinear", self.device) - 127.5) / 128
            x = maps(net, x)[LAST]
            # Its weights come from another framework, which counts columns first.
            features = net.prelu5(net.dense5(x.permute(0, 3, 2, 1).flatten(1)))
            logits = net.dense6_1(features)
        return {"features": features.cpu(), "logits": logits.cpu()}


def load(path: str | None, device: torch.device) -> FeatureExtractor:
    """Load the network.

    Args:
        path: file of its weights as facenet-pytorch has them; that of the wheel if None.
        device: where it will run.

    Raises:
        NotAvailable: no such file, or it holds something else.
    """
    file = None if path is None else local_path(path, "metrics.onet")
    try:
        net = load_network(file)
    except Exception as error:
        raise NotAvailable(
            f"metrics.onet: {file or 'facenet-pytorch'} does not hold the weights of MTCNN's O-Net "
            f"({' '.join(str(error).split())[:120]}): leave it out for those of facenet-pytorch"
        ) from error
    return ONetExtractor(net, weights_sha256(net.state_dict()), device)
