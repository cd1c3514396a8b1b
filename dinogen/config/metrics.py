"""The sections ``metrics:`` and ``clip:``: what images are measured by, and with which networks."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from dinogen.config.base import Section


class MetricsConfig(Section):
    """How generated pictures are measured; docs/metrics.md says what each figure is."""

    names: tuple[str, ...] = Field((), description="which metrics: fid, kid, ...; all if empty")
    num_samples: int = Field(5000, ge=2, description="pictures that are generated")
    num_reference: int = Field(
        5000, ge=2, description="at most as many real ones, spread over reference_split"
    )
    reference_split: Literal["train", "val", "test"] = Field(
        "val", description="split of the real pictures that are compared with"
    )
    num_bootstrap: int = Field(
        10, ge=0, description="draws of the generated pictures that a spread is taken over"
    )
    inception: str | None = Field(
        None,
        description="file of FID's InceptionV3, as torch-fidelity has it; its copy in torch's hub "
        "cache unless given",
    )
    inception768: str | None = Field(
        None, description="safetensors file of FID's InceptionV3 with batch norm folded"
    )
    dinov2: str | None = Field(None, description="hub name or checkpoint folder of a DINOv2")
    onet: str | None = Field(
        None, description="file of MTCNN's O-Net; that of facenet-pytorch's wheel unless given"
    )
    clip: str | None = Field(
        None,
        description="hub name or checkpoint folder of the CLIP that feature extractors prompts",
    )
    prompts: Path | None = Field(
        None, description="text file: what a run that knows text is asked for, one per line"
    )
    guidance: float = Field(1.0, ge=0, description="of prompts: 1 as trained, more exaggerates")
    lpips: Literal["alex", "vgg", "squeeze"] = Field("alex", description="network of LPIPS")
    lpips_backbone: str | None = Field(
        None, description="file of its weights; torchvision's in torch's hub cache unless given"
    )
    cache: Path | None = Field(
        None, description="folder of reference statistics; ~/.cache/dinogen/metrics unless given"
    )


class ClipConfig(Section):
    """CLIP; where it is named, ``dinogen prepare`` stores its embeddings of every sample."""

    path: str = Field(description="hub name, or local checkpoint folder")
    revision: str | None = Field(None, description="hub revision (commit, tag or branch)")
