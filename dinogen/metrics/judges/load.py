"""The one way to a judge: its name is the file of this package that loads it."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

import torch

from dinogen import dist
from dinogen.metrics.judges.base import Judge, NotAvailable

if TYPE_CHECKING:
    from dinogen.config_metrics import MetricsConfig


def load_judge(name: str, config: MetricsConfig, device: torch.device) -> Judge:
    """Load a judge onto a device; all ranks together, so that all have it or none.

    A new judge is one new file ``dinogen/metrics/judges/NAME.py`` with a function
    ``load(path, device) -> Judge``, and, if it has weights, their path as
    ``NAME`` in ``MetricsConfig``.

    Raises:
        NotAvailable: its weights cannot be had, here or on another rank; the message names
            ``metrics.NAME`` and the mend.
    """
    module = importlib.import_module(f"dinogen.metrics.judges.{name}")
    judge: Judge | None = None
    failed: NotAvailable | None = None
    try:
        judge = module.load(getattr(config, name, None), device)
    except NotAvailable as error:
        failed = error
    if dist.any_rank(failed is not None):
        raise failed or NotAvailable(
            f"metrics.{name}: another node cannot have it: give a path that all nodes can read"
        )
    assert judge is not None
    return judge
