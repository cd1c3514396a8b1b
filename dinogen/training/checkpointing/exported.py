"""Reads a file of ``dinogen export`` as the checkpoint of a run that it stands for."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from dinogen.config import Config, ConfigError
from dinogen.hub import cached_name, shown
from dinogen.runs.layout import EXPORTED_INFO, EXPORTED_SUFFIX
from dinogen.training.checkpointing.checkpoint import Checkpoint, past_config
from shards.files import sha256_file

# Between the name of a network but the first and those of its tensors.
BETWEEN = "/"
# Keys of the info that are not facts of the family.
_OWN = {
    *("network", "further", "resolution", "alpha", "fading", "nimg", "family", "data", "loss"),
    *("config", "versions", "card"),
}
# Facts that a file is read by, and what they are; bool is a kind of int.
_NEEDED: dict[str, type | tuple[type, ...]] = {
    "resolution": int,
    "nimg": int,
    "alpha": (int, float),
    "fading": int,
    "config": dict,
    "versions": dict,
}


@dataclass(frozen=True)
class ExportedFile(Checkpoint):
    """An exported file in place of a checkpoint's folder; it holds moving averages alone.

    Attributes:
        info: what the file's metadata hold.
    """

    info: dict[str, Any]

    @property
    def network(self) -> str:
        """Name of the network that makes images."""
        name: str = self.info["network"]["name"]
        return name

    @property
    def networks(self) -> tuple[str, ...]:
        """Names of all networks that it holds, the one that makes images first."""
        return (self.network, *self.info.get("further", {}))

    def tensors(self, name: str) -> dict[str, Tensor]:
        """Those of a moving average, such as ``G.ema``.

        Raises:
            ConfigError: it holds none of it.
        """
        if not self.holds(name):
            own = " and ".join(f"{one}.ema" for one in self.networks)
            raise ConfigError(f"{self.folder}: an exported file holds {own} alone")
        found = by_network(load_file(self.folder), self.network)
        network = name.removesuffix(".ema")
        if network not in found:
            raise ConfigError(
                f"{shown(self.folder)}: its metadata name the network {network}, of which it holds "
                "no tensors: export the run again"
            )
        return found[network]

    def holds(self, name: str) -> bool:
        """Whether ``name`` is a moving average that was exported."""
        return name in {f"{one}.ema" for one in self.networks}


def by_network(tensors: Mapping[str, Tensor], first: str) -> dict[str, dict[str, Tensor]]:
    """The tensors of an exported file by network and name.

    Those of the first network have their own names in the file; before those of others stands the
    name of their network and ``BETWEEN``.
    """
    found: dict[str, dict[str, Tensor]] = {first: {}}
    for key, tensor in tensors.items():
        network, _, name = key.rpartition(BETWEEN)
        found.setdefault(network or first, {})[name] = tensor
    return found


def results_folder(file: Path) -> Path:
    """Where samples and results of an exported file go: ``first-exported`` beside it.

    Those of a file of the hub go into the current folder, ``user--name-0123456``.
    """
    if (name := cached_name(file)) is not None:
        return Path(name)
    return file.with_name(f"{file.stem}-exported")


def open_exported(file: Path) -> ExportedFile:
    """Read the metadata of an exported file; files of every version have what is needed.

    Raises:
        ConfigError: no such file, or ``dinogen export`` did not write it.
    """
    try:
        with safe_open(file, "pt") as opened:
            metadata = opened.metadata() or {}
        info: dict[str, Any] = json.loads(metadata[EXPORTED_INFO])
        names = (info["network"]["name"], *info.get("further", {}), info["versions"]["dinogen"])
        if not all(isinstance(name, str) for name in names):
            raise TypeError("a name is not text")
        if not all(isinstance(info[key], kinds) for key, kinds in _NEEDED.items()):
            raise TypeError("a fact is not of its kind")
        state = {
            "config": info["config"],
            "versions": info["versions"],
            "facts": {name: value for name, value in info.items() if name not in _OWN},
            "progress": {"nimg": info["nimg"], "loss": info.get("loss")},
            "data": info.get("data"),
            "files": {f"{info['network']['name']}.ema{EXPORTED_SUFFIX}": sha256_file(file)},
        }
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"{shown(file)}: cannot be read as safetensors: {error}") from None
    except (KeyError, ValueError, TypeError):
        raise ConfigError(
            f"{shown(file)}: no generator of dinogen (its metadata lack {EXPORTED_INFO!r}, or "
            "this is damaged): give a file that `dinogen export` wrote"
        ) from None
    return ExportedFile(file, state, info)


def exported_config(checkpoint: ExportedFile, places: Sequence[str] = ()) -> Config:
    """The config of an exported file, whose ``run`` is :func:`results_folder`.

    Args:
        checkpoint: the file.
        places: ``KEY=VALUE`` changes of where data and guides lie now.

    Raises:
        ConfigError: it is of a version of dinogen with other config keys.
    """
    version = checkpoint.state["versions"]["dinogen"]
    config = past_config(checkpoint.state["config"], checkpoint.folder, version, places)
    return config.model_copy(update={"run": results_folder(checkpoint.folder), "device": "auto"})
