"""What the guides that are vision transformers share: patch tokens of frozen blocks, as maps.

A guide of this kind says which networks of transformers it reads and where they keep their blocks;
see ``siglip.py`` for a short one.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dinogen._torchvision import ensure_torchvision
from dinogen.config import GuideConfig
from dinogen.features.base import GuideError, GuideInfo
from dinogen.features.checkpoint import (
    GUIDE,
    Wanted,
    checkpoint_folder,
    damage_as_guide_error,
    hash_folder,
    quiet_transformers,
    read_model,
)

RANDOM_KEY = "dinogen_random_weights"
PREPROCESSOR = "preprocessor_config.json"
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
IMAGENET = (IMAGENET_MEAN, IMAGENET_STD)

Normalisation = tuple[Sequence[float], Sequence[float]]
"""Mean and standard deviation per channel, of RGB in [0, 1]."""

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Kind:
    """Which checkpoints a guide reads, and what errors say about them.

    Attributes:
        name: of the guide, in a config.
        title: of its networks, in words.
        example: a hub name.
        networks: the class in transformers for each ``model_type`` of config.json.
        arguments: of these classes.
        usual: how images are normalized if the checkpoint does not say it.
        fixed: images are always normalized so, also if the checkpoint says another way.
    """

    name: str
    title: str
    example: str
    networks: Mapping[str, str]
    arguments: Mapping[str, Any] = field(default_factory=dict)
    usual: Normalisation = IMAGENET
    fixed: bool = False

    @property
    def wanted(self) -> Wanted:
        """What is downloaded."""
        return Wanted(GUIDE.key, self.example, (*GUIDE.files, PREPROCESSOR))


class TransformerGuide(nn.Module):
    """Patch tokens after the final layer norm, as a map; CLS, registers and the like are dropped.

    With several blocks, their maps are concatenated along the channels, each after that norm.
    Computes in the dtype of the model's weights, regardless of autocast, and returns float32.
    Always in eval mode. A subclass says which networks it takes and where they keep their parts.

    Args:
        model: the network, in float32 or bfloat16.
        info: its identity.
        blocks: whose tokens are concatenated, counted from 1.
        patch_size: pixels.
        normalisation: what the network expects.
    """

    kind: ClassVar[Kind]
    scale: Tensor
    shift: Tensor

    def __init__(
        self,
        model: nn.Module,
        info: GuideInfo,
        blocks: Sequence[int],
        patch_size: int,
        normalisation: Normalisation,
    ) -> None:
        super().__init__()
        self.model: Any = model.eval().requires_grad_(False)
        self.info = info
        self.blocks = tuple(blocks)
        self.patch_size = patch_size
        self.training = False
        self.dtype: torch.dtype = next(model.parameters()).dtype
        mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in normalisation)
        self.register_buffer("scale", 0.5 / std, persistent=False)
        self.register_buffer("shift", (0.5 - mean) / std, persistent=False)

    @staticmethod
    def parts(model: Any) -> tuple[nn.ModuleList, nn.Module]:
        """Blocks and final norm of a network."""
        raise NotImplementedError

    @classmethod
    def prepare(cls, model: Any) -> None:
        """Make a network in float32 compute its patch tokens in fewer steps."""
        blocks, _ = cls.parts(model)
        fuse(blocks)

    @staticmethod
    def widths(config: Any) -> list[int]:
        """C of each block, from the network's config."""
        return [int(config.hidden_size)] * int(config.num_hidden_layers)

    @staticmethod
    def pixels_per_location(config: Any, blocks: Sequence[int]) -> int | Sequence[int]:
        """Side of what a location of the map sees of its own, or height and width."""
        side: int | Sequence[int] = config.patch_size
        return side

    def embed(self, pixels: Tensor) -> tuple[Tensor, dict[str, Any]]:
        """Tokens that the first block reads, and further arguments of all blocks.

        Args:
            pixels: (B, 3, S, S) normalized.

        Returns:
            (B, T, C), those of the patches last, row by row.
        """
        raise NotImplementedError

    def train(self, mode: bool = True) -> TransformerGuide:
        """Does nothing: a guide is frozen in eval mode."""
        return self

    def input_size(self, grid: int) -> int:
        """Side in pixels of the image whose feature map is exactly grid x grid."""
        return self.patch_size * grid

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, S, S) RGB in [-1, 1], S a multiple of the patch -> (B, C, S/patch, S/patch).

        Raises:
            ValueError: another shape.
        """
        height, width = images.shape[-2:]
        if height != width or height % self.patch_size:
            raise ValueError(
                f"{self.kind.title} needs square images of a multiple of {self.patch_size} pixels, "
                f"not {height}x{width}"
            )
        pixels = images.float() * self.scale + self.shift
        grid = height // self.patch_size
        with torch.autocast(images.device.type, enabled=False):
            hidden = self.tokens(pixels.to(self.dtype))
        patches = hidden[:, -grid * grid :].float().transpose(1, 2)
        return patches.reshape(len(images), -1, grid, grid)

    def tokens(self, pixels: Tensor) -> Tensor:
        """(B, 3, S, S) normalized -> (B, T, C of all chosen blocks), those of the patches last."""
        hidden, arguments = self.embed(pixels)
        blocks, norm = self.parts(self.model)
        found: dict[int, Tensor] = {}
        for number, block in enumerate(blocks, start=1):
            hidden = block(hidden, **arguments)
            if number in self.blocks:
                found[number] = norm(hidden)
        chosen = [found[number] for number in self.blocks]
        return chosen[0] if len(chosen) == 1 else torch.cat(chosen, 2)


GuideT = TypeVar("GuideT", bound=TransformerGuide)


def load_transformer(
    guide: type[GuideT], config: GuideConfig, device: torch.device, dtype: torch.dtype
) -> GuideT:
    """Load a guide by hub name or from a local checkpoint folder; safetensors only.

    Args:
        guide: its class.
        config: ``path`` and ``revision`` of the checkpoint; ``layer`` counts blocks: 1 is the
            output of the first block, -1 of the last; several are concatenated. The final layer
            norm is applied to every layer.
        device: where it will run.
        dtype: of its weights.

    Raises:
        GuideError: the weights are missing, damaged or incomplete, or belong to another network;
            or there is no such layer.
    """
    kind = guide.kind
    found = read_checkpoint(config, kind)
    if kind.fixed:
        normalisation = kind.usual
        with damage_as_guide_error(GUIDE.key, config.path):
            weights = hash_folder(found.folder, "*.safetensors")
    else:
        normalisation = read_normalisation(found.folder, config, kind.usual)
        weights = hash_with_normalisation(found.folder, config, normalisation)
    model = found.model
    widths = guide.widths(model.config)
    numbers = resolve_layers(len(widths), layers_of(config))
    blocks, _ = guide.parts(model)
    del blocks[max(numbers) :]
    guide.prepare(model)
    channels = [widths[number - 1] for number in numbers]
    info = describe(config, kind.name, found, weights, numbers, channels)
    side = _square(guide.pixels_per_location(model.config, numbers), config)
    return guide(model.to(dtype), info, numbers, side, normalisation).to(device)


def transformer_channels(guide: type[TransformerGuide], config: GuideConfig) -> tuple[int, ...]:
    """C of each block that a config names, from config.json alone.

    Raises:
        GuideError: there is no such checkpoint or block, or it belongs to another network.
    """
    widths = guide.widths(read_config(config, guide.kind))
    return tuple(widths[number - 1] for number in resolve_layers(len(widths), layers_of(config)))


class _Attention(nn.Module):
    """Attention of a frozen block, with one product for queries, keys and values.

    Args:
        attention: that of transformers, which has a product for each.
    """

    def __init__(self, attention: Any) -> None:
        super().__init__()
        parts = [attention.q_proj, attention.k_proj, attention.v_proj]
        own = vars(attention)
        self.num_heads: int = own.get("num_attention_heads") or attention.num_heads
        self.scaling: float = own.get("scaling") or attention.scale
        self.widths: list[int] = [part.out_features for part in parts]
        has_bias = any(part.bias is not None for part in parts)
        self.qkv = nn.Linear(parts[0].in_features, sum(self.widths), has_bias)
        self.o_proj: nn.Linear = getattr(attention, "o_proj", None) or attention.out_proj
        with torch.no_grad():
            self.qkv.weight.copy_(torch.cat([part.weight for part in parts]))
            if has_bias:
                biases = [
                    torch.zeros(part.out_features) if part.bias is None else part.bias
                    for part in parts  # DINOv3 has none for keys
                ]
                self.qkv.bias.copy_(torch.cat(biases))

    def forward(
        self,
        hidden_states: Tensor,
        *_: Any,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        **__: Any,
    ) -> tuple[Tensor, None]:
        """(B, T, C) -> (B, T, C) and no weights, as transformers calls it.

        Args:
            hidden_states: the tokens.
            position_embeddings: cosine and sine, (T, C / heads), that rotate queries and keys.
        """
        q, k, v = (
            part.unflatten(2, (self.num_heads, -1)).transpose(1, 2)
            for part in self.qkv(hidden_states).split(self.widths, 2)
        )
        if position_embeddings is not None:
            q, k = (_rotated(part, *position_embeddings) for part in (q, k))
        found = F.scaled_dot_product_attention(q, k, v, scale=self.scaling)
        projected: Tensor = self.o_proj(found.transpose(1, 2).flatten(2))
        return projected, None


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Su et al. 2021, "RoFormer", with the two halves of a head's channels as the coordinates."""
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat((-second, first), -1) * sin


@torch.no_grad()
def fuse(blocks: Iterable[Any]) -> None:
    """Make frozen blocks of transformers compute the same in fewer steps.

    Queries, keys and values come from one product, and the scales of a block's two branches, where
    it has them, are part of the weights before them. To be called while the weights are float32.
    """
    for block in blocks:
        name = "attention" if hasattr(block, "attention") else "self_attn"
        attention = _Attention(getattr(block, name))
        setattr(block, name, attention)
        if not hasattr(block, "layer_scale1"):
            continue
        last = block.mlp.fc2 if hasattr(block.mlp, "fc2") else block.mlp.down_proj
        for linear, scale in ((attention.o_proj, block.layer_scale1), (last, block.layer_scale2)):
            linear.weight.mul_(scale.lambda1[:, None])
            if linear.bias is not None:
                linear.bias.mul_(scale.lambda1)
        block.layer_scale1, block.layer_scale2 = nn.Identity(), nn.Identity()


@dataclass(frozen=True)
class Checkpoint:
    """A network as it was read.

    Attributes:
        model: of transformers, in float32 on the CPU.
        folder: where it came from.
        revision: hub commit, or None for local files.
        random: its config says that the weights are random.
    """

    model: Any
    folder: Path
    revision: str | None
    random: bool


def read_checkpoint(config: GuideConfig, kind: Kind) -> Checkpoint:
    """The network that a config names; of one with a tower for text, the tower for images.

    Raises:
        GuideError: the weights are missing, damaged or incomplete, or belong to another network.
    """
    folder, revision = checkpoint_folder(config.path, config.revision, kind.wanted)
    ensure_torchvision()
    import transformers

    with damage_as_guide_error(GUIDE.key, config.path):
        whole = _read_config(folder, config.path, kind)
        model_config = getattr(whole, "vision_config", whole)
        network = getattr(transformers, kind.networks[whole.model_type])
        model = read_model(network, folder, model_config, GUIDE.key, config.path, **kind.arguments)
    return Checkpoint(model, folder, revision, bool(getattr(whole, RANDOM_KEY, False)))


def read_config(config: GuideConfig, kind: Kind) -> Any:
    """config.json of the checkpoint that a config names, as an object of transformers.

    Raises:
        GuideError: there is no such checkpoint, it is damaged, or it belongs to another network.
    """
    folder, _ = checkpoint_folder(config.path, config.revision, kind.wanted)
    with damage_as_guide_error(GUIDE.key, config.path):
        whole = _read_config(folder, config.path, kind)
        return getattr(whole, "vision_config", whole)


def layers_of(config: GuideConfig) -> tuple[int | str, ...]:
    """The layers that a config names, as a list also where it is one."""
    return config.layer if isinstance(config.layer, tuple) else (config.layer,)


def resolve_layers(num_blocks: int, layers: Sequence[int | str]) -> list[int]:
    """The numbers of blocks from the front, counted from 1.

    Args:
        num_blocks: of the network.
        layers: as a config names them: counted from 1, or from the end with -1 for the last.

    Raises:
        GuideError: there is no such block, or one is named twice.
    """
    resolved = []
    for layer in layers:
        number = layer if isinstance(layer, int) else 0
        number = number if number >= 0 else num_blocks + 1 + number
        if not 1 <= number <= num_blocks:
            raise GuideError(
                f"guide.layer: {layer} is not one of the network's {num_blocks} blocks: "
                f"use 1 to {num_blocks}, or -1 for the last"
            )
        resolved.append(number)
    if len(set(resolved)) < len(resolved):
        raise GuideError(f"guide.layer: {list(layers)}: -1 is block {num_blocks}: list it once")
    return resolved


def describe(
    config: GuideConfig,
    name: str,
    found: Checkpoint,
    weights: str,
    layers: Sequence[int],
    channels: Sequence[int],
) -> GuideInfo:
    """The identity of a guide; warns if its weights are random.

    Args:
        config: that names it.
        name: the guide's.
        found: the network.
        weights: their hash.
        layers: counted from the front.
        channels: C of each.
    """
    if found.random:
        _logger.warning(
            "RANDOM GUIDE: %s has seeded random weights; its features are only good for a trial",
            config.path,
        )
    return GuideInfo(
        name=name,
        path=config.path,
        revision=found.revision,
        weights_sha256=weights,
        num_channels=sum(channels),
        layer=list(layers) if len(layers) > 1 else layers[0],
        random=found.random,
    )


def read_normalisation(folder: Path, config: GuideConfig, usual: Normalisation) -> Normalisation:
    """Mean and standard deviation that a checkpoint's ``preprocessor_config.json`` gives.

    Args:
        folder: of the checkpoint.
        config: that names it.
        usual: taken, with a warning, if the folder lacks the file.

    Raises:
        GuideError: the file is damaged.
    """
    file = folder / PREPROCESSOR
    if not file.is_file():
        _logger.warning(
            "guide.path: %s lacks %s: its images are normalized as usual for this guide, by mean "
            "%s and standard deviation %s; copy the file there if the network's own differ",
            config.path,
            PREPROCESSOR,
            list(usual[0]),
            list(usual[1]),
        )
        return usual
    with damage_as_guide_error(GUIDE.key, config.path):
        settings = json.loads(file.read_text(encoding="utf-8"))
        if settings.get("do_normalize") is False:
            return [0.0] * 3, [1.0] * 3
        mean, std = (
            [float(value) for value in settings[name]] for name in ("image_mean", "image_std")
        )
        if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
            raise ValueError(f"{PREPROCESSOR}: image_mean {mean}, image_std {std}")
    return mean, std


def hash_with_normalisation(
    folder: Path, config: GuideConfig, normalisation: Normalisation, pattern: str = "*.safetensors"
) -> str:
    """Hash of the weights as stored on disk, and of what images are normalized by.

    Both together make the features; the normalisation is in a file that may be lost or edited.

    Raises:
        GuideError: the weights are damaged.
    """
    mean, std = (torch.tensor(values, dtype=torch.float32) for values in normalisation)
    with damage_as_guide_error(GUIDE.key, config.path):
        return hash_folder(folder, pattern, {"image_mean": mean, "image_std": std})


def write_random(folder: Path, seed: int, build: Callable[[Any], Any]) -> None:
    """Write a checkpoint folder with seeded random weights, whole or not at all.

    Args:
        folder: must not exist yet.
        seed: of the weights.
        build: makes the network of the module ``transformers``; its config has
            :data:`RANDOM_KEY`, so that loading it logs a warning.

    Raises:
        GuideError: the folder exists.
    """
    ensure_torchvision()
    import transformers

    if folder.exists():
        raise GuideError(f"{folder} exists: remove it, or write the random guide elsewhere")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build(transformers)
    partial = folder.with_name(f".{folder.name}.partial")
    with quiet_transformers():
        model.save_pretrained(partial)
    for file in partial.iterdir():
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
    partial.rename(folder)


def _read_config(folder: Path, path: str, kind: Kind) -> Any:
    ensure_torchvision()
    import transformers

    with quiet_transformers():
        config: Any = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    if config.model_type not in kind.networks:
        raise GuideError(
            f"guide.path: {path} holds a {config.model_type!r} network: give a {kind.title} "
            f"checkpoint, such as {kind.example}"
        )
    return config


def _square(side: int | Sequence[int], config: GuideConfig) -> int:
    sides = {side} if isinstance(side, int) else set(side)
    if len(sides) > 1:
        raise GuideError(
            f"guide.path: {config.path} cuts images into patches of {side} pixels: give a network "
            "of square ones"
        )
    return sides.pop()
