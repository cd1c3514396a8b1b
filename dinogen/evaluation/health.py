"""Whether a stage's samples still differ: measured for every family that has no probe of its own.

The features are those of O-Net (:mod:`dinogen.metrics.extractors.onet`), whose weights are on every
machine. Only distances between images are compared, so the images need not show faces.
"""

from __future__ import annotations

import logging
import math

import numpy as np
import torch
from torch import Tensor

from dinogen.config import MetricsConfig
from dinogen.errors import UserError
from dinogen.families.abilities import HasCritic, Reconstructs
from dinogen.families.base import Family, Health
from dinogen.metrics.extractors import onet
from dinogen.metrics.extractors.base import FeatureExtractor
from dinogen.report.images import to_uint8
from shards.read.dataset import Dataset

log = logging.getLogger(__name__)


class SampleDiversity:
    """Mean distance between samples over that between real images, in O-Net's features.

    The network and the real images are read at the first measurement.

    Args:
        family: whose samples are measured; it says what can be done about a collapse.
        data: the training data.
        split: of the real images.
        config: where O-Net's weights are.
    """

    def __init__(self, family: Family, data: Dataset, split: str, config: MetricsConfig) -> None:
        self._family, self._data, self._split, self._config = family, data, split, config
        self._extractor: FeatureExtractor | None = None
        self._real: float | None = None

    def health(self, images: Tensor, loss: float | None) -> Health:
        """Compare samples with as many real images.

        Args:
            images: (N, 3, R, R) float32 in [-1, 1], N at least 2.
            loss: mean main loss since the last log line, None before the first.

        Returns:
            Its scalars hold ``diversity``, 1 where samples differ as much as real images do. The
            status is ``unknown`` where it cannot be measured.
        """
        if not torch.isfinite(images).all() or (loss is not None and not math.isfinite(loss)):
            return Health.of_diversity(math.nan, "")
        try:
            real = self._distance_of_real(len(images))
        except (UserError, ImportError) as error:
            return Health({}, "unknown", (f"HEALTH NOT MEASURED: {error}",))
        if not real:
            return Health({}, "unknown", ("HEALTH NOT MEASURED: all real images are the same",))
        return Health.of_diversity(self._distance(images) / real, remedy_for(self._family))

    def _distance_of_real(self, num: int) -> float:
        """Mean distance between real images that are spread over the split; read once."""
        if self._real is None:
            self._extractor = onet.load(self._config.onet, self._family.device)
            total = self._data.num_samples(self._split)
            chosen = np.linspace(0, total - 1, min(total, max(num, 64))).astype(int)
            size = self._family.stage.resolution
            batch = self._data.read(
                chosen.tolist(), split=self._split, image_size=size, on_error="skip"
            )
            self._real = self._distance(batch["image"])
        return self._real

    def _distance(self, images: Tensor) -> float:
        """Mean Euclidean distance over all pairs of images; 0 for a single image."""
        assert self._extractor is not None
        pixels = torch.from_numpy(to_uint8(images.cpu().numpy())).permute(0, 3, 1, 2)
        features = self._extractor(pixels)["features"].double()
        return float(torch.pdist(features).mean()) if len(features) > 1 else 0.0


def remedy_for(family: Family) -> str:
    """What can be done about samples of a family that hardly differ."""
    if isinstance(family, HasCritic):
        return (
            "start again with a lower lr or another optim.lr_scale of D, augment.flip or more "
            "images; family stylegan2_ada needs the fewest"
        )
    if isinstance(family, Reconstructs):
        return "start again with a lower family.beta, with which z says more about the image"
    return "start again with a lower lr, or train longer"
