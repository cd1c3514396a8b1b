"""Our U-Net beside those of other codes: which layer is which, and what their files hold.

The networks are the same but for what :class:`~dinogen.networks.unet.Variant` lists. Each code
numbers and names the layers in its own way, and stores some tensors in another order.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file
from torch import Tensor

from dinogen.formats.runs import FormatError
from dinogen.networks.unet import ResBlock, SelfAttention, UNet

IMAGE_CHANNELS = 3
_NUM_NAMED = 4
_REFUSED = "Weights only load failed"  # what torch.load says of more than tensors
# Options of the family that its U-Net is built from.
_ARGUMENTS = (
    *("base_channels", "channel_multipliers", "num_blocks", "attention_resolutions"),
    *("head_channels", "num_classes"),
)
VARIANCE_DROPPED = (
    "the network predicts a variance beside the image: that half of its last convolution is "
    "DROPPED. Images of the ddim sampler do not use it; the ddpm sampler takes the schedule's"
)
NO_CLASS_ADDED = (
    "the network was not trained without a class: its row for 'no class' is the mean of all, and "
    "guidance other than 1 needs further training"
)


@dataclass(frozen=True)
class Layer:
    """One residual block, attention or convolution between two levels.

    Attributes:
        ours: what the names of its tensors begin with.
        kind: what it is; ``resample`` is a convolution that halves or doubles the side.
        side: half of the U-Net.
        level: 0 has the full resolution.
        number: of the block in its level, from 0; what resamples comes after the last.
        resamples: whether it leads to another level.
        attends: whether the blocks of its level have attention.
    """

    ours: str
    kind: Literal["block", "attention", "resample"]
    side: Literal["down", "middle", "up"]
    level: int
    number: int
    resamples: bool
    attends: bool


@dataclass(frozen=True)
class Names:
    """How another code names layers.

    Attributes:
        outer: those outside of the blocks, by our names.
        block: those in a residual block.
        attention: those in an attention.
        place: what the names of a layer's tensors begin with.
    """

    outer: Mapping[str, str]
    block: Mapping[str, str]
    attention: Mapping[str, str]
    place: Callable[[Layer, UNet], str]


def check_choice(option: str, given: str, known: Sequence[str]) -> None:
    """Refuse an option of the command line that is not one of those known.

    Raises:
        FormatError: it is another; names the option.
    """
    if given not in known:
        raise FormatError(f"{option} {given!r}: give {' or '.join(known)}")


def unet_of(source: Path, resolution: int, family: Mapping[str, Any]) -> UNet:
    """The U-Net of options of the family `ddpm`, without memory for its weights.

    Raises:
        FormatError: there is no such U-Net.
    """
    arguments = {key: family[key] for key in _ARGUMENTS if key in family}
    try:
        with torch.device("meta"):
            return UNet(resolution, **arguments, variant=family.get("unet") or {})
    except ValueError as error:
        raise FormatError(f"{source}: our U-Net cannot be built so: {error}") from None


def num_blocks_of(network: UNet) -> int:
    """Residual blocks per level on the way down."""
    blocks = [m for m in network.down if isinstance(m, ResBlock) and m.resample is None]
    return len(blocks) // num_levels_of(network)


def num_levels_of(network: UNet) -> int:
    """How many resolutions it has."""
    return 1 + sum(not isinstance(m, ResBlock) or m.resample == "up" for m in network.up)


def layers(network: UNet) -> Iterator[Layer]:
    """Each of them, in the order of the network."""
    last = num_levels_of(network) - 1
    level = number = 0
    for index, module in enumerate(network.down):
        resamples = not isinstance(module, ResBlock) or module.resample is not None
        attends = number > 0 and _attends(network.down[index - 1])
        yield from _layers(module, f"down.{index}", "down", level, number, resamples, attends)
        level, number = (level + 1, 0) if resamples else (level, number + 1)
    for index, module in enumerate(network.middle):
        yield from _layers(module, f"middle.{index}", "middle", last, index, False, True)
    level, number = last, 0
    for index, module in enumerate(network.up):
        resamples = not isinstance(module, ResBlock) or module.resample is not None
        attends = number > 0 and _attends(network.up[index - 1])
        yield from _layers(module, f"up.{index}", "up", level, number, resamples, attends)
        level, number = (level - 1, 0) if resamples else (level, number + 1)


def _layers(
    module: torch.nn.Module,
    ours: str,
    side: Literal["down", "middle", "up"],
    level: int,
    number: int,
    resamples: bool,
    attends: bool,
) -> Iterator[Layer]:
    if not isinstance(module, ResBlock):
        # our Up is a module around its convolution
        ours = f"{ours}.conv" if side == "up" else ours
        yield Layer(ours, "resample", side, level, number, resamples, attends)
        return
    attends = attends or _attends(module)
    yield Layer(ours, "block", side, level, number, resamples, attends)
    if _attends(module):
        yield Layer(f"{ours}.attention", "attention", side, level, number, resamples, attends)


def _attends(module: torch.nn.Module) -> bool:
    return isinstance(module, ResBlock) and isinstance(module.attention, SelfAttention)


def table(network: UNet, names: Names) -> dict[str, str]:
    """Their name of each of our tensors."""
    prefixes = dict(names.outer)
    for layer in layers(network):
        theirs = names.place(layer, network)
        inner = {"block": names.block, "attention": names.attention, "resample": None}[layer.kind]
        if inner is None:
            prefixes[layer.ours] = theirs
        else:
            prefixes |= {f"{layer.ours}.{our}": f"{theirs}.{it}" for our, it in inner.items()}
    return {
        name: f"{prefixes[name.rpartition('.')[0]]}.{name.rpartition('.')[2]}"
        for name in network.state_dict()
    }


def renamed(
    source: Path, network: UNet, names: Names, tensors: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Their tensors by our names.

    Raises:
        FormatError: one is missing, or has no counterpart in our U-Net.
    """
    theirs = table(network, names)
    problems = [f"{name} is missing" for name in theirs.values() if name not in tensors]
    problems += [f"{name} is not known" for name in tensors if name not in theirs.values()]
    if problems:
        more = f" and {len(problems) - _NUM_NAMED} more" if len(problems) > _NUM_NAMED else ""
        raise FormatError(
            f"{source}: its layers are not those of our U-Net: "
            f"{'; '.join(problems[:_NUM_NAMED])}{more}"
        )
    return {ours: tensors[name] for ours, name in theirs.items()}


def sines_first(weight: Tensor) -> Tensor:
    """The time embedding's first layer (O, I), whose inputs were cosines and then sines."""
    half = weight.shape[1] // 2
    return torch.cat([weight[:, half:], weight[:, :half]], 1)


def with_no_class(rows: Tensor) -> Tensor:
    """Embeddings of classes (N, E) and, as row N, their mean for no class."""
    return torch.cat([rows, rows.mean(0, keepdim=True)])


def drop_variance(tensors: Mapping[str, Tensor], last: str) -> tuple[dict[str, Tensor], bool]:
    """Without the outputs of the layer ``last`` that predict a variance, and whether it had any."""
    found = tensors[f"{last}.weight"]
    kept = dict(tensors)
    if len(found) != 2 * IMAGE_CHANNELS:
        return kept, False
    for name in (f"{last}.weight", f"{last}.bias"):
        kept[name] = tensors[name][:IMAGE_CHANNELS]
    return kept, True


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The state dict in a safetensors file, or in one of torch.save, which may hold tensors alone.

    Raises:
        FormatError: there is no such file, it is cut off, or it holds something else.
    """
    if not path.is_file():
        raise FormatError(f"{path}: there is no such file")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with warnings.catch_warnings(action="ignore"):  # of other pickles; it says so itself
            found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the readers raise many kinds
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        if not reason.startswith(_REFUSED):
            raise FormatError(f"{path}: cannot be read ({reason}): is it cut off?") from None
        named = re.search(r"GLOBAL (\S+)", str(error))
        raise FormatError(
            f"{path}: holds {named[1] if named else 'other things'} beside tensors, and was not "
            "read, for that may run code: save the state dict alone (a StyleGAN2 pickle goes to "
            "`dinogen import stylegan2`)"
        ) from None
    if not isinstance(found, dict) or not found:
        raise FormatError(f"{path}: holds no state dict (names and tensors)")
    if wrong := [name for name, one in found.items() if not isinstance(one, Tensor)]:
        raise FormatError(
            f"{path}: {wrong[0]} is no tensor: give the state dict of the network alone"
        )
    return {str(name): tensor for name, tensor in found.items()}
