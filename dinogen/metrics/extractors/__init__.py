"""Feature extractors: the frozen networks by whose features images are measured, one file each.

Each is loaded by its name, once; or there is a reason why it is not available.
"""

from __future__ import annotations

import importlib

import torch

from dinogen.config.training import MetricsConfig
from dinogen.distributed import process_group
from dinogen.errors import UserError
from dinogen.metrics.extractors.base import ExtractorInfo, FeatureExtractor, NotAvailable
from dinogen.metrics.extractors.lpips import Perceptual, load_perceptual

__all__ = ["ExtractorInfo", "Extractors", "FeatureExtractor", "NotAvailable", "load_extractor"]


def load_extractor(name: str, config: MetricsConfig, device: torch.device) -> FeatureExtractor:
    """Load a feature extractor onto a device; all ranks together, so that all have it or none.

    A new feature extractor is one new file ``dinogen/metrics/extractors/NAME.py`` with a function
    ``load(path, device) -> FeatureExtractor``, and, if it has weights, their path as
    ``NAME`` in ``MetricsConfig``.

    Raises:
        NotAvailable: its weights are missing, here or on another rank; the message names
            ``metrics.NAME`` and how to get them.
    """
    module = importlib.import_module(f"dinogen.metrics.extractors.{name}")
    extractor: FeatureExtractor | None = None
    failed: NotAvailable | None = None
    try:
        extractor = module.load(getattr(config, name, None), device)
    except NotAvailable as error:
        failed = error
    if process_group.any_rank(failed is not None):
        raise failed or NotAvailable(
            f"metrics.{name}: it is missing on another node: give a path that all nodes can read"
        )
    assert extractor is not None
    return extractor


class Extractors:
    """Loads by name, once. Every rank has to ask for the same in the same order.

    Args:
        config: where their weights are.
        device: where they compute.
    """

    def __init__(self, config: MetricsConfig, device: torch.device) -> None:
        self._config, self._device = config, device
        self._known: dict[str, FeatureExtractor | NotAvailable] = {}
        self._perceptual: Perceptual | NotAvailable | None = None

    def get(self, name: str) -> FeatureExtractor | NotAvailable:
        """One feature extractor, or why there is none."""
        if name not in self._known:
            try:
                self._known[name] = load_extractor(name, self._config, self._device)
            except NotAvailable as error:
                self._known[name] = error
            except UserError as error:
                # a file of weights that is damaged is no reason to lose what others measure
                self._known[name] = NotAvailable(str(error))
        return self._known[name]

    def perceptual(self) -> Perceptual | NotAvailable:
        """LPIPS, or why there is none."""
        if self._perceptual is None:
            config = self._config
            try:
                self._perceptual = load_perceptual(
                    config.lpips, config.lpips_backbone, self._device
                )
            except NotAvailable as error:
                self._perceptual = error
            except UserError as error:
                self._perceptual = NotAvailable(str(error))
        return self._perceptual
