"""The extractor of FID-768: Mixed_6e of the FID InceptionV3, batch norm folded, mean over space.

The 768 features that pytorch-fid offers as ``--dims 768``. A distance of them is FID-768, and is
never called FID.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dinogen.config import GuideConfig
from dinogen.features.base import GuideError
from dinogen.features.inception import NUM_CHANNELS, InceptionTrunk
from dinogen.features.inception import load as load_guide
from dinogen.metrics.extractors.base import (
    ExtractorInfo,
    FeatureExtractor,
    NotAvailable,
    exactly,
    placed,
    resized,
)

SIDE = 299


class Inception768Extractor:
    """Spatial means of the 17x17 map of Mixed_6e.

    Args:
        trunk: the network, float32.
        sha256: hash of its weights.
        device: where it runs.
    """

    def __init__(self, trunk: InceptionTrunk, sha256: str, device: torch.device) -> None:
        self.trunk = placed(trunk, device)
        self.device = device
        self.info = ExtractorInfo(
            "inception768",
            sha256,
            f"bilinear antialias {SIDE}",
            NUM_CHANNELS,
            num_logits=0,
            random=False,
        )

    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        """(N, 3, R, R) uint8 -> ``features`` (N, 768) on the CPU."""
        with exactly(self.device):
            pixels = resized(images, SIDE, "bilinear", self.device)
            features = self.trunk(pixels / 127.5 - 1).mean((2, 3))
        return {"features": features.cpu()}


def load(path: str | None, device: torch.device) -> FeatureExtractor:
    """Load the weights from the file that an Inception guide reads.

    Args:
        path: as ``guide.path`` of an Inception guide.
        device: where it will run, in float32 even if a guide would use another type.

    Raises:
        NotAvailable: no path, no such file, or it holds something else.
    """
    if path is None:
        raise NotAvailable(
            "metrics.inception768: no path is given: name torch-fidelity's "
            "weights-inception-2015-12-05-6726825d.pth (docs/metrics.md, Weights)"
        )
    try:
        guide = load_guide(GuideConfig(name="inception", path=path), torch.device("cpu"))
    except GuideError as error:
        raise NotAvailable(str(error).replace("guide.path", "metrics.inception768")) from error
    return Inception768Extractor(guide.trunk, guide.info.weights_sha256, device)
