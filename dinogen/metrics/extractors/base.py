"""The FeatureExtractor protocol: a frozen network that turns uint8 images of any size into rows."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinogen.errors import UserError

Network = TypeVar("Network", bound=nn.Module)


class NotAvailable(UserError):
    """Weights of an extractor are missing; the message names the key and how to get them."""


@dataclass(frozen=True)
class ExtractorInfo:
    """What identifies a feature extractor: two with the same info give the same features.

    Attributes:
        name: such as ``inception``, ``inception768``, ``dinov2``.
        weights_sha256: hash of the weights.
        resize: how images are resized for it, such as ``bilinear antialias 299``.
        num_channels: C of its features.
        num_logits: of its classes; 0 if it has none.
        random: True if the weights are random; then every metric value says so.
    """

    name: str
    weights_sha256: str
    resize: str
    num_channels: int
    num_logits: int
    random: bool

    def to_dict(self) -> dict[str, Any]:
        """As a JSON-ready mapping."""
        return asdict(self)


@runtime_checkable
class FeatureExtractor(Protocol):
    """Frozen, float32, the same rows for the same images."""

    info: ExtractorInfo

    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        """Rows of images.

        Args:
            images: (N, 3, R, R) uint8 RGB, any side, on any device.

        Returns:
            float32 on the CPU: ``features`` (N, num_channels), and ``logits`` (N, num_logits)
            where it has them.
        """
        ...


@contextmanager
def exactly(device: torch.device) -> Iterator[None]:
    """Inside it nothing is trained and float32 is float32: no autocast, no TF32."""
    with (
        torch.no_grad(),
        torch.autocast(device.type, enabled=False),
        torch.backends.cudnn.flags(  # type: ignore[no-untyped-call]
            enabled=True, benchmark=False, deterministic=True, allow_tf32=False
        ),
    ):
        yield


def placed(network: Network, device: torch.device) -> Network:
    """A convolutional network on its device, in the layout that the device computes fast in."""
    network.to(device)
    if device.type == "cpu":
        # InceptionV3 takes half to two thirds of the time; rows differ in the last digit
        network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return network


def resized(images: Tensor, side: int, mode: str, device: torch.device) -> Tensor:
    """(N, 3, R, R) uint8 -> (N, 3, side, side) float32 in [0, 255], with antialias.

    Raises:
        ValueError: another shape or type.
    """
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(
            f"feature extractors take (N, 3, R, R) uint8, not {images.dtype} {tuple(images.shape)}"
        )
    pixels = images.to(device).float()
    if pixels.shape[-2:] == (side, side):
        return pixels
    pixels = F.interpolate(pixels, (side, side), mode=mode, antialias=True, align_corners=False)
    return pixels.clamp(0, 255)  # bicubic overshoots
