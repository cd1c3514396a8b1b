"""Weights learnt before: those of another run, and those of the stage before a grown one."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from dinogen.config import ConfigError
from dinogen.distributed import process_group
from dinogen.families.abilities import facts_of
from dinogen.families.base import Family
from dinogen.hub import local_weights, shown
from dinogen.runs.run import Run
from dinogen.training.checkpointing.checkpoint import Checkpoint, NewestCheckpoints
from dinogen.training.checkpointing.exported import by_network, open_exported
from dinogen.training.checkpointing.snapshot import Ema

log = logging.getLogger(__name__)
_NUM_NAMED = 20


def init_from(source: str, family: Family, ema: Ema) -> None:
    """Load what fits by name and shape into a new run's networks and moving averages.

    Of a run, each network of its newest checkpoint (of its largest stage) goes to the network of
    the same name. The first network of an exported file goes to the one that the family exports,
    others to those of the same name. What does not match keeps its initialisation, and is listed
    in the log, and so are frozen networks, such as an autoencoder, that are others than then.

    Args:
        source: a run's folder, a file of ``dinogen export``, or an address of the hub.
        family: of the new run, its networks are changed in place.
        ema: of the new run, changed in place.

    Raises:
        ConfigError: there is no such run or file, or nothing in it fits.
    """
    path = local_weights(source)
    found, facts = _from_file(path, family) if path.is_file() else _from_run(path, family, ema)
    num_loaded = 0
    for name, network in family.networks.items():
        num_loaded += _load(network, found.get(name, {}), f"{name} of {source}")
    for name, network in ema.networks.items():
        _load(network, found.get(f"{name}.ema", {}), None)
    if not num_loaded:
        raise ConfigError(
            f"init_from: nothing in {source} fits the networks of this config "
            f"({', '.join(family.networks)}): use the same family and sizes, or leave it out"
        )
    _compare_frozen(source, facts, facts_of(family))


def _compare_frozen(source: str, then: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Say which frozen networks are others than those that the weights were trained with."""
    before, today = then.get("frozen"), now.get("frozen", {})
    if not isinstance(before, dict) or not process_group.is_main():
        return
    for key in before.keys() & today.keys():
        if before[key] != today[key]:
            log.warning(
                "init_from: %s was trained with another network in %s (SHA-256 %.12s, now %.12s): "
                "its weights, and what they say of that network's outputs, such as the "
                "normalisation of latents, are kept",
                source,
                key,
                before[key],
                today[key],
            )


def _from_file(path: Path, family: Family) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """Tensors by network, and the facts of a file that `dinogen export` wrote."""
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ConfigError(
            f"init_from: {shown(path)} cannot be read as safetensors: {error}: give what `dinogen "
            f"export` wrote; weights of others become a run by `dinogen import` first"
        ) from None
    found = by_network(tensors, family.ema_networks[0])
    try:
        facts = open_exported(path).state["facts"]
    except ConfigError:
        facts = {}
    return found | {f"{name}.ema": own for name, own in found.items()}, facts


def _from_run(
    path: Path, family: Family, ema: Ema
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """Tensors by network of the newest checkpoint, and its facts."""
    run = Run(path)
    if not run.has_config:
        raise ConfigError(
            f"init_from: {path} is neither a run (config.yaml is missing) nor a file: give the "
            "folder of a run, or what `dinogen export` wrote; weights of others, such as a folder "
            "of diffusers, become a run by `dinogen import` first"
        )
    newest = NewestCheckpoints(path)
    checkpoint: Checkpoint | None = None
    for stage in reversed(run.config.stages):
        checkpoint = checkpoint or newest.of(stage.resolution)
    if checkpoint is None:
        raise ConfigError(f"init_from: {path} has no complete checkpoint: train it first")
    names = [*family.networks, *(f"{name}.ema" for name in ema.networks)]
    there = [n for n in names if (checkpoint.folder / f"{n}.safetensors").is_file()]
    return {name: checkpoint.tensors(name) for name in there}, checkpoint.state["facts"]


def _load(network: nn.Module, tensors: dict[str, Tensor], title: str | None) -> int:
    """Load what fits; returns how many tensors did, and logs the others under ``title``."""
    own = network.state_dict()
    fits = {n: t for n, t in tensors.items() if n in own and own[n].shape == t.shape}
    network.load_state_dict(fits, strict=False)
    if title is not None and process_group.is_main():
        log.info("init_from: %d of %d tensors from %s", len(fits), len(own), title)
        missing = [
            f"{name} ({'of another shape' if name in tensors else 'not there'})"
            for name in own
            if name not in fits
        ]
        unused = [f"{name} (not wanted here)" for name in tensors if name not in own]
        for text in (missing + unused)[:_NUM_NAMED]:
            log.warning("init_from: does not match: %s", text)
        if len(missing + unused) > _NUM_NAMED:
            log.warning("init_from: ... and %d more", len(missing + unused) - _NUM_NAMED)
    return len(fits)


def grow(
    network: nn.Module,
    state: dict[str, Tensor],
    new: set[str],
    fail: Callable[[str], Exception],
) -> None:
    """Load the stage before into a grown network; what is new keeps its initialisation.

    Args:
        network: the grown network, changed in place.
        state: state dict of the stage before; what the grown network dropped is ignored.
        new: names of the parameters that it did not have.
        fail: makes the error of a message.
    """
    own = network.state_dict()
    kept = {name: value for name, value in state.items() if name in own}
    missing = set(own) - set(kept) - new
    wrong = [name for name, value in kept.items() if value.shape != own[name].shape]
    if missing or wrong:
        names = ", ".join(sorted(missing | set(wrong))[:4])
        raise fail(f"the network of the stage before does not fit ({names}): same family options?")
    network.load_state_dict(kept, strict=False)
