"""The feature extractor of FD-DINOv2: the CLS token of a DINOv2 behind its last layer norm.

Stein et al., "Exposing Flaws of Generative Model Evaluation Metrics and Their Unfair Treatment of
Diffusion Models", 2023; there with DINOv2 ViT-L/14.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from dinogen.config import GuideConfig
from dinogen.features.base import GuideError
from dinogen.features.checkpoint import weights_reachable
from dinogen.features.dinov2 import Dinov2Guide
from dinogen.features.dinov2 import load as load_guide
from dinogen.metrics.extractors.base import (
    ExtractorInfo,
    FeatureExtractor,
    NotAvailable,
    exactly,
    resized,
)

SIDE = 224


class Dinov2Extractor:
    """The CLS token of images of 224 pixels.

    Args:
        guide: whose network it is, in float32.
        device: where it runs.
    """

    def __init__(self, guide: Dinov2Guide, device: torch.device) -> None:
        self.guide = guide.to(device)
        self.device = device
        self.info = ExtractorInfo(
            "dinov2",
            guide.info.weights_sha256,
            f"bicubic antialias {SIDE}",
            guide.info.num_channels,
            num_logits=0,
            random=guide.info.random,
        )

    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        """(N, 3, R, R) uint8 -> ``features`` (N, C) on the CPU."""
        guide = self.guide
        with exactly(self.device):
            pixels = resized(images, SIDE, "bicubic", self.device) / 127.5 - 1
            hidden: Tensor = guide.model(
                pixel_values=pixels * guide.scale + guide.shift
            ).last_hidden_state
        return {"features": hidden[:, 0].cpu()}


def load(path: str | None, device: torch.device) -> FeatureExtractor:
    """Load DINOv2 by hub name or from a checkpoint folder.

    Args:
        path: as ``guide.path`` of a DINOv2 guide.
        device: where it will run, in float32 even if a guide would use another type.

    Raises:
        NotAvailable: no path is given, or the weights are not available or damaged.
    """
    if path is None:
        raise NotAvailable(
            "metrics.dinov2: no path is given: name a checkpoint, such as facebook/dinov2-large"
        )
    if not Path(path).expanduser().exists() and weights_reachable(path) is None:
        # checked first, because the hub's own client tries for minutes if there is no network
        raise NotAvailable(
            f"metrics.dinov2: {path}: there is no such folder, and no hub checkpoint of that name "
            "is available: on a machine with network access run `hf download "
            "facebook/dinov2-large --local-dir dinov2`, copy that folder here and name it "
            "in metrics.dinov2"
        )
    try:
        guide = load_guide(GuideConfig(name="dinov2", path=path), torch.device("cpu"))
    except GuideError as error:
        message = str(error).replace("guide.path", "metrics.dinov2")
        raise NotAvailable(message) from error
    return Dinov2Extractor(guide, device)
