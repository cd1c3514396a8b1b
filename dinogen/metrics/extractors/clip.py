"""The extractor of prompts: CLIP's embeddings of images and of the prompts they were made for."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from dinogen.config.training import ClipConfig
from dinogen.features.base import GuideError
from dinogen.features.checkpoint import weights_reachable
from dinogen.features.clip import Clip, load_clip
from dinogen.metrics.extractors.base import ExtractorInfo, FeatureExtractor, NotAvailable, exactly


class ClipExtractor:
    """CLIP in float32; its own bicubic filter, antialiased, resizes images.

    Args:
        clip: on the CPU.
        device: where it runs.
    """

    def __init__(self, clip: Clip, device: torch.device) -> None:
        self.clip = clip.to(device)
        self.device = device
        self.info = ExtractorInfo(
            "clip",
            clip.info["weights_sha256"],
            f"bicubic antialias {clip.image_size}",
            clip.embed_dim,
            num_logits=0,
            random=clip.info["random"],
        )

    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        """(N, 3, R, R) uint8 -> ``features`` (N, E) of length 1 on the CPU."""
        with exactly(self.device):
            features = self.clip.images(images.to(self.device).float() / 127.5 - 1)
        return {"features": features.cpu()}

    def texts(self, prompts: list[str]) -> Tensor:
        """(P, E) of length 1 on the CPU."""
        with exactly(self.device):
            return self.clip.captions(prompts).cpu()


def load(path: str | None, device: torch.device) -> FeatureExtractor:
    """Load CLIP by hub name or from a checkpoint folder.

    Args:
        path: as ``clip.path``.
        device: where it will run, in float32 even if a guide would use another type.

    Raises:
        NotAvailable: no path is given, or the weights are not available or damaged.
    """
    if path is None:
        raise NotAvailable(
            "metrics.clip: no path is given: name a checkpoint, best another one than the run was "
            "trained with, such as openai/clip-vit-large-patch14"
        )
    if not Path(path).expanduser().exists() and weights_reachable(path) is None:
        # checked first, because the hub's own client tries for minutes if there is no network
        raise NotAvailable(
            f"metrics.clip: {path}: there is no such folder, and no hub checkpoint of that name is "
            "available: copy one here and name its folder in metrics.clip"
        )
    try:
        clip = load_clip(ClipConfig(path=path), torch.device("cpu"))
    except GuideError as error:
        raise NotAvailable(str(error).replace("clip.path", "metrics.clip")) from error
    return ClipExtractor(clip, device)
