"""The Guide protocol: a frozen feature network that is differentiable to its input pixels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from dinogen.config import GuideConfig
from dinogen.errors import UserError

# Guides that agree in these give the same features. Not the path: weights may be copied.
_IDENTITY = ("name", "weights_sha256", "layer")


class GuideError(UserError):
    """A guide cannot be loaded; the message names ``guide.path`` and the remedy."""


@dataclass(frozen=True)
class GuideInfo:
    """The identity of a guide; stored in manifests and results.

    Attributes:
        name: ``dinov2``, ``inception``, ...
        path: hub name or local path that it was loaded from.
        revision: hub commit, or None for local files.
        weights_sha256: hash of the weights, so that two guides are never confused.
        num_channels: C of its feature maps.
        layer: which layer the features are taken from, or a list of those that are concatenated;
            JSON values, in a normal form.
        random: True if the weights are random; then every result says so.
    """

    name: str
    path: str
    revision: str | None
    weights_sha256: str
    num_channels: int
    layer: int | str | list[int] | list[str]
    random: bool

    @property
    def label(self) -> str:
        """Short text for pages and logs; it shows clearly when the weights are random."""
        if self.random:
            return f"RANDOM guide ({self.name})"
        # A folder's own name is enough, and a whole path does not fit above a curve.
        local = self.path.startswith(("/", "."))
        return f"{self.name} ({Path(self.path).name if local else self.path})"

    def to_dict(self) -> dict[str, Any]:
        """As a JSON-ready mapping."""
        return asdict(self)

    @classmethod
    def of(cls, described: Mapping[str, Any]) -> GuideInfo:
        """From :meth:`to_dict`; what it says besides, as autoencoders do, is left out."""
        return cls(**{one.name: described[one.name] for one in fields(cls)})


@runtime_checkable
class Guide(Protocol):
    """Frozen, in eval mode, differentiable to the pixels. Every encoder implements this."""

    info: GuideInfo

    def input_size(self, grid: int) -> int:
        """Side in pixels of the image whose feature map is exactly grid x grid."""
        ...

    def __call__(self, images: Tensor) -> Tensor:
        """Feature map of images.

        Args:
            images: (B, 3, S, S), RGB in [-1, 1], S = ``input_size(grid)``.

        Returns:
            (B, C, grid, grid).
        """
        ...


def same_guide(made_by: Mapping[str, Any], info: GuideInfo) -> bool:
    """Whether a guide gives the same features as another one, wherever both were loaded from.

    Args:
        made_by: the other one, from ``GuideInfo.to_dict`` in a manifest or a part.
        info: the loaded guide; its ``layer`` is counted from the front, as loading resolves it.
    """
    return guide_identity(made_by) == guide_identity(info.to_dict())


def guide_identity(described: Mapping[str, Any]) -> tuple[Any, ...]:
    """The part of ``GuideInfo.to_dict`` that is equal for guides that give the same features."""
    return tuple(described.get(name) for name in _IDENTITY)


def named_layers(config: GuideConfig, known: Sequence[str], last: str, title: str) -> list[str]:
    """The layers that a config names, of a guide whose layers have names.

    Args:
        config: of the guide.
        known: names of its layers.
        last: which of them -1 is.
        title: of the guide, for the error.

    Raises:
        GuideError: there is no such layer.
    """
    requested = config.layer if isinstance(config.layer, tuple) else (config.layer,)
    layers = [last if layer == -1 else str(layer) for layer in requested]
    if wrong := [layer for layer in layers if layer not in known]:
        raise GuideError(
            f"guide.layer: {wrong[0]}: the {title} guide has the layers {', '.join(known)}; "
            "-1 is the last"
        )
    return layers


def guide_dtype(device: torch.device) -> torch.dtype:
    """The dtype of a guide's weights on a device: bfloat16 on GPUs that support it.

    Stored in this dtype rather than cast by autocast, which casts frozen weights again in every
    forward. On CPUs bfloat16 is slower than float32.
    """
    if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.bfloat16
    return torch.float32
