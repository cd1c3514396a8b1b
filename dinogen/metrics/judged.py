"""Judges that a measurement asks for, each loaded once; and why one is not to be had."""

from __future__ import annotations

import torch

from dinogen.config_metrics import MetricsConfig
from dinogen.errors import UserError
from dinogen.metrics.judges.base import Judge, NotAvailable
from dinogen.metrics.judges.load import load_judge
from dinogen.metrics.perceptual import Perceptual, load_perceptual


class Judges:
    """Loads by name, once. Every rank has to ask for the same in the same order.

    Args:
        config: where their weights are.
        device: where they compute.
    """

    def __init__(self, config: MetricsConfig, device: torch.device) -> None:
        self._config, self._device = config, device
        self._known: dict[str, Judge | NotAvailable] = {}
        self._perceptual: Perceptual | NotAvailable | None = None

    def get(self, name: str) -> Judge | NotAvailable:
        """One judge, or why there is none."""
        if name not in self._known:
            try:
                self._known[name] = load_judge(name, self._config, self._device)
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
