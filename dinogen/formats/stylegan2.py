"""StyleGAN2 as NVlabs' stylegan2-ada-pytorch and stylegan3 pickle it, read for `stylegan2_ada`.

Such a file is a dict: ``G``, ``D`` and ``G_ema``, ``augment_pipe`` (or None) and
``training_set_kwargs``. Each network is an object of ``torch_utils.persistence``: the source code
of its class, and the attributes of a module, of which :mod:`dinogen.formats.pickles` reads the
latter alone.

Their networks and ours compute the same, with these differences of layout:

- Weights of the generator's upsampling convolutions are those of a convolution, ours those of a
  correlation, so they are flipped along both axes.
- A layer's ``noise_strength`` is a scalar there, and has one element here.
- ``w_avg`` belongs to their mapping network, and to our generator.
- ADA's p is a buffer of their ``augment_pipe``, and of our discriminator.
- D's groups of the minibatch standard deviation are every n-th sample there, and neighbours here:
  the logits of a batch larger than a group depend on the order of its samples.

What our options cannot express is refused by name, see :func:`read`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dinogen.formats.pickles import Record, read_pickle
from dinogen.formats.runs import FormatError, Weights

FAMILY = "stylegan2_ada"
CLAMP = 256.0
LR_MULTIPLIER = 0.01
NUM_D_MAPPING_LAYERS = 8
_BLOCK = re.compile(r"b([1-9][0-9]{0,4})")
_SNAPSHOT = re.compile(r"network-snapshot-([0-9]{1,9})")
# of our options, the attributes of their augment_pipe that it stands for
_STRENGTHS = {
    "ada_blit": ("xflip", "rotate90", "xint"),
    "ada_geometry": ("scale", "rotate", "aniso", "xfrac"),
    "ada_color": ("brightness", "contrast", "lumaflip", "hue", "saturation"),
    "ada_filter": ("imgfilter",),
    "ada_corruption": ("noise", "cutout"),
}

State = dict[str, Tensor]


def read(path: Path) -> Weights:
    """Read a pickle of NVlabs' StyleGAN2; nothing in it is run.

    G is taken from ``G_ema`` where a file has the average alone, and D is initialised where there
    is none; the notes say so.

    Raises:
        PickleError: it is no pickle, or asks for what no pickle of these networks needs.
        FormatError: it holds other networks, or something that family ``stylegan2_ada`` does not
            have: other architectures than ``skip`` of G and ``resnet`` of D (the authors' ``cifar``
            has ``orig``), other filters, activations, clamps, or channels of another pattern.
    """
    data = read_pickle(path)
    if not isinstance(data, dict) or not isinstance(data.get("G_ema"), Record):
        raise FormatError(
            f"{path}: holds no network G_ema: give a pickle of stylegan2-ada-pytorch or stylegan3"
        )
    modules = {
        name: _Module(path, name, data[name])
        for name in ("G_ema", "G", "D")
        if isinstance(data.get(name), Record)
    }
    read_as = {"G_ema": _generator, "G": _generator, "D": _discriminator}
    states = {name: read_as[name](module) for name, module in modules.items()}
    average, shape = states["G_ema"]
    for name, (_, own) in states.items():
        own.compare(shape, f"{path}: {name}")
    notes = []
    if "G" not in states:
        notes.append("it holds no G: training starts from the average, G_ema")
    networks = {"G": states.get("G", states["G_ema"])[0]}
    options = shape.options
    if "D" in states:
        networks["D"], shape_of_d = states["D"]
        options["group_size"] = shape_of_d.group_size
        networks["D"]["ada.p"], strengths = _augmentation(path, data.get("augment_pipe"), notes)
        options |= strengths
    # where networks differ, more of them stays in float32
    options["num_half"] = min(own.num_half for _, own in states.values())
    if any(own.clamp is None for _, own in states.values()):
        notes.append(f"its networks do not clamp activations; ours do, at {CLAMP:.0f}")
    found = _SNAPSHOT.search(path.stem)
    if found is None:
        notes.append("its name does not say how many images it was trained with: taken as 0")
    return Weights(
        source=path,
        kind="stylegan2",
        family={"name": FAMILY, **options},
        resolution=shape.resolution,
        networks=networks,
        averages={"G": average},
        nimg=int(found[1]) * 1000 if found else 0,
        facts={"nimg_known": found is not None, "networks": sorted(states)},
        notes=tuple(notes),
    )


@dataclass(frozen=True)
class _Shape:
    """What a network is built with.

    Attributes:
        resolution: side of the images.
        channels: by resolution.
        num_classes: 0 without labels.
        num_half: number of the largest resolutions that may compute in half precision.
        clamp: of activations; None for none.
        sizes: of the generator's mapping network, as keys of our options.
        group_size: of the discriminator's minibatch standard deviation.
    """

    resolution: int
    channels: dict[int, int]
    num_classes: int
    num_half: int
    clamp: float | None
    sizes: dict[str, int]
    group_size: int = 0

    @property
    def options(self) -> dict[str, Any]:
        """Keys of ``family:``."""
        base, most = _channel_rule(self.channels)
        rule = {"channel_base": base, "channel_max": most}
        return {"num_classes": self.num_classes, **self.sizes, **rule}

    def compare(self, other: _Shape, title: str) -> None:
        """Refuse networks that one config cannot build.

        Raises:
            FormatError: naming what differs.
        """
        for name in ("resolution", "channels", "num_classes"):
            if getattr(self, name) != getattr(other, name):
                raise FormatError(
                    f"{title} has {name} {getattr(self, name)} and G_ema {getattr(other, name)}: "
                    f"family {FAMILY} has the same for all networks"
                )


class _Module:
    """A module in a pickle: its attributes, tensors and children, asked for by name.

    Args:
        path: of the file, for messages.
        title: where in the file it is, such as ``G.synthesis.b8``.
        record: as the pickle has it.
    """

    def __init__(self, path: Path, title: str, record: Record) -> None:
        self.path, self.title = path, title
        if not isinstance(record.state, dict):
            raise FormatError(f"{path}: {title} has no state")
        self._state = record.state

    def fail(self, text: str) -> FormatError:
        """An error about this module."""
        return FormatError(f"{self.path}: {self.title} {text}")

    def _part(self, name: str) -> dict[str, Any]:
        part = self._state.get(name)
        return part if isinstance(part, dict) else {}

    @property
    def children(self) -> list[str]:
        """Names of the modules in it."""
        return [str(name) for name in self._part("_modules")]

    def child(self, name: str) -> _Module:
        """A module in it."""
        record = self._part("_modules").get(name)
        if not isinstance(record, Record):
            raise self.fail(f"has no module {name}: it is no StyleGAN2 of these authors")
        return _Module(self.path, f"{self.title}.{name}", record)

    def tensor(self, name: str, *shape: int) -> Tensor:
        """A parameter or buffer as float32, of the given shape, in which -1 stands for any size."""
        for part in (self._part("_parameters"), self._part("_buffers")):
            value = part.get(name)
            if isinstance(value, Tensor):
                fits = [b in (-1, a) for a, b in zip(value.shape, shape, strict=False)]
                if value.dim() != len(shape) or not all(fits) or not value.is_floating_point():
                    raise self.fail(f"has {name} of shape {tuple(value.shape)}, not {shape}")
                return value.float()
        raise self.fail(f"has no tensor {name}: it is no StyleGAN2 of these authors")

    def number(self, name: str) -> int:
        """An attribute that is a whole number."""
        value = self._state.get(name)
        if not isinstance(value, int) or isinstance(value, bool):
            raise self.fail(f"has no number {name}: it is no StyleGAN2 of these authors")
        return value

    def expect(self, name: str, wanted: Any) -> None:
        """Refuse another value of an attribute than the one that our networks have.

        Raises:
            FormatError: naming both.
        """
        value = self._state.get(name)
        if isinstance(value, (int, float)) and isinstance(wanted, (int, float)):
            same = abs(value - wanted) < 1e-6
        else:
            same = isinstance(value, str) and value == wanted
        if not same:
            plain = isinstance(value, (int, float, str, type(None)))
            shown = str(value)[:40] if plain else f"of type {type(value).__name__}"
            raise self.fail(f"has {name} {shown}: family {FAMILY} has {wanted} alone")

    def factor(self, name: str) -> float | None:
        """An attribute that is a number, None if there is none."""
        value = self._state.get(name)
        return float(value) if isinstance(value, (int, float)) else None

    def flag(self, name: str) -> bool:
        """An attribute that is true or false; false if there is none."""
        return self._state.get(name) is True

    def clamp(self) -> float | None:
        """``conv_clamp``, which is ours or None.

        Raises:
            FormatError: another one.
        """
        if self._state.get("conv_clamp") is None:
            return None
        self.expect("conv_clamp", CLAMP)
        return CLAMP

    def check_filter(self) -> None:
        """Refuse another filter of up- and downsampling than [1, 3, 3, 1].

        Raises:
            FormatError: it is another.
        """
        taps = torch.tensor([1.0, 3.0, 3.0, 1.0]) / 8
        found = self.tensor("resample_filter", 4, 4)
        if not torch.allclose(found, torch.outer(taps, taps), atol=1e-6):
            raise self.fail(f"has another resample_filter: family {FAMILY} has [1, 3, 3, 1] alone")


# ---- networks ------------------------------------------------------------------------------------


def _generator(module: _Module) -> tuple[State, _Shape]:
    mapping, synthesis = module.child("mapping"), module.child("synthesis")
    blocks = _blocks(synthesis)
    num_layers, num_classes = mapping.number("num_layers"), mapping.number("c_dim")
    z_dim, w_dim = mapping.number("z_dim"), mapping.number("w_dim")
    state = _mapping(mapping, "mapping", num_layers, num_classes)
    state["w_avg"] = mapping.tensor("w_avg", -1)
    # the authors keep it in the loss, which is not in the file, and let it start at 0
    state["path_mean"] = torch.zeros(())
    channels, clamps, num_half = {}, [], 0
    for size, block in blocks.items():
        if size < max(blocks):
            block.expect("architecture", "skip")
        place = f"synthesis.blocks.{size}"
        if size == 4:
            state[f"{place}.const"] = block.tensor("const", -1, 4, 4)
        else:
            block.check_filter()
        layers = ["conv1"] if size == 4 else ["conv0", "conv1"]
        for number, name in enumerate(layers):
            layer = block.child(name)
            _synthesis_layer(state, layer, f"{place}.layers.{number}", size, up=name == "conv0")
            clamps.append(layer.clamp())
        to_rgb = block.child("torgb")
        state |= _dense(to_rgb.child("affine"), f"{place}.to_rgb.affine", "linear")
        state[f"{place}.to_rgb.weight"] = to_rgb.tensor("weight", 3, -1, 1, 1)
        state[f"{place}.rgb_bias"] = to_rgb.tensor("bias", 3)
        channels[size] = state[f"{place}.to_rgb.weight"].shape[1]
        num_half += block.flag("use_fp16")
    sizes = {"z_dim": z_dim, "w_dim": w_dim, "num_mapping_layers": num_layers}
    clamp = None if None in clamps else CLAMP
    return state, _Shape(max(blocks), channels, num_classes, num_half, clamp, sizes)


def _synthesis_layer(state: State, layer: _Module, place: str, size: int, up: bool) -> None:
    """A modulated convolution with noise; its tensors are added to ``state``."""
    layer.expect("activation", "lrelu")
    if not layer.flag("use_noise"):
        raise layer.fail(f"has no noise input: family {FAMILY} has one in every layer")
    weight = layer.tensor("weight", -1, -1, 3, 3)
    if up:
        layer.check_filter()
        weight = weight.flip(2, 3)
    state[f"{place}.conv.weight"] = weight
    state |= _dense(layer.child("affine"), f"{place}.conv.affine", "linear")
    state[f"{place}.bias"] = layer.tensor("bias", -1)
    state[f"{place}.noise"] = layer.tensor("noise_const", size, size)
    state[f"{place}.noise_strength"] = layer.tensor("noise_strength").reshape(1)


def _discriminator(module: _Module) -> tuple[State, _Shape]:
    blocks = _blocks(module)
    last = blocks.pop(4)
    if not blocks:
        raise module.fail("has no block of 8x8 or more")
    channels, clamps, num_half = {}, [], 0
    state: State = {}
    largest = max(blocks)
    for number, (size, block) in enumerate(sorted(blocks.items(), reverse=True)):
        block.expect("architecture", "resnet")
        place = f"blocks.{number}"
        parts = {f"{place}.{name}": name for name in ("conv0", "conv1", "skip")}
        if size == largest:
            parts["from_rgb"] = "fromrgb"
        for to, name in parts.items():
            layer = block.child(name)
            kernel = 3 if name.startswith("conv") else 1
            state[f"{to}.weight"] = layer.tensor("weight", -1, -1, kernel, kernel)
            if name in ("conv1", "skip"):
                layer.check_filter()
            if name != "skip":
                layer.expect("activation", "lrelu")
                state[f"{to}.bias"] = layer.tensor("bias", -1)
                clamps.append(layer.clamp())
        channels[size] = state[f"{place}.conv0.weight"].shape[1]
        num_half += block.flag("use_fp16")
    channels[4], group_size = _epilogue(state, last, clamps)
    num_classes = module.number("c_dim")
    if num_classes:
        mapping = module.child("mapping")
        mapping.expect("num_layers", NUM_D_MAPPING_LAYERS)
        state |= _mapping(mapping, "label", NUM_D_MAPPING_LAYERS, num_classes)
    clamp = None if None in clamps else CLAMP
    return state, _Shape(largest, channels, num_classes, num_half, clamp, {}, group_size)


def _epilogue(state: State, last: _Module, clamps: list[float | None]) -> tuple[int, int]:
    """The end of the discriminator at 4x4: channels there, and samples per group."""
    std, conv = last.child("mbstd"), last.child("conv")
    std.expect("num_channels", 1)
    conv.expect("activation", "lrelu")
    clamps.append(conv.clamp())
    state["conv.weight"] = conv.tensor("weight", -1, -1, 3, 3)
    state["conv.bias"] = conv.tensor("bias", -1)
    state |= _dense(last.child("fc"), "dense", "lrelu")
    state |= _dense(last.child("out"), "logit", "linear")
    state["ada.p"] = torch.zeros(())
    state["ada.sign_sum"] = torch.zeros(())
    state["ada.num_steps"] = torch.zeros((), dtype=torch.int64)
    return state["conv.weight"].shape[0], std.number("group_size")


def _mapping(module: _Module, place: str, num_layers: int, num_classes: int) -> State:
    if not 1 <= num_layers <= len(module.children):
        raise module.fail(f"has {len(module.children)} modules for {num_layers} layers")
    state: State = {}
    if num_classes:
        state |= _dense(module.child("embed"), f"{place}.embed", "linear")
    for number in range(num_layers):
        layer = module.child(f"fc{number}")
        state |= _dense(layer, f"{place}.layers.{number}", "lrelu", LR_MULTIPLIER)
    return state


def _dense(module: _Module, place: str, activation: str, lr_multiplier: float = 1.0) -> State:
    module.expect("activation", activation)
    module.expect("bias_gain", lr_multiplier)
    return {
        f"{place}.weight": module.tensor("weight", -1, -1),
        f"{place}.bias": module.tensor("bias", -1),
    }


def _blocks(module: _Module) -> dict[int, _Module]:
    """The blocks by resolution, 4 first.

    Raises:
        FormatError: they are not those of StyleGAN2.
    """
    names = (_BLOCK.fullmatch(name) for name in module.children)
    sizes = sorted(int(name[1]) for name in names if name)
    if not sizes or sizes != [4 << i for i in range(len(sizes))]:
        raise module.fail(
            "has no blocks b4, b8, ...: it is no StyleGAN2; StyleGAN3 and others cannot be imported"
        )
    return {size: module.child(f"b{size}") for size in sizes}


def _channel_rule(channels: dict[int, int]) -> tuple[int, int]:
    """``channel_base`` and ``channel_max`` that give these channels by resolution.

    Raises:
        FormatError: no such rule gives them.
    """
    most = channels[4]
    below = {size: num for size, num in channels.items() if num < most}
    base = max(
        [num * size for size, num in below.items()]
        + [num * size for size, num in channels.items() if num == most]
    )
    if any(min(most, base // size) != num for size, num in channels.items()):
        listed = ", ".join(f"{num} at {size}" for size, num in channels.items())
        raise FormatError(
            f"its channels ({listed}) do not halve as the resolution doubles: family {FAMILY} has "
            "channel_base / R at R, and at most channel_max"
        )
    return base, most


def _augmentation(path: Path, record: Any, notes: list[str]) -> tuple[Tensor, dict[str, float]]:
    """ADA's p, and the strengths of its parts as keys of our options; adds to the notes."""
    if not isinstance(record, Record):
        return torch.zeros(()), {}
    module = _Module(path, "augment_pipe", record)
    p = module.tensor("p").clamp(0, 1)
    strengths: dict[str, float] = {}
    for key, names in _STRENGTHS.items():
        given = {module.factor(name) for name in names}
        (factor,) = given if len(given) == 1 else (None,)
        if factor is not None:
            strengths[key] = factor
        else:
            notes.append(
                f"augment_pipe has no common factor of {', '.join(names)}: {key} keeps its default"
            )
    return p, strengths
