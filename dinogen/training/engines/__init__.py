"""Engines: backward, gradient averaging and the optimizer step, one file each."""

from __future__ import annotations

import torch

from dinogen.config import Config, ConfigError
from dinogen.distributed import process_group
from dinogen.families.base import Family
from dinogen.training.engines.base import SingleEngine
from dinogen.training.engines.ddp import DdpEngine

__all__ = ["make_engine"]


def make_engine(config: Config, family: Family, lr: float, device: torch.device) -> SingleEngine:
    """The engine that ``engine.name`` names.

    Raises:
        ConfigError: ``single`` under several ranks, or DeepSpeed is not installed.
    """
    name = config.engine.name
    if name == "deepspeed":
        # It takes seconds to import, and not everyone has it.
        from dinogen.training.engines.deepspeed import DeepSpeedEngine

        return DeepSpeedEngine(config, family, lr, device)
    if name in ("auto", "ddp"):
        # of one rank there is nothing to average, and no process group
        name = "ddp" if process_group.world_size() > 1 else "single"
    if name == "single" and process_group.world_size() > 1:
        raise ConfigError(
            f"engine.name: single cannot run on {process_group.world_size()} ranks: "
            "use auto, ddp or deepspeed"
        )
    engine = DdpEngine if name == "ddp" else SingleEngine
    return engine(config, family, lr, device)
