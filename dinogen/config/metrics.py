"""The sections ``metrics:`` and ``clip:``: how images are measured, and with which networks."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from dinogen.config.base import Section


class MetricsConfig(Section):
    """How generated images are measured; docs/metrics.md explains each metric."""

    names: tuple[str, ...] = Field((), description="which metrics: fid, kid, ...; all if empty")
    num_samples: int = Field(5000, ge=2, description="number of generated images")
    num_reference: int = Field(
        5000, ge=2, description="largest number of real images, spread over reference_split"
    )
    reference_split: Literal["train", "val", "test"] = Field(
        "val", description="split of the real images that they are compared with"
    )
    num_bootstrap: int = Field(
        10, ge=0, description="resamplings of the generated images that the spread is taken over"
    )
    inception: str | None = Field(
        None,
        description="file of FID's InceptionV3, in torch-fidelity's format; default: the copy in "
        "torch's hub cache",
    )
    inception768: str | None = Field(
        None,
        description="file of FID's InceptionV3 up to Mixed_6e: torch-fidelity's, or safetensors "
        "with batch norm folded",
    )
    dinov2: str | None = Field(None, description="hub name or checkpoint folder of a DINOv2")
    onet: str | None = Field(
        None, description="file of MTCNN's O-Net; default: the one in facenet-pytorch's wheel"
    )
    clip: str | None = Field(
        None, description="hub name or checkpoint folder of the CLIP that scores prompts"
    )
    prompts: Path | None = Field(
        None, description="text file of prompts for text-conditional runs, one per line"
    )
    guidance: float = Field(
        1.0, ge=0, description="guidance scale of prompts: 1 as trained, more exaggerates"
    )
    lpips: Literal["alex", "vgg", "squeeze"] = Field("alex", description="network of LPIPS")
    lpips_backbone: str | None = Field(
        None, description="file of its weights; default: torchvision's in torch's hub cache"
    )
    cache: Path | None = Field(
        None, description="folder of reference statistics; default: ~/.cache/dinogen/metrics"
    )


class ClipConfig(Section):
    """CLIP; if it is set, ``dinogen prepare`` stores its embeddings of every sample."""

    path: str = Field(description="hub name, or local checkpoint folder")
    revision: str | None = Field(None, description="hub revision (commit, tag or branch)")
