"""The file of a projection, projected.safetensors: latents, and what they were found in."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, Field, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from dinogen.errors import ConfigError, UserError
from dinogen.families.abilities import (
    AdjustsSampling,
    LatentSpace,
    decode_in,
    num_classes_of,
    spaces_of,
)
from dinogen.files import weights_sha256, write_bytes
from dinogen.hub import shown
from dinogen.training.checkpointing.snapshot import Snapshot, load_snapshot

FILE = "projected.safetensors"
# One key, so that the same projection gives the same bytes.
_INFO = "dinogen_projection"
_NOISE = "noise"


class _Sampling(BaseModel, strict=True, extra="forbid"):
    sampler: str | None = None
    steps: int | None = Field(None, ge=1)


class _Checkpoint(BaseModel, strict=True):
    family: str
    resolution: int
    nimg: int
    weights_sha256: str


class _Settings(BaseModel, strict=True):
    space: str
    checkpoint: _Checkpoint
    label: int | None = Field(ge=0, lt=2**31)
    sampling: _Sampling


class _Info(BaseModel, strict=True):
    """What is read of the metadata. Such files are handed on, so none of it is believed."""

    # it becomes part of the names of files
    name: str = Field(pattern=r"^[A-Za-z0-9_-]{1,100}$")
    sha256: str
    run: str
    settings: _Settings


@dataclass(frozen=True)
class Projected:
    """A photo's latents in one space.

    Attributes:
        path: the file.
        info: its metadata, see :func:`write_projected`.
        latents: (1, *shape) of the space, on the CPU.
        noise: (1, values) of the decoder's maps of noise, or None.
    """

    path: Path
    info: dict[str, Any]
    latents: Tensor
    noise: Tensor | None

    @property
    def space(self) -> str:
        """Name of the space."""
        return str(self.settings["space"])

    @property
    def settings(self) -> dict[str, Any]:
        """How it was found."""
        found: dict[str, Any] = self.info["settings"]
        return found

    @property
    def title(self) -> str:
        """A short name of the photo."""
        return str(self.info["name"])

    @property
    def index(self) -> Tensor:
        """(1,) int64: the sample number whose class the photo was projected with."""
        return torch.tensor([int(self.settings["label"] or 0)])


def identity_of(snapshot: Snapshot) -> dict[str, Any]:
    """What tells one checkpoint from another, JSON-ready; the same for its exported file."""
    states = {
        f"{name}.{key}": value
        for name, network in snapshot.ema.networks.items()
        for key, value in network.state_dict().items()
    }
    return {
        "family": snapshot.family.config.family.name,
        "resolution": snapshot.resolution,
        "nimg": snapshot.nimg,
        "weights_sha256": weights_sha256(states),
    }


def write_projected(
    path: Path, latents: Tensor, noise: Tensor | None, info: Mapping[str, Any]
) -> None:
    """Write one photo's latents, whole or not at all.

    Args:
        path: the file.
        latents: (1, *shape); the tensor is named after its space.
        noise: (1, values) or None; the tensor is named ``noise``.
        info: JSON-ready: ``name``, ``photo``, ``sha256``, ``run``, ``loss``, the errors ``before``
            and ``after``, ``errors`` by step, and ``settings``: ``space``, ``checkpoint``
            (:func:`identity_of`), ``label``, ``sampling`` and so on.
    """
    tensors = {str(info["settings"]["space"]): latents.float().cpu().contiguous()}
    if noise is not None:
        tensors[_NOISE] = noise.float().cpu().contiguous()
    said = json.dumps(dict(info), allow_nan=False)
    write_bytes(path, save(tensors, {_INFO: said}))


def read_projected(places: Sequence[Path], option: str = "--latents") -> list[Projected]:
    """The projections in files, and in folders and below them, in order.

    Args:
        places: files and folders.
        option: by which they are given, for errors.

    Raises:
        UserError: a file is missing, damaged or something else, or a folder holds none; or their
            spaces or checkpoints differ.
    """
    files: list[Path] = []
    for place in places:
        below = sorted(place.rglob(FILE)) if place.is_dir() else [place]
        if not below:
            raise UserError(f"{option}: {place}: holds no {FILE}: give a folder of projections")
        files += below
    found = [_read(file, option) for file in files]
    for one in found[1:]:
        for what in ("space", "checkpoint"):
            if one.settings[what] != found[0].settings[what]:
                raise UserError(
                    f"{option}: {one.path} and {found[0].path} have not the same {what}: project "
                    "all photos alike"
                )
    return found


def _read(file: Path, option: str) -> Projected:
    remedy = f"give a {FILE} of `dinogen project`"
    if not file.is_file():
        raise UserError(f"{option}: {file}: is not there: {remedy}")
    try:
        with safe_open(file, "pt") as opened:
            info = json.loads((opened.metadata() or {})[_INFO])
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        space = _Info.model_validate(info).settings.space
        found = Projected(file, info, tensors[space], tensors.get(_NOISE))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise UserError(
            f"{option}: {file}: is no projection ({where}: {first['msg']}): {remedy}"
        ) from None
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise UserError(
            f"{option}: {file}: is no projection ({' '.join(str(error).split())[:80]}): {remedy}"
        ) from None
    return found


def check_fits(snapshot: Snapshot, projected: Projected, option: str = "--latents") -> None:
    """Refuse latents that the checkpoint they claim to be of cannot decode.

    Raises:
        UserError: no such space or class, or tensors of another shape or type.
    """
    family = snapshot.family
    space = spaces_of(family).get(projected.space)
    label, num_classes = projected.settings["label"], num_classes_of(family)
    if space is None:
        problem = f"{family.config.family.name} has no space {projected.space}"
    elif label is not None and label >= num_classes:
        problem = f"it is of class {label}, and there are {num_classes}"
    else:
        num_noise = sum(side**2 for side in space.noise_sides)
        wanted = {projected.space: (projected.latents, (1, *space.shape))}
        if projected.noise is not None:
            wanted[_NOISE] = (projected.noise, (1, num_noise))
        wrong = [
            f"{name} is {tuple(tensor.shape)} of {tensor.dtype}, not {shape} of float32"
            for name, (tensor, shape) in wanted.items()
            if tensor.shape != shape or tensor.dtype != torch.float32
        ]
        if not wrong:
            return
        problem = ", ".join(wrong)
    raise UserError(f"{option}: {projected.path}: is damaged ({problem}): project the photo again")


def snapshot_of(
    run: Path, projected: Sequence[Projected], resolution: int | None = None
) -> tuple[Snapshot, LatentSpace]:
    """The checkpoint that photos were projected into, of a run or an exported file, and the space.

    Args:
        run: folder of the run, or an exported file.
        projected: of one checkpoint, see :func:`read_projected`.
        resolution: what the user asks for, if anything.

    Raises:
        ConfigError: the run does not have this checkpoint any more.
        UserError: it is another run, or the latents do not fit.
    """
    first = projected[0]
    wanted = first.settings["checkpoint"]
    if resolution not in (None, wanted["resolution"]):
        raise UserError(
            f"--stage {resolution}: {first.path} was projected into stage {wanted['resolution']}: "
            "leave --stage out"
        )
    try:
        snapshot = load_snapshot(run, wanted["resolution"], wanted["nimg"])
    except ConfigError as error:
        raise ConfigError(
            f"{error} ({first.path} was projected into {first.info['run']} at {wanted['nimg']} "
            "images)"
        ) from None
    if identity_of(snapshot) != wanted:
        raise UserError(
            f"{shown(run)}: {first.path} was projected into another run ({first.info['run']}), "
            f"whose weights differ: give that one, or project the photo into {shown(run)}"
        )
    for one in projected:
        check_fits(snapshot, one)
    return snapshot, spaces_of(snapshot.family)[first.space]


def as_projected(snapshot: Snapshot, projected: Projected) -> Snapshot:
    """A checkpoint that draws as it did when a photo was projected into it."""
    family, sampling = snapshot.family, projected.settings["sampling"]
    if not sampling or not isinstance(family, AdjustsSampling):
        return snapshot
    return replace(snapshot, family=family.with_sampling(sampling))


@torch.no_grad()
def decode_projected(snapshot: Snapshot, projected: Projected, latents: Tensor) -> Tensor:
    """Images (N, 3, R, R) in [-1, 1] on the CPU of latents made from a projection's.

    Args:
        snapshot: from :func:`snapshot_of`.
        projected: its class, sampling and noise are taken for all of them.
        latents: (N, *shape), of its space, on any device.
    """
    family = as_projected(snapshot, projected).family
    device = family.device
    noise = None if projected.noise is None else projected.noise.to(device)
    images = []
    for one in latents.to(device).split(1):
        name, index = projected.space, projected.index
        made = decode_in(family, snapshot.ema.networks, name, one, index, noise)
        images.append(made.float().clamp(-1, 1).cpu())
    return torch.cat(images)
