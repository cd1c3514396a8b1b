"""How far a projection is from its photo: what a frozen network sees, and pixels."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from dinogen.config import Config, GuideConfig
from dinogen.errors import UserError
from dinogen.features.base import Guide, GuideError
from dinogen.features.load import load_guide
from dinogen.metrics.extractors.base import NotAvailable
from dinogen.metrics.extractors.lpips import load_perceptual

LOSSES = ("auto", "lpips", "guide", "onet", "pixels")
# Mean squared errors of images in [-1, 1] are times this. LPIPS was fitted to what people see. A
# search can fool other networks by specks of single pixels, unless pixels weigh more.
PIXEL_WEIGHTS = {"lpips": 2.0, "guide": 10.0, "onet": 10.0, "pixels": 10.0}
_ONET_LAYERS = ("conv1", "conv2", "conv3", "conv4")
# what a guide sees of an image is compared at a grid of this share of its side
_PIXELS_PER_CELL = 4
_GRIDS = (4, 16)

Rows = Callable[[Tensor], Tensor]
# images (N, 3, R, R), and their rows (N, D) where features are compared
Seen = tuple[Tensor, Tensor | None]


@dataclass(frozen=True)
class Loss:
    """A distance of images: that of rows of features, and of pixels.

    Attributes:
        name: ``lpips``, ``guide``, ``onet`` or ``pixels``.
        what: the same in words, for results.
        rows: (N, 3, R, R) in [-1, 1] -> (N, D), whose squared distances are compared; None for
            pixels alone.
        missing: why a better one was not used, a sentence each.
    """

    name: str
    what: str
    rows: Rows | None
    missing: tuple[str, ...] = ()

    def seen(self, images: Tensor) -> Seen:
        """Images (N, 3, R, R) and their rows, with a gradient to the images."""
        return images, None if self.rows is None else self.rows(images)

    def terms(self, a: Seen, b: Seen) -> tuple[Tensor, Tensor]:
        """Mean squared error of pixels (N,), and the distance of features (N,), 0 without.

        One of the two may be a single image, with which all of the other are compared.
        """
        pixels = (a[0] - b[0]).square().flatten(1).mean(1)
        if a[1] is None or b[1] is None:
            return pixels, torch.zeros_like(pixels)
        return pixels, (a[1] - b[1]).square().sum(1)

    def between(self, a: Seen, b: Seen) -> Tensor:
        """The loss of each pair (N,)."""
        pixels, features = self.terms(a, b)
        return PIXEL_WEIGHTS[self.name] * pixels + features


def choose_loss(
    name: str, config: Config, facts: dict[str, Any], resolution: int, device: torch.device
) -> Loss:
    """The loss that is asked for; ``auto``: LPIPS, else the run's guide, else O-Net.

    Zhang et al. 2018, "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric".
    LPIPS uses the network of ``metrics.lpips``.

    Args:
        name: one of :data:`LOSSES`.
        config: of the run.
        facts: of the checkpoint: whether a guide trained it.
        resolution: R of the images.
        device: where they are.

    Raises:
        UserError: the one that is asked for is not available; the message says why.
    """
    if name not in LOSSES:
        raise UserError(f"--loss {name}: choose one of {', '.join(LOSSES)}")
    if name == "pixels":
        return Loss("pixels", "pixels alone", None)
    makers: dict[str, Callable[[], Loss]] = {
        "lpips": lambda: _lpips(config, device),
        "guide": lambda: _of_the_run(config, facts, resolution, device),
        "onet": lambda: _onet(resolution, device),
    }
    if name != "auto":
        return makers[name]()
    missing: list[str] = []
    for maker in makers.values():
        try:
            found = maker()
        except UserError as error:
            missing.append(str(error))
        else:
            return Loss(found.name, found.what, found.rows, tuple(missing))
    raise UserError(f"no loss is available: {'; '.join(missing)}")


def _lpips(config: Config, device: torch.device) -> Loss:
    own = config.metrics
    found = load_perceptual(own.lpips, own.lpips_backbone, device)
    return Loss("lpips", f"LPIPS ({own.lpips}) and pixels", found.rows)


def _of_the_run(
    config: Config, facts: dict[str, Any], resolution: int, device: torch.device
) -> Loss:
    used = facts.get("guide") or {}
    if used.get("name") != config.guide.name:
        raise NotAvailable("guide: the run was trained without one")
    if facts.get("random_guide"):
        raise NotAvailable("guide: the run's guide is random, and says nothing of images")
    if config.guide.name == "pixels":
        raise NotAvailable("guide: the run's guide compares pixels, as the loss does anyway")
    guide = load_guide(config.guide, device)
    if guide.info.weights_sha256 != used.get("weights_sha256"):
        raise GuideError(
            f"guide.path: {config.guide.path} has other weights than the run was trained with"
        )
    what = f"features of the run's guide ({config.guide.name}) and pixels"
    return Loss("guide", what, _rows_of(guide, resolution))


def _onet(resolution: int, device: torch.device) -> Loss:
    guide = load_guide(GuideConfig(name="onet", layer=_ONET_LAYERS), device)
    what = "features of O-Net, the face detector's last network, and pixels"
    return Loss("onet", what, _rows_of(guide, resolution))


def _rows_of(guide: Guide, resolution: int) -> Rows:
    """Features of unit length at each place of a grid, over the root of the number of places.

    So the squared distance of two rows is a mean over places between 0 and 4, as in equation 1 of
    LPIPS with weights of 1.
    """
    grid = min(max(resolution // _PIXELS_PER_CELL, _GRIDS[0]), _GRIDS[1])
    side = guide.input_size(grid)

    def rows(images: Tensor) -> Tensor:
        if images.shape[-1] != side:
            images = F.interpolate(images, (side, side), mode="bilinear", antialias=True)
        features = F.normalize(guide(images).float(), dim=1)
        return features.flatten(1) / math.sqrt(features.shape[2] * features.shape[3])

    return rows
