"""The extractor of FID, KID and IS: InceptionV3 inception-2015-12-05 in torch-fidelity.

Szegedy et al., "Rethinking the Inception Architecture for Computer Vision", 2016, in the weights
with which FID is defined (Heusel et al., 2017).
"""

from __future__ import annotations

import io
import logging
import threading
import urllib.request
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dinogen._torchvision import ensure_torchvision
from dinogen.files import weights_sha256
from dinogen.hub import local_path
from dinogen.metrics.extractors.base import (
    ExtractorInfo,
    FeatureExtractor,
    NotAvailable,
    exactly,
    placed,
    resized,
)

SIDE = 299
NUM_CHANNELS = 2048
NUM_LOGITS = 1008
_WANTED = ["2048", "logits_unbiased"]
_PROBE_SECONDS = 4.0

_logger = logging.getLogger(__name__)


class InceptionExtractor:
    """The 2048 pooled features, and the logits without bias of which Inception Score is made.

    Args:
        network: torch-fidelity's extractor of ``2048`` and ``logits_unbiased``.
        sha256: hash of its weights.
        device: where it runs.
    """

    def __init__(self, network: Any, sha256: str, device: torch.device) -> None:
        self.network = placed(network, device)
        self.device = device
        # torch-fidelity takes uint8 alone, so what is resized is rounded again
        self.info = ExtractorInfo(
            "inception",
            sha256,
            f"bilinear antialias {SIDE} uint8",
            NUM_CHANNELS,
            NUM_LOGITS,
            random=False,
        )

    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        """(N, 3, R, R) uint8 -> ``features`` (N, 2048) and ``logits`` (N, 1008) on the CPU."""
        with exactly(self.device):
            pixels = resized(images, SIDE, "bilinear", self.device).round().to(torch.uint8)
            features, logits = self.network(pixels)
        return {"features": features.float().cpu(), "logits": logits.float().cpu()}


def load(path: str | None, device: torch.device) -> FeatureExtractor:
    """Load torch-fidelity's weights.

    Args:
        path: its file; unless given, the one in torch's hub cache, which is filled over the
            network where there is one.
        device: where it will run.

    Raises:
        NotAvailable: no such file, or it holds something else.
    """
    ensure_torchvision()
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    file = _cached_weights() if path is None else local_path(path, "metrics.inception")
    if not file.is_file():
        raise NotAvailable(f"metrics.inception: {path} is no file: {_remedy()}")
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
        # The library unpickles any file it is given, so it gets one that was written here.
        safe = io.BytesIO()
        torch.save(state, safe)
        safe.seek(0)
        network = FeatureExtractorInceptionV3(
            "inception", _WANTED, feature_extractor_weights_path=safe
        )
    except Exception as error:  # of pickle, zipfile and torch: all mean that the file is not it
        reason = " ".join(str(error).split())[:200]
        raise NotAvailable(
            f"metrics.inception: {file} does not hold torch-fidelity's InceptionV3 ({reason}): "
            f"{_remedy()}"
        ) from error
    return InceptionExtractor(network, weights_sha256(state), device)


def _remedy() -> str:
    return f"get {_url()} and name the file in metrics.inception"


def _url() -> str:
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3

    return str(URL_INCEPTION_V3)


def _cached_weights() -> Path:
    """Its file in torch's hub cache; downloaded first, with a warning, if it is not there.

    Raises:
        NotAvailable: it is not there and cannot be downloaded.
    """
    name = _url().rpartition("/")[2]
    file = Path(torch.hub.get_dir()) / "checkpoints" / name
    if file.is_file():
        return file
    missing = f"metrics.inception: {file} is not there and cannot be downloaded"
    if not _answers(_url()):
        raise NotAvailable(f"{missing}: {_remedy()}")
    _logger.warning("downloading the InceptionV3 of FID to %s", file)
    file.parent.mkdir(parents=True, exist_ok=True)
    try:
        digits = name.rpartition("-")[2].partition(".")[0]  # the hash begins so
        torch.hub.download_url_to_file(_url(), str(file), hash_prefix=digits, progress=False)
    except (OSError, RuntimeError) as error:
        raise NotAvailable(f"{missing} ({error}): {_remedy()}") from error
    return file


@cache
def _answers(url: str) -> bool:
    """One HEAD request per process; in a thread, because resolving a name can hang for long."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:  # then nothing may be downloaded
        return False
    found = []

    def ask() -> None:
        request = urllib.request.Request(url, method="HEAD")
        try:
            with urllib.request.urlopen(request, timeout=_PROBE_SECONDS) as answer:
                found.append(answer.status == 200)
        except OSError:
            pass

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(_PROBE_SECONDS)
    return any(found)
