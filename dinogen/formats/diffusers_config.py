"""Configs of diffusers and ours: what its U-Net and scheduler are here, and ours there."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn, TypeGuard

import torch
from torch import Tensor

from dinogen.diffusion.process import MAX_BETA, Name, Schedule
from dinogen.formats.runs import FormatError
from dinogen.formats.unets import (
    IMAGE_CHANNELS,
    check_choice,
    layers,
    num_blocks_of,
    num_levels_of,
)
from dinogen.networks.unet import Norm, SelfAttention, UNet

MODEL = "UNet2DModel"
VERSION = "0.42.1"  # of diffusers, whose layout it is
PREDICTIONS = {"epsilon": "epsilon", "v": "v_prediction", "x0": "sample"}
LINEAR = (1e-4, 0.02)
MAX_ERROR_OF_BETAS = 1e-6
_Fits = Callable[[Any], bool]


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        FormatError: there is no such file, or it holds something else.
    """
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


def structure_of(
    path: Path, config: Mapping[str, Any], image_size: int | None
) -> tuple[int, dict[str, Any], dict[str, Any]]:
    """Resolution, options of the family, and those of its ``unet:``, from a model's config.

    Args:
        path: of the config, named in errors.
        config: of a UNet2DModel.
        image_size: side of the images, where the config does not say.

    Raises:
        FormatError: it is of another model, or our U-Net cannot do what it says; names the key.
    """

    def refuse(key: str, why: str) -> NoReturn:
        raise FormatError(f"{path}: {key} {config.get(key)!r}: {why}")

    if config.get("_class_name") != MODEL:
        refuse("_class_name", f"only {MODEL} can be imported, a U-Net on pixels without text")
    _check_types(path, config, _OF_MODEL)
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
    if len(sides) != 1:
        refuse("sample_size", "images here are square")
    resolution = sides.pop() or image_size
    if not _is_size(resolution):
        refuse("sample_size", "give the side of the images: --image-size")
    if image_size not in (None, resolution):
        refuse("sample_size", f"--image-size {image_size} is another: leave it out")
    widths = config.get("block_out_channels", [224, 448, 672, 896])
    if wrong := [width for width in widths if width % widths[0]]:
        refuse("block_out_channels", f"{wrong[0]} is no multiple of the first")
    if config.get("time_embedding_dim") not in (None, 4 * widths[0]):
        refuse("time_embedding_dim", f"our U-Net has {4 * widths[0]} there")
    attending, resampling = _block_types(config, refuse)
    if len(attending) != len(widths):
        refuse("block_out_channels", f"there are {len(attending)} blocks down and up")
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


def _is_size(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _list_of(fits: _Fits) -> _Fits:
    """Of one item or more."""
    return lambda value: isinstance(value, list) and bool(value) and all(map(fits, value))


def _or_none(fits: _Fits) -> _Fits:
    return lambda value: value is None or fits(value)


# What the keys that are read hold, where they are there; how it is called in an error.
_SIZE = "a whole number above 0"
_OF_MODEL: Mapping[str, tuple[_Fits, str]] = {
    "sample_size": (
        lambda size: _or_none(_is_size)(size) or _list_of(_is_size)(size),
        "a side of images above 0",
    ),
    "block_out_channels": (_list_of(_is_size), "a list of numbers of channels"),
    "down_block_types": (_list_of(_is_text), "a list of names"),
    "up_block_types": (_list_of(_is_text), "a list of names"),
    "downsample_type": (_or_none(_is_text), "a name"),
    "upsample_type": (_or_none(_is_text), "a name"),
    "layers_per_block": (_is_size, _SIZE),
    "norm_num_groups": (_is_size, _SIZE),
    "attn_norm_num_groups": (_or_none(_is_size), _SIZE),
    "attention_head_dim": (_or_none(_is_size), _SIZE),
    "num_class_embeds": (_or_none(_is_size), _SIZE),
    "norm_eps": (_is_number, "a number"),
    "dropout": (_is_number, "a number"),
}
_OF_SCHEDULER: Mapping[str, tuple[_Fits, str]] = {
    "num_train_timesteps": (_is_size, _SIZE),
    "beta_start": (_is_number, "a number"),
    "beta_end": (_is_number, "a number"),
    "beta_schedule": (_or_none(_is_text), "a name"),
    "trained_betas": (_or_none(_list_of(_is_number)), "a list of numbers"),
    "prediction_type": (_is_text, "a name"),
}


def _check_types(
    path: Path, config: Mapping[str, Any], wanted: Mapping[str, tuple[_Fits, str]]
) -> None:
    """Refuse values of other types.

    Raises:
        FormatError: there is one; names the key.
    """
    for key, (fits, what) in wanted.items():
        if key in config and not fits(config[key]):
            raise FormatError(f"{path}: {key} {config[key]!r}: is not {what}")


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


def diffusion_of(
    path: Path | None, schedule: str | None, num_steps: int | None, prediction: str | None
) -> tuple[dict[str, Any], list[str]]:
    """Options of the family about noise, and sentences on what differs.

    Args:
        path: of a scheduler's config; None if there is none, and the rest is what to take.
        schedule: ``linear`` or ``cosine``.
        num_steps: time steps of the schedule; 1000 unless given.
        prediction: ``epsilon``, ``v`` or ``x0``.

    Raises:
        FormatError: no schedule of ours is that of the scheduler, or the options contradict it.
    """
    if path is None:
        if schedule is None or prediction is None:
            raise FormatError(
                "the folder has no scheduler/scheduler_config.json, so it does not say what the "
                "network was trained with: give --schedule and --prediction (and --num-steps)"
            )
        check_choice("--schedule", schedule, ("linear", "cosine"))
        check_choice("--prediction", prediction, tuple(PREDICTIONS))
        config: dict[str, Any] = {}
        num_steps = 1000 if num_steps is None else num_steps
    elif not (schedule is None and num_steps is None and prediction is None):
        raise FormatError(
            f"{path}: says schedule, time steps and prediction already: leave out --schedule, "
            "--num-steps and --prediction"
        )
    else:
        config = read_json(path)
        _check_types(path, config, _OF_SCHEDULER)
        num_steps = config.get("num_train_timesteps", 1000)
        schedule = _schedule_of(path, config, num_steps)
        kind = config.get("prediction_type", "epsilon")
        by_theirs = {theirs: ours for ours, theirs in PREDICTIONS.items()}
        if kind not in by_theirs:
            raise FormatError(f"{path}: prediction_type {kind!r}: there are {', '.join(by_theirs)}")
        prediction = by_theirs[kind]
    notes = []
    clips = config.get("clip_sample", True) and config.get("clip_sample_range", 1) == 1
    if config.get("thresholding") or not clips:
        notes.append(
            "its scheduler does not clip the predicted images to [-1, 1] on the way: ours does, so "
            "samples differ"
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
        f"{path}: {given} over {num_steps} time steps is not known here: there are linear "
        f"({LINEAR[0]} to {LINEAR[1]} over 1000 steps) and squaredcos_cap_v2 (our cosine)"
    )


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
