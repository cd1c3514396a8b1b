"""How well images fit the prompts they were made for: CLIP score and retrieval."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from dinogen.errors import ConfigError
from dinogen.metrics.collect import collect
from dinogen.metrics.extractors.base import FeatureExtractor
from dinogen.metrics.extractors.clip import ClipExtractor
from dinogen.metrics.sources import Generated
from dinogen.metrics.value import Better, Facts, MetricValue, fingerprint

SCORE, RETRIEVAL = "clip_score", "clip_retrieval"
BETTER: dict[str, Better] = {SCORE: "higher", RETRIEVAL: "higher"}


@dataclass(frozen=True)
class Prompted:
    """Images made by prompts: image i by prompt i modulo their count.

    Attributes:
        images: made so.
        texts: the prompts.
        guidance: how far they were exaggerated.
    """

    images: Generated
    texts: tuple[str, ...]
    guidance: float


def read_prompts(file: Path) -> tuple[str, ...]:
    """The lines of a text file that are not empty, each once.

    Raises:
        ConfigError: it cannot be read, or holds fewer than two.
    """
    try:
        lines = file.expanduser().read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"metrics.prompts: {file} cannot be read as text: {error}") from None
    found = tuple(dict.fromkeys(line.strip() for line in lines if line.strip()))
    if len(found) < 2:
        raise ConfigError(
            f"metrics.prompts: {file} holds {len(found)} prompts: write two or more, one per line"
        )
    return found


def prompted_values(
    names: list[str], prompted: Prompted, extractor: FeatureExtractor, batch: int
) -> list[tuple[MetricValue, Facts]]:
    """CLIP score and retrieval accuracy; all ranks together, the same on all of them.

    Args:
        names: which of the two.
        prompted: images and prompts.
        extractor: CLIP.
        batch: images made at a time.
    """
    assert isinstance(extractor, ClipExtractor)
    num, texts = prompted.images.num, list(prompted.texts)
    rows = collect(prompted.images, [extractor], {extractor.info.name}, batch).seen[
        extractor.info.name
    ]
    assert rows.features is not None
    own = torch.arange(num) % len(texts)
    embedded = extractor.texts(texts)
    values = {
        SCORE: clip_score(rows.features, embedded[own]),
        RETRIEVAL: retrieval_accuracy(rows.features, embedded, own),
    }
    digest = hashlib.sha256("\n".join(texts).encode()).hexdigest()
    reference = {"data": digest, "split": f"guidance {prompted.guidance:g}", "resize": "none"}
    facts = fingerprint(extractor.info, prompted.images.resolution, num, reference, len(texts))
    return [
        (MetricValue(name, values[name], None, BETTER[name], num, len(texts), None), facts)
        for name in names
    ]


WEIGHT = 2.5


def clip_score(images: Tensor, texts: Tensor) -> float:
    """Mean of 2.5 max(cos, 0) over images and their own texts.

    Hessel et al. 2021, "CLIPScore: A Reference-free Evaluation Metric for Image Captioning",
    equation 1. torchmetrics' metric value of the same name has 100 in place of 2.5, and takes the
    maximum after the mean.

    Args:
        images: (N, E), of any length but zero.
        texts: (N, E), row by row those of ``images``.

    Returns:
        From 0 to 2.5; higher is better. Metric values of two CLIPs do not compare.

    Raises:
        ValueError: no rows, or shapes that differ.
    """
    if images.shape != texts.shape or not len(images):
        raise ValueError(f"images {tuple(images.shape)} against texts {tuple(texts.shape)}")
    cosines = F.cosine_similarity(images.double(), texts.double(), dim=1)
    return float(WEIGHT * cosines.clamp(min=0).mean())


def retrieval_accuracy(images: Tensor, prompts: Tensor, own: Tensor) -> float:
    """Share of images that are nearer to their own prompt than to any other.

    CLIP R-precision of Park et al. 2021, "Benchmark for Compositional Text-to-Image Synthesis",
    with all P prompts as candidates. A tie is a miss, so that a CLIP or a generator for
    which all prompts are the same gets 0.

    Args:
        images: (N, E), of any length but zero.
        prompts: (P, E), P at least 2, all different.
        own: (N,) int64, each image's row of ``prompts``.

    Returns:
        From 0 to 1; 1 / P by chance.

    Raises:
        ValueError: no images, or a single prompt.
    """
    if not len(images) or len(prompts) < 2:
        raise ValueError(f"{len(images)} images and {len(prompts)} prompts: nothing to find")
    cosines = F.normalize(images.double(), dim=1) @ F.normalize(prompts.double(), dim=1).T
    mine = cosines.gather(1, own[:, None].to(cosines.device))
    others = cosines.scatter(1, own[:, None].to(cosines.device), -torch.inf)
    return float((mine[:, 0] > others.amax(1)).double().mean())
