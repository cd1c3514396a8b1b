"""Weights from elsewhere written as the folder of a run, which every command takes like any other.

A reader of a format gives :class:`Weights`; :func:`write_run` checks them against the networks that
their config builds, and writes config and checkpoint.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dinogen.config import Config, dump_config, parse_config
from dinogen.distributed import rng
from dinogen.errors import UserError
from dinogen.families.registry import family_class, resolve
from dinogen.files import write_text
from dinogen.hub import Address, HubError, cached_address, fetch, shown
from dinogen.runs.run import Run
from dinogen.training.checkpointing.checkpoint import TEMPORARY, save_checkpoint, versions
from dinogen.training.state import Progress
from shards.files import sha256_file, sync_folder

log = logging.getLogger(__name__)
_NUM_NAMED = 4


class FormatError(UserError):
    """A file that cannot be read as the format it was said to be; the message names it."""


@dataclass(frozen=True)
class Weights:
    """What a file in another layout holds, in the names and shapes of our networks.

    Attributes:
        source: the file or folder that it was read from.
        kind: of the format, such as ``stylegan2``.
        family: keys of ``family:``, its ``name`` among them.
        resolution: side of the images, pixels.
        networks: state dict of each network of the family, by its name; one that is not there is
            initialised.
        averages: state dict of the moving average of each network that has one.
        nimg: training images that the networks had been shown; 0 if the file does not say.
        stage: keys of the stage to train on with, such as ``batch`` and ``lr``.
        sections: of the config, to train on with, such as ``optim`` and ``ema``.
        facts: what else is known of the source, JSON-ready.
        notes: sentences for the log on what differs from the source.
    """

    source: Path
    kind: str
    family: Mapping[str, Any]
    resolution: int
    networks: Mapping[str, Mapping[str, Tensor]]
    averages: Mapping[str, Mapping[str, Tensor]]
    nimg: int = 0
    stage: Mapping[str, Any] = field(default_factory=dict)
    sections: Mapping[str, Any] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def write_run(out: Path, weights: Weights) -> Path:
    """Write weights as a run of one stage with one checkpoint; ``out`` appears whole or not at all.

    The checkpoint's facts hold ``imported``: kind, file, its SHA-256, and the facts of the weights.
    Its optimizers are empty, and the stage is at its end, so a training run starts from it by
    ``init_from``.

    Args:
        out: folder of the run, which must not exist yet, or be empty.
        weights: of every network of the family; kept in float32.

    Returns:
        The folder of the checkpoint.

    Raises:
        FormatError: ``out`` holds something, or the weights are not those of the networks that
            their config builds, or not finite; names the tensor.
        ConfigError: the config is not valid.
        OSError: it cannot be written.
    """
    check_free(out)
    config = _config(out, weights)
    tensors = _checked(config, weights)
    for note in weights.notes:
        log.warning("%s: %s", shown(weights.source), note)
    state = {
        "progress": asdict(Progress(nimg=weights.nimg, logged=weights.nimg)),
        "start": 0,
        "keep": True,
        "best": False,
        "engine": {name: {} for name in tensors if not name.endswith(".ema")},
        "logger": {"sums": {}, "weights": {}},
        "data": None,
        "config": config.model_dump(mode="json"),
        "versions": versions(),
        "facts": {"imported": _origin(weights)},
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = Run(out.parent / f"{TEMPORARY}{out.name}.{os.getpid()}")
    try:
        place = temporary.stage(weights.resolution).checkpoints
        save_checkpoint(place.folder, weights.nimg, tensors | {"optim": {}}, state)
        write_text(temporary.config_file, dump_config(config))
        if out.is_dir():
            out.rmdir()  # it is empty
        temporary.path.rename(out)
    except BaseException:
        shutil.rmtree(temporary.path, ignore_errors=True)
        raise
    sync_folder(out.parent)
    return Run(out).stage(weights.resolution).checkpoints.at(weights.nimg)


def fetch_file(address: Address) -> Path:
    """Download a file of the hub.

    Raises:
        HubError: it is not available, or the address is of a repository or folder.
    """
    example = "name the file of weights, as in hf://user/name/folder/weights.pt"
    if not Path(address.subpath).suffix:
        raise HubError(f"{address}: is no file: {example}")
    found = fetch(address).path
    if not found.is_file():
        raise HubError(f"{address}: is a folder: {example}")
    return found


def check_free(out: Path) -> None:
    """Refuse a folder that holds something, before a large file is read for it.

    Raises:
        FormatError: there is a file, or a folder that is not empty.
    """
    if out.is_dir() and not any(out.iterdir()):
        return
    if os.path.lexists(out):
        raise FormatError(f"{out} exists already: name a new folder for the imported run")


def _config(out: Path, weights: Weights) -> Config:
    """Of a run that was trained to where the weights are."""
    length = max(weights.nimg, 1) / 1000
    return resolve(
        parse_config(
            {
                **weights.sections,
                "run": str(out),
                "family": dict(weights.family),
                "stages": [{**weights.stage, "resolution": weights.resolution, "kimg": length}],
                "notes": {"change": f"imported from {_named(weights.source)} ({weights.kind})"},
            },
            source=str(weights.source),
        )
    )


def _checked(config: Config, weights: Weights) -> dict[str, dict[str, Tensor]]:
    """The tensors of every file of the checkpoint, contiguous and of the dtypes of the networks.

    Raises:
        FormatError: a tensor is missing, unknown, of another shape, or not finite.
    """
    with torch.device("meta"):
        family = family_class(config.family)(config, config.stages[0], torch.device("meta"))
    wanted = {name: network.state_dict() for name, network in family.networks.items()}
    wanted |= {f"{name}.ema": family.networks[name].state_dict() for name in family.ema_networks}
    given = dict(weights.networks) | {f"{name}.ema": one for name, one in weights.averages.items()}
    fresh = family.networks.keys() - weights.networks.keys()
    if given.keys() != wanted.keys() - fresh:
        raise FormatError(
            f"{weights.source}: holds {', '.join(sorted(given))}; family "
            f"{config.family.name} needs {', '.join(sorted(wanted))}"
        )
    found = {name: _as_wanted(weights.source, name, given[name], wanted[name]) for name in given}
    for name, state in _initialised(config, sorted(fresh)).items():
        named = shown(weights.source)
        log.warning("%s: holds no %s: it is INITIALISED, not imported", named, name)
        found[name] = state
    return found


def _initialised(config: Config, names: Sequence[str]) -> dict[str, dict[str, Tensor]]:
    """Networks as a new run of the config has them."""
    if not names:
        return {}
    with rng.torch_seed(config.seed, f"init/{config.stages[0].resolution}"):
        family = family_class(config.family)(config, config.stages[0], torch.device("cpu"))
    return {name: family.networks[name].state_dict() for name in names}


def _as_wanted(
    source: Path, title: str, given: Mapping[str, Tensor], wanted: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    problems = [f"{name} is missing" for name in wanted if name not in given]
    problems += [f"{name} is not known" for name in given if name not in wanted]
    problems += [
        f"{name} is {tuple(given[name].shape)}, not {tuple(wanted[name].shape)}"
        for name in wanted
        if name in given and given[name].shape != wanted[name].shape
    ]
    if not problems:
        problems = [f"{name} is not finite" for name, one in given.items() if not _finite(one)]
    if problems:
        more = f" and {len(problems) - _NUM_NAMED} more" if len(problems) > _NUM_NAMED else ""
        named = "; ".join(problems[:_NUM_NAMED])
        raise FormatError(f"{source}: {title} does not fit our network: {named}{more}")
    # copies: safetensors refuses tensors that share memory
    return {
        name: given[name].detach().to("cpu", one.dtype, copy=True).contiguous()
        for name, one in wanted.items()
    }


def _finite(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() or bool(torch.isfinite(tensor).all())


def _origin(weights: Weights) -> dict[str, Any]:
    """What the facts say of where the weights are from."""
    source = weights.source
    mark = {"sha256": sha256_file(source)} if source.is_file() else {}
    return {"kind": weights.kind, "file": _named(source), **mark, **weights.facts}


def _named(source: Path) -> str:
    """The file's or folder's name, or its pinned address if it is from the hub."""
    return str(cached_address(source) or source.name)
