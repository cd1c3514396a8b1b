"""Reads U-Nets of OpenAI's guided-diffusion and improved-diffusion: state dicts in `.pt` files.

Such a file holds tensors and no options. What shapes do not tell, the caller has to: size of the
images, heads, and the diffusion that it was trained with.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from dinogen.formats.runs import FormatError, Weights
from dinogen.formats.unets import (
    IMAGE_CHANNELS,
    NO_CLASS_ADDED,
    VARIANCE_DROPPED,
    Layer,
    Names,
    check_choice,
    drop_variance,
    num_blocks_of,
    num_levels_of,
    read_tensors,
    renamed,
    sines_first,
    unet_of,
    with_no_class,
)
from dinogen.networks.unet import SelfAttention, UNet

KIND = "guided-diffusion"
NORM_GROUPS = 32
NUM_STEPS = 1000


def _place(layer: Layer, network: UNet) -> str:
    """Modules are numbered through each half; a level's last holds what resamples, too."""
    attention = layer.kind == "attention"
    if layer.side == "middle":
        return f"middle_block.{1 if attention else 2 * layer.number}"
    per_level = num_blocks_of(network) + 1
    if layer.side == "down":
        index = 1 + layer.level * per_level + layer.number
        return f"input_blocks.{index}.{int(attention)}" + _of_conv(layer, "op")
    index = (num_levels_of(network) - 1 - layer.level) * per_level + layer.number
    if not layer.resamples:
        return f"output_blocks.{index}.{int(attention)}"
    return f"output_blocks.{index - 1}.{1 + layer.attends}" + _of_conv(layer, "conv")


def _of_conv(layer: Layer, name: str) -> str:
    return f".{name}" if layer.kind == "resample" else ""


NAMES = Names(
    outer={
        "conv_in": "input_blocks.0.0",
        "time.0": "time_embed.0",
        "time.2": "time_embed.2",
        "label": "label_emb",
        "norm_out": "out.0",
        "conv_out": "out.2",
    },
    block={
        "norm0": "in_layers.0",
        "conv0": "in_layers.2",
        "affine": "emb_layers.1",
        "norm1": "out_layers.0",
        "conv1": "out_layers.3",
        "skip": "skip_connection",
    },
    attention={"norm": "norm", "qkv": "qkv", "proj": "proj_out"},
    place=_place,
)


def read(
    file: Path,
    image_size: int,
    *,
    num_heads: int | None = None,
    head_channels: int | None = None,
    new_attention_order: bool = False,
    schedule: str = "linear",
    num_steps: int = NUM_STEPS,
    rescale_timesteps: bool | None = None,
    prediction: str = "epsilon",
) -> Weights:
    """Read a file as weights of the family `ddpm`.

    Channels, levels, blocks, attention, scale-shift norms, resampling blocks, classes and learnt
    variance are found from the tensors. A learnt variance is dropped, which a note says.

    Args:
        file: a state dict, such as ``ema_0.9999_250000.pt`` or ``lsun_bedroom.pt``.
        image_size: side of the images, pixels.
        num_heads: heads of each attention (their ``num_heads``).
        head_channels: or the width of each (their ``num_head_channels``).
        new_attention_order: their ``use_new_attention_order``.
        schedule: their ``noise_schedule``, linear or cosine.
        num_steps: their ``diffusion_steps``.
        rescale_timesteps: their option of this name; needed unless ``num_steps`` is 1000.
        prediction: epsilon, or x0, their ``predict_xstart``.

    Raises:
        FormatError: the file cannot be read, is of another network, or an option is missing.
    """
    if (num_heads is None) == (head_channels is None):
        raise FormatError(
            f"{file}: does not say how many heads its attention has: give either --num-heads (4 "
            "unless it was set in training) or --head-channels (64 in most released models)"
        )
    if rescale_timesteps is None and num_steps != NUM_STEPS:
        raise FormatError(
            f"{file}: does not say whether its {num_steps} time steps were scaled to {NUM_STEPS}: "
            "give --rescale-timesteps (improved-diffusion does unless told otherwise) or "
            "--no-rescale-timesteps (guided-diffusion)"
        )
    check_choice("--schedule", schedule, ("linear", "cosine"))
    check_choice("--prediction", prediction, ("epsilon", "x0"))
    tensors, learnt_variance = _checked(file, read_tensors(file))
    heads = {} if head_channels is None else {"head_channels": head_channels}
    details: dict[str, Any] = {"norm_groups": NORM_GROUPS, "num_heads": num_heads}
    if rescale_timesteps:
        details["time_scale"] = NUM_STEPS / num_steps
    structure, found = _structure(file, tensors, image_size)
    family = {
        "name": "ddpm",
        "schedule": schedule,
        "prediction": prediction,
        "num_steps": num_steps,
        "sample_steps": min(100, num_steps),
        **structure,
        **heads,
        "unet": details | found,
    }
    network = unet_of(file, image_size, family)
    own = renamed(file, network, NAMES, tensors)
    for name, module in network.named_modules():
        if isinstance(module, SelfAttention):
            for one in (f"{name}.qkv.weight", f"{name}.qkv.bias"):
                own[one] = _q_k_v(own[one], 1 if new_attention_order else module.num_heads)
            for one in (f"{name}.qkv.weight", f"{name}.proj.weight"):
                own[one] = own[one].unsqueeze(-1)  # of a 1d convolution
    own["time.0.weight"] = sines_first(own["time.0.weight"])
    notes = [VARIANCE_DROPPED] if learnt_variance else []
    if "label.weight" in own:
        own["label.weight"] = with_no_class(own["label.weight"])
        notes.append(NO_CLASS_ADDED)
    return Weights(
        source=file,
        kind=KIND,
        family=family,
        resolution=image_size,
        networks={"G": own},
        averages={"G": own},
        facts={"learnt_variance": learnt_variance},
        notes=tuple(notes),
    )


def _q_k_v(rows: Tensor, num_heads: int) -> Tensor:
    """Rows (3C, ...) in the order q, k, v, each head after head; before, each head had its three.

    The new order is that already, which is what one head means.
    """
    ordered: Tensor = rows.unflatten(0, (num_heads, 3, -1)).transpose(0, 1).flatten(0, 2)
    return ordered


def _checked(file: Path, tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], bool]:
    """Refuse other networks by what they are; a learnt variance is dropped, which is told."""
    needed = ("input_blocks.0.0.weight", "time_embed.0.weight", "middle_block.1.qkv.weight")
    if missing := [name for name in needed if name not in tensors]:
        raise FormatError(
            f"{file}: has no {missing[0]}: it is no U-Net of guided-diffusion or improved-diffusion"
        )
    if "out.2.weight" not in tensors or "output_blocks.0.0.in_layers.2.weight" not in tensors:
        raise FormatError(f"{file}: has no way up: it is a classifier, which makes no images")
    wanted = (tensors["input_blocks.0.0.weight"].shape[1], len(tensors["out.2.weight"]))
    if wanted[0] == 2 * IMAGE_CHANNELS:
        raise FormatError(
            f"{file}: reads {wanted[0]} channels: it is an upsampler, which needs a smaller image "
            "to start from; only models that start from noise can be imported"
        )
    if wanted[0] != IMAGE_CHANNELS or wanted[1] not in (IMAGE_CHANNELS, 2 * IMAGE_CHANNELS):
        raise FormatError(
            f"{file}: reads {wanted[0]} channels and makes {wanted[1]}: images here have "
            f"{IMAGE_CHANNELS}"
        )
    return drop_variance(tensors, "out.2")


def _structure(
    file: Path, tensors: Mapping[str, Tensor], image_size: int
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What shapes tell: options of the family, and of its ``unet:``."""
    num_up = 1 + max(int(m[1]) for n in tensors if (m := re.match(r"output_blocks\.(\d+)\.", n)))
    resample = re.compile(r"output_blocks\.(\d+)\.[12]\.(conv|in_layers\.0)\.weight")
    ups = sorted((int(m[1]), m[2] != "conv") for name in tensors if (m := resample.fullmatch(name)))
    num_levels = len(ups) + 1
    downs = {name.split(".")[1] for name in tensors if name.startswith("input_blocks.")}
    if len(downs) != num_up or [at for at, _ in ups] != [
        num_up // num_levels * (i + 1) - 1 for i in range(num_levels - 1)
    ]:
        raise FormatError(
            f"{file}: its {len(downs)} blocks on the way down and {num_up} on the way up are not "
            f"of {num_levels} levels: is it cut off, or without weights where sides are halved "
            "(conv_resample=False), which our U-Net cannot be?"
        )
    per_level = num_up // num_levels
    if per_level < 2:
        raise FormatError(f"{file}: its levels have no blocks on the way down")

    def has(name: str) -> bool:
        return name in tensors

    first = [1 + level * per_level for level in range(num_levels)]
    try:
        widths = [len(tensors[f"input_blocks.{i}.0.in_layers.2.weight"]) for i in first]
        affine = len(tensors["input_blocks.1.0.emb_layers.1.weight"])
    except KeyError as error:
        raise FormatError(f"{file}: has no {error.args[0]}: is it cut off?") from None
    base = len(tensors["input_blocks.0.0.weight"])
    if wrong := [width for width in widths if width % base]:
        raise FormatError(
            f"{file}: {wrong[0]} channels of a level are no multiple of the {base} of the first "
            "convolution: our U-Net has whole multiples alone"
        )
    attending = [has(f"input_blocks.{i}.1.qkv.weight") for i in first]
    time_channels = tensors["time_embed.0.weight"].shape[1]
    structure = {
        "base_channels": base,
        "channel_multipliers": [width // base for width in widths],
        "num_blocks": per_level - 1,
        "attention_resolutions": [image_size >> i for i, one in enumerate(attending) if one],
        "num_classes": len(tensors["label_emb.weight"]) if has("label_emb.weight") else 0,
    }
    details: dict[str, Any] = {
        "scale": affine == 2 * widths[0],
        "resampling": "block" if any(block for _, block in ups) else "conv",
    }
    if time_channels != base:
        details["time_channels"] = time_channels
    return structure, details
