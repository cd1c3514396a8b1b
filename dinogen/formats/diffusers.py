"""Folders of diffusers' UNet2DModel and its pipelines, read as a `ddpm` run and written from one.

    unet/config.json, unet/diffusion_pytorch_model.safetensors
    scheduler/scheduler_config.json
    model_index.json
    dinogen.json (ours): the options that diffusers has no word for

Neither reading nor writing needs diffusers. It keeps queries, keys and values apart, embeds cosines
before sines unless told otherwise, and has one number of groups for all norms.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors.torch import save
from torch import Tensor

from dinogen.diffusion.process import MAX_BETA, Name, Schedule
from dinogen.files import write_bytes, write_json
from dinogen.formats.runs import FormatError, Weights, check_free
from dinogen.formats.unets import (
    IMAGE_CHANNELS,
    NO_CLASS_ADDED,
    VARIANCE_DROPPED,
    Layer,
    Names,
    drop_variance,
    layers,
    num_blocks_of,
    num_levels_of,
    read_tensors,
    renamed,
    sines_first,
    table,
    unet_of,
    with_no_class,
)
from dinogen.networks.unet import Norm, SelfAttention, UNet
from dinogen.training.checkpointing.checkpoint import TEMPORARY
from dinogen.training.checkpointing.export import Generator
from shards.files import sync_folder

log = logging.getLogger(__name__)

KIND = "diffusers"
MODEL = "UNet2DModel"
VERSION = "0.42.1"  # of diffusers, whose layout it is
WEIGHTS = "diffusion_pytorch_model"
OURS = "dinogen.json"
PREDICTIONS = {"epsilon": "epsilon", "v": "v_prediction", "x0": "sample"}
LINEAR = (1e-4, 0.02)
MAX_ERROR_OF_BETAS = 1e-6


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
# What diffusers called these before 0.15; folders of that time are still about.
_EARLIER = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


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
        num_steps: time steps of the schedule, likewise.
        prediction: ``epsilon``, ``v`` or ``x0``, likewise.

    Raises:
        FormatError: a file is missing or cut off, the model is of another class, or it does
            something that our U-Net cannot; names it.
    """
    model = folder / "unet" if (folder / "unet").is_dir() else folder
    path = model / "config.json"
    config = _json(path)
    resolution, structure, details = _structure(path, config, image_size)
    diffusion, notes = _diffusion(_scheduler_of(folder), schedule, num_steps, prediction)
    family = {"name": "ddpm", **structure, **diffusion, "unet": details}
    known = _known(folder, resolution, config)
    family = family if known is None else known
    found = _joined(read_tensors(_weights_of(model)))
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
        facts={"learnt_variance": learnt_variance},
        notes=tuple(notes),
    )


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise FormatError(
            f"{path}: there is no such file: give the folder that save_pretrained wrote"
        ) from None
    except (OSError, ValueError) as error:
        raise FormatError(f"{path}: cannot be read as JSON: {error}") from None
    if not isinstance(found, dict):
        raise FormatError(f"{path}: is no JSON object")
    return found


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
    family = _json(folder / OURS).get("family")
    if not isinstance(family, dict) or family.get("name") != "ddpm":
        raise FormatError(f"{folder / OURS}: holds no options of the family ddpm: remove the file")
    network = unet_of(folder / OURS, resolution, family)
    wanted = unet_config(network, family, resolution)
    same = all(config.get(key, one) == one for key, one in wanted.items() if key[0] != "_")
    return family if same else None


def _structure(
    path: Path, config: Mapping[str, Any], image_size: int | None
) -> tuple[int, dict[str, Any], dict[str, Any]]:
    """Resolution, options of the family, and those of its ``unet:``, from the model's config."""

    def refuse(key: str, why: str) -> NoReturn:
        raise FormatError(f"{path}: {key} {config.get(key)!r}: {why}")

    if config.get("_class_name") != MODEL:
        refuse("_class_name", f"only {MODEL} can be imported, a U-Net on pixels without text")
    for key, ours in {
        "in_channels": (IMAGE_CHANNELS,),
        "out_channels": (IMAGE_CHANNELS, 2 * IMAGE_CHANNELS),
        "center_input_sample": (False,),
        "time_embedding_type": ("positional",),
        "freq_shift": (0, 1),
        "mid_block_type": ("UNetMidBlock2D",),
        "mid_block_scale_factor": (1,),
        "add_attention": (True,),
        "act_fn": ("silu", "swish"),
        "class_embed_type": (None,),
        "resnet_time_scale_shift": ("default", "scale_shift"),
        "downsample_padding": (0, 1),
    }.items():
        if config.get(key, ours[0]) not in ours:
            refuse(key, f"our U-Net has {' or '.join(map(repr, ours))} alone")
    size = config.get("sample_size")
    sides = set(size) if isinstance(size, list) else {size}
    if len(sides) > 1:
        refuse("sample_size", "images here are square")
    resolution = sides.pop() or image_size
    if not isinstance(resolution, int):
        refuse("sample_size", "give the side of the images: --image-size")
    widths = config.get("block_out_channels", [224, 448, 672, 896])
    if wrong := [width for width in widths if width % widths[0]]:
        refuse("block_out_channels", f"{wrong[0]} is no multiple of the first")
    if config.get("time_embedding_dim") not in (None, 4 * widths[0]):
        refuse("time_embedding_dim", f"our U-Net has {4 * widths[0]} there")
    attending, resampling = _block_types(config, refuse)
    groups = config.get("norm_num_groups", 32)
    scales = config.get("resnet_time_scale_shift", "default") == "scale_shift"
    middle = config.get("attn_norm_num_groups") or (None if scales else groups)
    if middle not in (groups, None):
        refuse("attn_norm_num_groups", f"our U-Net has norm_num_groups, {groups}, there too")
    head = config.get("attention_head_dim", 8)
    details = {
        "norm_groups": groups,
        "norm_eps": config.get("norm_eps", 1e-5),
        "scale": scales,
        "num_heads": 1 if head is None else None,
        "middle_norm": middle is not None,
        "resampling": resampling,
        "downsample_padding": "all" if config.get("downsample_padding", 1) else "end",
        "last_frequency": "exact" if config.get("freq_shift", 0) else "near",
    }
    structure = {
        "base_channels": widths[0],
        "channel_multipliers": [width // widths[0] for width in widths],
        "num_blocks": config.get("layers_per_block", 2),
        "attention_resolutions": [resolution >> i for i, one in enumerate(attending) if one],
        **({} if head is None else {"head_channels": head}),
        "dropout": config.get("dropout", 0.0),
        "num_classes": config.get("num_class_embeds") or 0,
    }
    return resolution, structure, details


def _block_types(config: Mapping[str, Any], refuse: Any) -> tuple[list[bool], str]:
    """Whether each level attends, and how sides are halved and doubled."""
    kinds: dict[str, list[tuple[bool, str | None]]] = {}
    for key, end, default in (
        ("down_block_types", "DownBlock2D", ["DownBlock2D", *["AttnDownBlock2D"] * 3]),
        ("up_block_types", "UpBlock2D", [*["AttnUpBlock2D"] * 3, "UpBlock2D"]),
    ):
        resample = {"DownBlock2D": "Downsample", "UpBlock2D": "Upsample"}[end]
        by_type = config.get(f"{resample.lower()}_type") or "conv"
        ways = {
            end: (False, "conv"),
            f"Resnet{resample}Block2D": (False, "resnet"),
            f"Attn{end}": (True, by_type),
        }
        names = [name.removeprefix("UNetRes") for name in config.get(key, default)]
        if wrong := [name for name in names if name not in ways]:
            refuse(key, f"{wrong[0]} is not known: there are {', '.join(ways)}")
        kinds[key] = [ways[name] for name in names]
    down, up = kinds["down_block_types"], kinds["up_block_types"][::-1]
    if [attends for attends, _ in down] != [attends for attends, _ in up]:
        refuse("up_block_types", "a level of our U-Net attends on both ways or on neither")
    # the smallest level is not halved, and the largest not doubled
    found = {way for _, way in down[:-1]} | {way for _, way in up[1:]}
    if len(found) > 1 or found - {"conv", "resnet"}:
        refuse("down_block_types", "our U-Net resamples in one way: all by conv, or all by resnet")
    return [attends for attends, _ in down], "block" if found == {"resnet"} else "conv"


def _scheduler_of(folder: Path) -> Path | None:
    for parent in (folder / "scheduler", folder, folder.parent / "scheduler"):
        if (parent / "scheduler_config.json").is_file():
            return parent / "scheduler_config.json"
    return None


def _diffusion(
    path: Path | None, schedule: str | None, num_steps: int | None, prediction: str | None
) -> tuple[dict[str, Any], list[str]]:
    """Options of the family about noise, and what to say of them."""
    if path is None:
        if schedule is None or prediction is None:
            raise FormatError(
                "the folder has no scheduler/scheduler_config.json, so it does not say what the "
                "network was trained with: give --schedule and --prediction (and --num-steps)"
            )
        config: dict[str, Any] = {}
        num_steps = num_steps or 1000
    elif schedule or num_steps or prediction:
        raise FormatError(
            f"{path}: says schedule, time steps and prediction already: leave out --schedule, "
            "--num-steps and --prediction"
        )
    else:
        config = _json(path)
        num_steps = int(config.get("num_train_timesteps", 1000))
        schedule = _schedule_of(path, config, num_steps)
        kind = config.get("prediction_type", "epsilon")
        by_theirs = {theirs: ours for ours, theirs in PREDICTIONS.items()}
        if kind not in by_theirs:
            raise FormatError(f"{path}: prediction_type {kind!r}: there are {', '.join(by_theirs)}")
        prediction = by_theirs[kind]
    notes = []
    if config.get("thresholding") or not config.get("clip_sample", True):
        notes.append(
            "its scheduler does not clip images on the way to [-1, 1], or clips them dynamically: "
            "ours clips them to [-1, 1], so samples differ"
        )
    options = {
        "schedule": schedule,
        "prediction": prediction,
        "num_steps": num_steps,
        "sample_steps": min(100, num_steps),
    }
    return options, notes


def _schedule_of(path: Path, config: Mapping[str, Any], num_steps: int) -> str:
    """Ours with the same betas."""
    kind, trained = config.get("beta_schedule"), config.get("trained_betas")
    ends = config.get("beta_start", LINEAR[0]), config.get("beta_end", LINEAR[1])
    if config.get("rescale_betas_zero_snr"):
        raise FormatError(f"{path}: rescale_betas_zero_snr: no schedule here ends without signal")
    betas: Tensor | None = None
    if trained is not None:
        betas = torch.tensor(trained, dtype=torch.float64)
    elif kind == "linear":
        betas = torch.linspace(*ends, num_steps, dtype=torch.float64)
    elif kind == "squaredcos_cap_v2":
        return "cosine"
    schedules: tuple[Name, ...] = ("linear", "cosine")
    for name in schedules:
        ours = Schedule(name, num_steps).betas
        same = betas is not None and betas.shape == ours.shape
        if betas is not None and same and (betas - ours).abs().max() < MAX_ERROR_OF_BETAS:
            return name
    given = "trained_betas" if trained is not None else f"beta_schedule {kind!r} of {ends}"
    raise FormatError(
        f"{path}: {given} over {num_steps} time steps is none of ours, which are linear "
        f"({LINEAR[0]} to {LINEAR[1]} over 1000 steps) and squaredcos_cap_v2 (our cosine)"
    )


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
    if not isinstance(network, UNet):
        raise FormatError(
            f"{folder}: diffusers has no network like that of the family {family.name}: only ddpm "
            "can be written as such a folder"
        )
    check_free(folder)
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
    """Whether it is one that can be written so: a U-Net of the family `ddpm`."""
    return isinstance(generator.network, UNet)


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


def unet_config(network: UNet, family: Mapping[str, Any], resolution: int) -> dict[str, Any]:
    """The config of a UNet2DModel that computes what ours does.

    Args:
        network: ours.
        family: its options.
        resolution: side of the images.

    Raises:
        FormatError: there is none, naming the option of the family.
    """
    variant = network.variant
    groups = sorted({m.num_groups for m in network.modules() if isinstance(m, Norm)})
    if len(groups) > 1:
        raise FormatError(
            f"diffusers has one number of groups for all norms, and this U-Net has {groups[0]} to "
            f"{groups[-1]}: train with family.unet.norm_groups, or base_channels of 128 or more"
        )
    if variant.time_scale != 1 or network.time_channels != network.conv_in.out_channels:
        raise FormatError(
            "diffusers cannot scale time steps, or embed them in another size than that of the "
            "first convolution: family.unet.time_scale and family.unet.time_channels"
        )
    if not (variant.middle_norm or variant.scale):
        raise FormatError(
            "diffusers has a norm in the middle unless family.unet.scale: set middle_norm"
        )
    attentions = [m for m in network.modules() if isinstance(m, SelfAttention)]
    heads = {m.qkv.in_channels // m.num_heads for m in attentions}
    one_each = all(m.num_heads == 1 for m in attentions)
    if len(heads) > 1 and not one_each:
        raise FormatError(
            f"diffusers has one width for all attention heads, and with family.unet.num_heads "
            f"{variant.num_heads} they have {', '.join(map(str, sorted(heads)))} channels here"
        )
    attends = [False] * num_levels_of(network)
    for layer in layers(network):
        if layer.side == "down" and layer.kind == "attention":
            attends[layer.level] = True
    widths = [network.conv_in.out_channels * one for one in family["channel_multipliers"]]
    by_block = variant.resampling == "block"
    plain = ["DownBlock2D", "UpBlock2D"]
    if by_block:
        plain = ["ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D"]
    return {
        "_class_name": MODEL,
        "_diffusers_version": VERSION,
        "sample_size": resolution,
        "in_channels": IMAGE_CHANNELS,
        "out_channels": IMAGE_CHANNELS,
        "center_input_sample": False,
        "time_embedding_type": "positional",
        "time_embedding_dim": None,
        "freq_shift": int(variant.last_frequency == "exact"),
        "flip_sin_to_cos": False,
        "down_block_types": ["AttnDownBlock2D" if one else plain[0] for one in attends],
        "mid_block_type": "UNetMidBlock2D",
        "up_block_types": ["AttnUpBlock2D" if one else plain[1] for one in reversed(attends)],
        "block_out_channels": widths,
        "layers_per_block": num_blocks_of(network),
        "mid_block_scale_factor": 1,
        "downsample_padding": int(variant.downsample_padding == "all"),
        "downsample_type": "resnet" if by_block else "conv",
        "upsample_type": "resnet" if by_block else "conv",
        "dropout": family["dropout"],
        "act_fn": "silu",
        "attention_head_dim": None if one_each else heads.pop(),
        "norm_num_groups": groups[0],
        # of the middle; without, it has a norm where there is no scale alone
        "attn_norm_num_groups": groups[0] if variant.middle_norm else None,
        "norm_eps": variant.norm_eps,
        "resnet_time_scale_shift": "scale_shift" if variant.scale else "default",
        "add_attention": True,
        "class_embed_type": None,
        "num_class_embeds": family["num_classes"] + 1 if family["num_classes"] else None,
    }


def scheduler_config(family: Mapping[str, Any]) -> dict[str, Any]:
    """The config of the scheduler with our betas, time steps and clipping.

    Args:
        family: options of the family `ddpm`.
    """
    num_steps = family["num_steps"]
    linear = family["schedule"] == "linear"
    scale = 1000 / num_steps
    ends = [end * scale for end in LINEAR]
    # ours stops short of a beta of 1, which theirs does not
    own = linear and ends[1] > MAX_BETA
    ddim = family["sampler"] == "ddim"
    return {
        "_class_name": "DDIMScheduler" if ddim else "DDPMScheduler",
        "_diffusers_version": VERSION,
        "num_train_timesteps": num_steps,
        "beta_schedule": "linear" if linear else "squaredcos_cap_v2",
        "beta_start": ends[0],
        "beta_end": ends[1],
        "trained_betas": Schedule(family["schedule"], num_steps).betas.tolist() if own else None,
        "prediction_type": PREDICTIONS[family["prediction"]],
        "clip_sample": True,
        "clip_sample_range": 1.0,
        "thresholding": False,
        "timestep_spacing": "trailing",
        "steps_offset": 0,
        "rescale_betas_zero_snr": False,
        **({"set_alpha_to_one": True} if ddim else {"variance_type": "fixed_small"}),
    }
