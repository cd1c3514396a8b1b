"""A run's generator with all it takes to rebuild it: as a plain safetensors file, and back."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn

from dinogen.config import ConfigError, family_places
from dinogen.families.base import Family, Networks, sample_in_parts
from dinogen.files import write_bytes
from dinogen.hub import local_weights
from dinogen.runs.layout import EXPORTED_INFO, EXPORTED_SUFFIX
from dinogen.training.checkpointing.checkpoint import on_host
from dinogen.training.checkpointing.exported import BETWEEN, ExportedFile
from dinogen.training.checkpointing.snapshot import Snapshot, load_snapshot

log = logging.getLogger(__name__)

# For exports without options of their own.
NO_LICENCE = "not stated: ask those who trained it, and see the terms of the data"
INTENDED_USE = "research; not to pass for a person, to identify one, or to deceive"


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        path: the file.
        info: what its metadata holds, see :func:`export`.
        num_parameters: of the generator.
        difference: largest one from the network, for formats that hold a graph in place of the
            tensors themselves; see :func:`dinogen.formats.traced.checked`.
    """

    path: Path
    info: dict[str, Any]
    num_parameters: int
    difference: float | None = None


def export(
    run: Path,
    path: Path,
    resolution: int | None = None,
    nimg: int | None = None,
    licence: str | None = None,
    intended_use: str | None = None,
) -> Exported:
    """Write the moving average of a checkpoint's generator: the tensors of its state dict.

    If sampling takes other networks too, their tensors follow, each name after that of its network
    and a slash.

    The metadata's key ``dinogen`` is JSON: ``random_guide`` first, ``network`` (its class, and the
    arguments to call it with), ``further`` (the same of other networks, by name), ``resolution``,
    ``alpha`` and ``fading`` (how far the stage was faded in), ``nimg``, ``family``, ``guide_label``
    and ``guide``, ``data`` (their fingerprint) and ``loss``, the whole ``config``, the ``versions``
    that trained it, and ``card``: ``data``, ``guide``, ``metrics`` as far as this checkpoint was
    measured, ``licence`` and ``intended_use``. The same checkpoint, with the same measurements,
    gives the same bytes.

    Args:
        run: folder of the run, or a file written by this, whose card is taken over.
        path: the file, ``*.safetensors``; one that is there is replaced.
        resolution: which stage; the largest that has a checkpoint unless given.
        nimg: which checkpoint; the newest unless given.
        licence: of the weights, for the card; ``NO_LICENCE`` unless given.
        intended_use: for the card; ``INTENDED_USE`` unless given.

    Raises:
        ConfigError: no such checkpoint, or ``path`` is no name for such a file.
    """
    check_name(path, EXPORTED_SUFFIX)
    generator = generator_with_card(run, resolution, nimg, licence, intended_use)
    write_safetensors(generator, path)
    warn_if_random(generator, path)
    return Exported(path, generator.info, generator.num_parameters)


def generator_with_card(
    run: Path,
    resolution: int | None = None,
    nimg: int | None = None,
    licence: str | None = None,
    intended_use: str | None = None,
) -> Generator:
    """What :func:`export` writes: a generator whose info has a card.

    Args:
        run: folder of the run, or an exported file, whose card is taken over.
        resolution: as in :func:`export`, as are ``nimg``, ``licence`` and ``intended_use``.
        nimg: see ``resolution``.
        licence: see ``resolution``.
        intended_use: see ``resolution``.

    Raises:
        ConfigError: no such checkpoint.
    """
    run = local_weights(run)
    snapshot = load_snapshot(run, resolution, nimg)
    generator = _generator_of(snapshot)
    defaults = {"licence": NO_LICENCE, "intended_use": INTENDED_USE}
    given = {"licence": licence, "intended_use": intended_use}
    card = generator.info.get("card") or _card(snapshot)
    card = defaults | card | {name: text for name, text in given.items() if text is not None}
    return replace(generator, info=generator.info | {"card": card})


def write_safetensors(generator: Generator, path: Path) -> None:
    """Write the tensors of a generator, with its info in the metadata."""
    tensors = generator.network.state_dict()
    for name, network in generator.further.items():
        tensors |= {f"{name}{BETWEEN}{key}": v for key, v in network.state_dict().items()}
    (tensors,) = on_host({"all": tensors}).values()
    write_bytes(path, save(tensors, {EXPORTED_INFO: json.dumps(generator.info, allow_nan=False)}))


def warn_if_random(generator: Generator, path: Path) -> None:
    """Say loudly that what was written learnt from a random guide."""
    if generator.info["random_guide"]:
        log.warning("RANDOM GUIDE: %s was trained on random features: for tests only", path)


def _card(snapshot: Snapshot) -> dict[str, Any]:
    """What the file says of data, guide and quality, for people."""
    imported = snapshot.checkpoint.state["facts"].get("imported")
    data = snapshot.family.config.data.location
    if imported is not None:  # the config names what a training on would take
        data = f"not known: imported from {imported['file']}"
    found = snapshot.place.evaluation or {}
    ours = found.get("nimg") == snapshot.nimg
    kept = ("value", "spread", "num_samples", "num_reference", "fingerprint", "better", "caution")
    marks = found.get("fingerprints") or {}
    return {
        "data": data,
        "guide": snapshot.checkpoint.state["facts"].get("guide_label", "none"),
        "metrics": {
            name: {key: one.get(key) for key in kept} | _against(marks.get(one.get("fingerprint")))
            for name, one in (found.get("measured") or {}).items()
            if ours and one["value"] is not None
        },
    }


def _against(mark: Mapping[str, Any] | None) -> dict[str, Any]:
    """What people need to know of what a metric value was measured against."""
    mark = mark or {}
    return {"split": mark.get("split"), "random": bool(mark.get("random"))}


def _generator_of(snapshot: Snapshot) -> Generator:
    """The averaged generator of a checkpoint."""
    family, state = snapshot.family, snapshot.checkpoint.state
    name = family.ema_networks[0]
    further = dict(snapshot.ema.networks)
    network = further.pop(name)
    if isinstance(snapshot.checkpoint, ExportedFile):
        return Generator(network, snapshot.checkpoint.info, family, further)
    facts, config = state["facts"], state["config"]
    rebuilt = {n: _rebuilt(family, n, other) for n, other in further.items()}
    places = family_places(config["family"], family.config.family.options)
    info = {
        "random_guide": bool(facts.get("random_guide")),
        "network": {"name": name, **_rebuilt(family, name, network)},
        **({"further": rebuilt} if rebuilt else {}),
        "resolution": snapshot.resolution,
        "alpha": snapshot.alpha,
        "fading": snapshot.fading,
        "nimg": snapshot.nimg,
        "family": family.config.family.name,
        **facts,
        "data": state["data"],
        "loss": state["progress"].get("loss"),
        "config": config | {"family": config["family"] | places},
        "versions": state["versions"],
    }
    return Generator(network, info, family, further)


def _rebuilt(family: Family, name: str, network: nn.Module) -> dict[str, Any]:
    """What it takes to build a network again."""
    return {
        "class": f"{type(network).__module__}.{type(network).__qualname__}",
        "arguments": family.arguments(name),
    }


@dataclass(frozen=True)
class Generator:
    """A generator that was read from a run or from an exported file.

    Attributes:
        network: in eval mode and without gradients, on this process's device.
        info: see :func:`export`.
        family: knows how to draw from it.
        further: other networks that sampling takes, by name.
    """

    network: nn.Module
    info: dict[str, Any]
    family: Family
    further: Networks = field(default_factory=dict)

    @property
    def networks(self) -> dict[str, nn.Module]:
        """All of them by name."""
        return {self.info["network"]["name"]: self.network, **self.further}

    @property
    def num_parameters(self) -> int:
        """Of all networks."""
        return sum(p.numel() for net in self.networks.values() for p in net.parameters())

    @torch.no_grad()
    def sample(self, num: int, seed: int = 0) -> Tensor:
        """Images 0 to ``num - 1`` under a seed, as ``dinogen sample`` makes them.

        Args:
            num: how many.
            seed: of the draws; the image of a number does not depend on how many are asked for.

        Returns:
            (num, 3, R, R) float32 in [-1, 1] on the CPU.
        """
        return sample_in_parts(self.family, self.networks, num, seed, part=1)


def load_exported(path: Path | str) -> tuple[nn.Module, dict[str, Any]]:
    """The network of an exported file and its info, see :func:`load_generator`."""
    found = load_generator(path)
    return found.network, found.info


def load_generator(path: Path | str) -> Generator:
    """Load the generator of a run, of a file that ``dinogen export`` wrote, or from the hub.

    ```python
    dinogen.load_generator("hf://user/name").sample(16, seed=0)
    ```

    Args:
        path: the folder of a run: the moving average in its newest checkpoint, of the largest stage
            that has one; or a file, for which no run is needed; or ``hf://user/name[@revision]``,
            which `dinogen publish` made.

    Raises:
        HubError: it is not available on the hub.
        ConfigError: no such run or file, a run without a checkpoint, a file that ``dinogen export``
            did not write, or one of a version of dinogen with other config keys.
    """
    return _generator_of(load_snapshot(local_weights(path)))


def check_name(path: Path, suffix: str, hint: str = "") -> None:
    """Refuse what cannot be meant as the file's name.

    Args:
        path: the file.
        suffix: that it must end in.
        hint: what else could be done about a wrong suffix.

    Raises:
        ConfigError: naming a path that can be.
    """
    if path.is_dir():
        raise ConfigError(f"{path} is a folder: name a file, such as {path / 'G'}{suffix}")
    if path.suffix != suffix:
        raise ConfigError(f"{path} does not end in {suffix}: name it {path}{suffix}{hint}")
