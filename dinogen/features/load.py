"""The one way to a guide: the config's name is the file of this package that loads it."""

from __future__ import annotations

import importlib

import torch

from dinogen.config import GuideConfig
from dinogen.features.base import Guide


def load_guide(config: GuideConfig, device: torch.device) -> Guide:
    """Load the frozen encoder that ``config.name`` names, onto a device.

    A new encoder is one new file ``dinogen/features/NAME.py`` with a function
    ``load(config, device) -> Guide``, and its name in ``GuideConfig.name``.

    Raises:
        GuideError: its weights cannot be had, or are not what they should be; the message names
            ``guide.path`` and the mend.
    """
    module = importlib.import_module(f"dinogen.features.{config.name}")
    guide: Guide = module.load(config, device)
    return guide
