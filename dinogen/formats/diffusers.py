"""Folders of diffusers' UNet2DModel and its pipelines, read as a `ddpm` run and written from one.

    unet/config.json, unet/diffusion_pytorch_model.safetensors
    scheduler/scheduler_config.json
    model_index.json
    dinogen.json (ours): the options that diffusers has no word for

Neither reading nor writing needs diffusers. It keeps queries, keys and values apart, embeds cosines
before sines unless told otherwise, and has one number of groups for all norms.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from dinogen import hub
from dinogen.families.registry import family_options
from dinogen.files import write_bytes, write_json
from dinogen.formats.diffusers_config import (
    MODEL,
    PREDICTIONS,
    VERSION,
    diffusion_of,
    read_json,
    scheduler_config,
    structure_of,
    unet_config,
)
from dinogen.formats.runs import FormatError, Weights
from dinogen.formats.unets import (
    NO_CLASS_ADDED,
    VARIANCE_DROPPED,
    Layer,
    Names,
    drop_variance,
    num_levels_of,
    read_tensors,
    renamed,
    sines_first,
    table,
    unet_of,
    with_no_class,
)
from dinogen.networks.unet import UNet
from dinogen.training.checkpointing.checkpoint import TEMPORARY
from dinogen.training.checkpointing.export import Generator
from shards.files import sha256_file, sync_folder

log = logging.getLogger(__name__)

KIND = "diffusers"
WEIGHTS = "diffusion_pytorch_model"
OURS = "dinogen.json"


def _place(layer: Layer, network: UNet) -> str:
    """By level and number; the way up counts levels from the smallest."""
    kind = {"block": "resnets", "attention": "attentions", "resample": ""}[layer.kind]
    if layer.side == "middle":
        return f"mid_block.{kind}.{layer.number}"
    level = layer.level if layer.side == "down" else num_levels_of(network) - 1 - layer.level
    stem = f"{layer.side}_blocks.{level}"
    if layer.resamples:
        return f"{stem}.{layer.side}samplers.0" + (".conv" if layer.kind == "resample" else "")
    return f"{stem}.{kind}.{layer.number}"


NAMES = Names(
    outer={
        "conv_in": "conv_in",
        "time.0": "time_embedding.linear_1",
        "time.2": "time_embedding.linear_2",
        "label": "class_embedding",
        "norm_out": "conv_norm_out",
        "conv_out": "conv_out",
    },
    block={
        "norm0": "norm1",
        "conv0": "conv1",
        "affine": "time_emb_proj",
        "norm1": "norm2",
        "conv1": "conv2",
        "skip": "conv_shortcut",
    },
    attention={"norm": "group_norm", "qkv": "qkv", "proj": "to_out.0"},
    place=_place,
)
_Q_K_V = ("to_q", "to_k", "to_v")
# What diffusers called these at first; folders of that time are still in use.
_EARLIER = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def fetch_folder(address: hub.Address) -> Path:
    """Download from the hub what :func:`read` reads of a folder.

    Raises:
        HubError: it is not available, or there is no such folder.
    """
    found = hub.fetch(address, ["*.json", f"*{WEIGHTS}.safetensors"])
    if not found.path.is_dir():
        whole = replace(address, subpath="")
        raise hub.HubError(
            f"{address}: {whole} has no folder {address.subpath} with a config (commit "
            f"{found.commit}): see what is there: {hub.page_of(address)}/tree/{found.commit}"
        )
    if not (_model_of(found.path) / f"{WEIGHTS}.safetensors").is_file():
        pinned = replace(address, revision=found.commit)
        hub.fetch(pinned, [f"*{WEIGHTS}.bin", f"*{WEIGHTS}.fp16.safetensors"])
    return found.path


def read(
    folder: Path,
    *,
    image_size: int | None = None,
    schedule: str | None = None,
    num_steps: int | None = None,
    prediction: str | None = None,
) -> Weights:
    """Read a folder as weights of the family `ddpm`.

    It is that of a pipeline (``unet/`` and ``scheduler/``), or that of the model alone. A learnt
    variance is dropped, which a note says.

    Args:
        folder: what ``save_pretrained`` or ``dinogen export --format diffusers`` wrote.
        image_size: side of the images, where the model's config does not say.
        schedule: ``linear`` or ``cosine``, where there is no scheduler.
        num_steps: time steps of the schedule, where there is none; 1000 unless given.
        prediction: ``epsilon``, ``v`` or ``x0``, where there is none.

    Raises:
        FormatError: a file is missing or cut off, the model is of another class, or it does
            something that our U-Net cannot; names it.
    """
    if not folder.is_dir():
        raise FormatError(f"{folder}: is no folder: give the one that save_pretrained wrote")
    model = _model_of(folder)
    path = model / "config.json"
    config = read_json(path)
    resolution, structure, details = structure_of(path, config, image_size)
    diffusion, notes = diffusion_of(_scheduler_of(folder), schedule, num_steps, prediction)
    family = {"name": "ddpm", **structure, **diffusion, "unet": details}
    known = _known(folder, resolution, config)
    family = family if known is None else known
    weights = _weights_of(model)
    found = _joined(read_tensors(weights))
    if "conv_out.weight" not in found:
        raise FormatError(f"{model}: its weights are not those of a {MODEL}: no conv_out.weight")
    tensors, learnt_variance = drop_variance(found, "conv_out")
    own = renamed(model, unet_of(path, resolution, family), NAMES, tensors)
    for name in own:
        if name.endswith(("qkv.weight", "proj.weight")):
            own[name] = own[name].reshape(*own[name].shape[:2], 1, 1)
    if config.get("flip_sin_to_cos", True):
        own["time.0.weight"] = sines_first(own["time.0.weight"])
    if learnt_variance:
        notes.append(VARIANCE_DROPPED)
    if "label.weight" in own and known is None:
        own["label.weight"] = with_no_class(own["label.weight"])
        notes.append(NO_CLASS_ADDED)
    return Weights(
        source=folder,
        kind=KIND,
        family=family,
        resolution=resolution,
        networks={"G": own},
        averages={"G": own},
        facts={"sha256": sha256_file(weights), "learnt_variance": learnt_variance},
        notes=tuple(notes),
    )


def _model_of(folder: Path) -> Path:
    return folder / "unet" if (folder / "unet").is_dir() else folder


def _weights_of(model: Path) -> Path:
    for name in (f"{WEIGHTS}.safetensors", f"{WEIGHTS}.bin", f"{WEIGHTS}.fp16.safetensors"):
        if (model / name).is_file():
            return model / name
    raise FormatError(f"{model}: holds neither {WEIGHTS}.safetensors nor {WEIGHTS}.bin")


def _joined(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """With the queries, keys and values of an attention as one tensor, as ours are."""
    found = {}
    for name, tensor in tensors.items():
        parts = name.split(".")
        if "attentions" in parts and parts[-2] in _EARLIER:
            name = ".".join([*parts[:-2], _EARLIER[parts[-2]], parts[-1]])
        found[name] = tensor
    for name in [name for name in found if ".to_q." in name]:
        stem, _, kind = name.rpartition(".to_q.")
        three = [found.pop(f"{stem}.{one}.{kind}", None) for one in _Q_K_V]
        there = [one for one in three if one is not None]
        if len(there) == len(three):
            found[f"{stem}.qkv.{kind}"] = torch.cat(there)
    return found


def _known(folder: Path, resolution: int, config: Mapping[str, Any]) -> dict[str, Any] | None:
    """The options in our own file, if the model is still the one that they were written for."""
    if not (folder / OURS).is_file():
        return None
    family: Any = read_json(folder / OURS).get("family")
    try:
        network = unet_of(folder / OURS, resolution, family)
        wanted = unet_config(network, family, resolution)
    except (AttributeError, KeyError, TypeError):
        raise FormatError(
            f"{folder / OURS}: holds no options of the family ddpm: remove the file"
        ) from None
    same = all(config.get(key, one) == one for key, one in wanted.items() if key[0] != "_")
    return family if same else None


def _scheduler_of(folder: Path) -> Path | None:
    for parent in (folder / "scheduler", folder, folder.parent / "scheduler"):
        if (parent / "scheduler_config.json").is_file():
            return parent / "scheduler_config.json"
    return None


def write(generator: Generator, folder: Path) -> None:
    """Write the U-Net of a generator as the folder of a pipeline of diffusers.

    ``DDIMPipeline.from_pretrained(folder)`` or ``DDPMPipeline`` loads it, whichever the sampler of
    the run is. With ``use_clipped_model_output=True`` and as many steps as the run's
    ``sample_steps``, if they divide ``num_steps``, DDIM gives the image that ours does.

    Args:
        generator: of the family `ddpm`.
        folder: must not exist yet, or be empty; it appears whole or not at all.

    Raises:
        FormatError: the family is another, diffusers has no word for what the U-Net does, or
            ``folder`` holds something.
        OSError: it cannot be written.
    """
    network, family = generator.network, generator.family.config.family
    if not takes(generator):
        raise FormatError(
            f"{folder}: diffusers has no pipeline for such a network of the family {family.name}: "
            "only a U-Net of ddpm that predicts epsilon, v or x0 of images can be written as such "
            "a folder"
        )
    assert isinstance(network, UNet)
    if os.path.lexists(folder) and not (folder.is_dir() and not any(folder.iterdir())):
        raise FormatError(f"{folder} exists already: name a new folder")
    options = {"name": family.name, **family.options}
    resolution = int(generator.info["resolution"])
    config = unet_config(network, options, resolution)
    sampler = {"ddim": "DDIM", "ddpm": "DDPM"}[options["sampler"]]
    files = {
        "unet/config.json": config,
        "scheduler/scheduler_config.json": scheduler_config(options),
        "model_index.json": {
            "_class_name": f"{sampler}Pipeline",
            "_diffusers_version": VERSION,
            "scheduler": ["diffusers", f"{sampler}Scheduler"],
            "unet": ["diffusers", MODEL],
        },
        OURS: {
            "family": options,
            "resolution": resolution,
            "nimg": generator.info["nimg"],
            "versions": generator.info["versions"],
            "card": generator.info.get("card", {}),
        },
    }
    tensors = _split(network)
    with _new_folder(folder) as temporary:
        for name, value in files.items():
            write_json(temporary / name, value)
        # the one key that diffusers asks for
        write_bytes(temporary / "unet" / f"{WEIGHTS}.safetensors", save(tensors, {"format": "pt"}))
    _say(folder, options, sampler)


def takes(generator: Generator) -> bool:
    """Whether it is one that can be written so: a U-Net of the family `ddpm` with time steps.

    Latents, alignment and embeddings are unknown to the pipelines.
    """
    network = generator.network
    options = family_options(generator.family.config).model_dump()
    return (
        isinstance(network, UNet)
        and network.projector is None
        and network.embed is None
        and network.latent_scale is None
        and "schedule" in options
        and options["prediction"] in PREDICTIONS
    )


@contextmanager
def _new_folder(folder: Path) -> Iterator[Path]:
    """A folder to fill, which takes the name of ``folder`` when it is whole."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.with_name(f"{TEMPORARY}{folder.name}.{os.getpid()}")
    try:
        yield temporary
        if folder.is_dir():
            folder.rmdir()  # it is empty
        temporary.rename(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    sync_folder(folder.parent)


def _say(folder: Path, options: Mapping[str, Any], sampler: str) -> None:
    steps = options["sample_steps"]
    exact = "use_clipped_model_output=True, " if sampler == "DDIM" else ""
    log.info(
        "%s: load it with diffusers.%sPipeline.from_pretrained(%r), and draw with %s"
        "num_inference_steps=%d",
        folder, sampler, str(folder), exact, steps,
    )  # fmt: skip
    if options["num_steps"] % steps:
        log.warning(
            "%s: %d sampling steps do not divide %d: diffusers then goes from step to step a "
            "little differently, and so do its images",
            folder, steps, options["num_steps"],
        )  # fmt: skip
    if options["num_classes"]:
        log.warning(
            "%s: the pipelines of diffusers ask for no class: call unet(..., class_labels=...) in "
            "a loop of your own; label %d means no class",
            folder, options["num_classes"],
        )  # fmt: skip


def _split(network: UNet) -> dict[str, Tensor]:
    """Its tensors by the names of diffusers, on the CPU."""
    names, found = table(network, NAMES), {}
    for ours, tensor in network.state_dict().items():
        name, tensor = names[ours], tensor.detach().cpu()
        if "attentions" in name and tensor.dim() == 4:
            tensor = tensor.flatten(1)  # a 1x1 convolution is a linear layer there
        if ".qkv." not in name:
            found[name] = tensor.contiguous()
            continue
        for one, part in zip(_Q_K_V, tensor.chunk(3), strict=True):
            found[name.replace("qkv", one)] = part.clone()
    return found
