"""Optimizers, and their state by parameter name."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from dinogen.config import OptimConfig
from dinogen.families.base import Family


def build_optimizer(
    groups: Iterable[nn.Parameter] | list[dict[str, Any]],
    config: OptimConfig,
    lr: float,
    family: Family,
    network: str,
) -> torch.optim.Optimizer:
    """Adam over parameters or groups of them; what is frozen has no gradient and is skipped.

    Args:
        groups: of one network.
        config: for all networks, with factors for some.
        lr: of the stage.
        family: may scale lr and betas further, see ``Family.optimizer_scale``.
        network: its name.
    """
    scale = family.optimizer_scale(network)
    first, second = config.betas
    kind = torch.optim.AdamW if config.name == "adamw" else torch.optim.Adam
    return kind(
        groups,
        lr=lr * scale * config.lr_scale.get(network, 1.0),
        betas=(first**scale, second**scale),
        eps=config.eps,
        weight_decay=config.weight_decay,
    )


def optimizer_state(network: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """State tensors as ``PARAMETER/KEY`` (``dense.weight/exp_avg``)."""
    return {
        f"{name}/{key}": value
        for name, parameter in network.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def load_optimizer_state(
    network: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Tensor]
) -> None:
    """Put back what :func:`optimizer_state` gave.

    Raises:
        KeyError: a state tensor belongs to no parameter of the network.
    """
    parameters = dict(network.named_parameters())
    for full_name, value in state.items():
        name, _, key = full_name.rpartition("/")
        parameter = parameters[name]
        # Adam keeps its step count on the CPU, the moments beside the parameter
        where = value.device if key == "step" else parameter.device
        optimizer.state[parameter][key] = value.to(where)
