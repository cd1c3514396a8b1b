"""Computes the pyramids of aligned faces: batches through the guides, on one device, in order."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dinogen.config import PyramidsConfig
from dinogen.features import Guide, native_pyramid, pooled_pyramid
from dinogen.features.pyramid import BASE_GRID, RESIZE
from dinogen.prepare.faces.crop import Crop
from dinogen.prepare.latents import LatentMaker
from dinogen.prepare.photos.read import PrepareError
from shards.format.sample import OF_LATENTS, flipped_guide, level_guide
from shards.image.decode import decode_image

Levels = dict[str, NDArray[np.float16]]

_NUM_DECODERS = 2

_logger = logging.getLogger(__name__)


class Embedder(Protocol):
    """A network that embeds images and captions in one space, such as CLIP.

    Attributes:
        info: its identity, JSON values.
    """

    info: dict[str, Any]

    def images(self, images: Tensor) -> Tensor:
        """(B, 3, R, R) RGB in [-1, 1] -> (B, E)."""
        ...

    def captions(self, captions: list[str]) -> Tensor:
        """Texts -> (B, E)."""
        ...


class PyramidMaker:
    """Runs crops through guides and embedder, ``config.batch`` at a time.

    The last batch is padded, so a network always sees the same shape. Its kernels depend on the
    shape, and the features of an image must not depend on where a run was interrupted.

    Args:
        guide: the main guide, on ``device``; None makes no pyramids.
        config: grids, kinds, batch, and whether mirrored images get levels too.
        device: where the networks run.
        guides: further guides by name; all grids and kinds are made for each of them too.
        embedder: makes the level ``clip`` and, from captions, ``text``.
        latents: makes the levels of an autoencoder.

    Attributes:
        antialias: whether images are enlarged for the guides like Pillow does. False continues
            work that an earlier version began, see :func:`resized_with_antialias`.
    """

    def __init__(
        self,
        guide: Guide | None,
        config: PyramidsConfig,
        device: torch.device,
        guides: Mapping[str, Guide] | None = None,
        embedder: Embedder | None = None,
        latents: LatentMaker | None = None,
    ) -> None:
        self.guide = guide
        self.config = config
        self.device = device
        self.guides = dict(guides or {})
        self.embedder = embedder
        self.latents = latents
        self.antialias = True

    def settings(self) -> dict[str, Any]:
        """The settings that the features depend on, besides networks and images; JSON values."""
        if self.guide is None:
            return {}
        found: dict[str, Any] = {"grids": list(self.config.grids), "kinds": list(self.config.kinds)}
        if self.config.base_grid != BASE_GRID:  # absent in manifests of earlier versions
            found["base_grid"] = self.config.base_grid
        if self.antialias:
            found["resize"] = RESIZE
        if self.config.flips:
            found["flips"] = True
        return found

    def identity(self) -> dict[str, dict[str, Any]]:
        """The networks, as named in the manifest: ``guide``, ``guides`` and ``clip``."""
        infos = {name: guide.info.to_dict() for name, guide in self._by_name().items()}
        flipped = {flipped_guide(n): info for n, info in infos.items()} if self.config.flips else {}
        latents = self.latents.identity() if self.latents else {}
        return {
            "guide": infos.pop("", {}),
            "guides": infos | flipped | latents,
            # As read back from JSON, so that it can be compared with a manifest.
            "clip": json.loads(json.dumps(self.embedder.info)) if self.embedder else {},
        }

    def warn_of_resize(self, out: Path) -> None:
        """Warn if work in ``out`` continues in the way of an earlier version."""
        if self.guide is not None and not self.antialias:
            _logger.warning(
                "%s: its pyramids were begun by an earlier version of dinogen, which enlarged "
                "images for a guide without antialias (1 to 2 of 255 from Pillow's bicubic). The "
                "rest is made in the same way, so that all are alike. Choose another folder to "
                "make all of them like Pillow",
                out,
            )

    @property
    def label(self) -> str:
        """Names of the networks, for messages."""
        names = [guide.info.label for guide in self._by_name().values()]
        if self.embedder is not None:
            names.append(f"clip ({self.embedder.info.get('path')})")
        if self.latents is not None:
            names.append(self.latents.label)
        return ", ".join(names)

    def check_size(self, size: int) -> None:
        """Raise PrepareError unless crops of ``size`` pixels can have all requested levels."""
        wrong = [grid for grid in self.config.grids if size % grid]
        if self.guide is not None and "native" in self.config.kinds and wrong:
            raise PrepareError(
                f"prepare.faces.size: {size} is not a multiple of the native grid {wrong[0]}: make "
                "the faces a multiple of it (256), or set prepare.pyramids.kinds to [pooled]"
            )
        if self.latents is not None:
            self.latents.check_size(size)

    def levels(
        self, crops: Iterable[Crop], with_text: bool = False
    ) -> Iterator[tuple[Crop, Levels]]:
        """Every crop with its levels, in order.

        Args:
            crops: square images, all of one size. They are read one batch in advance, so that
                they are decoded while the GPU works.
            with_text: some of them have captions: if there is an embedder, each gets the level
                ``text``, zeros if it has no caption.

        Returns:
            The crop and ``{"p4": (16, C), "NAME.n4": (16, C), "clip": (1, E), ...}`` float16;
            "flipped.p4" and "NAME_flipped.n4" are those of the mirrored crop, "latents.n32"
            those of an autoencoder.

        Raises:
            PrepareError: a crop is damaged, not square or of another size than the first, or its
                features exceed float16; the message names its key.
        """
        pending: tuple[list[Crop], dict[str, Tensor]] | None = None
        side: int | None = None
        with ThreadPoolExecutor(_NUM_DECODERS) as pool:
            for batch in batched(crops, self.config.batch):
                decoded = list(pool.map(_decode, batch))
                side = self._common_side(batch, decoded, side)
                started = (batch, self._compute(decoded))
                if with_text and self.embedder is not None:
                    started[1]["text"] = self._embed(self.embedder, batch, started[1]["clip"])
                if pending is not None:
                    yield from self._collect(*pending)
                pending = started
            if pending is not None:
                yield from self._collect(*pending)

    def _common_side(
        self, crops: list[Crop], decoded: list[NDArray[np.uint8]], side: int | None
    ) -> int:
        if side is None:
            side = decoded[0].shape[0]
            self.check_size(side)
            if self.latents is not None:
                self.latents.warn_of_size(side)
        for crop, image in zip(crops, decoded, strict=True):
            height, width = image.shape[:2]
            if (height, width) != (side, side):
                raise PrepareError(
                    f"{crop.key}: the face is {width}x{height} pixels, but others are "
                    f"{side}x{side}: make all the same size with `dinogen faces` "
                    "(prepare.faces.detect=none)"
                )
        return side

    @torch.inference_mode()
    def _compute(self, decoded: list[NDArray[np.uint8]]) -> dict[str, Tensor]:
        """Levels of up to a batch of images, (B, g * g, C) float16, still on the device."""
        pixels = np.stack(decoded + decoded[-1:] * (self.config.batch - len(decoded)))
        images = torch.from_numpy(pixels).to(self.device).permute(0, 3, 1, 2)
        images = (images.float() - 127.5) / 127.5
        levels: dict[str, Tensor] = {}
        for name, guide in self._by_name().items():
            levels |= self._pyramids(name, guide, images)
        if self.config.flips:
            mirrored = images.flip(3)
            for name, guide in self._by_name().items():
                levels |= self._pyramids(flipped_guide(name), guide, mirrored)
        if self.embedder is not None:
            levels["clip"] = self.embedder.images(images)[:, None].half()
        if self.latents is not None:
            levels |= self.latents.levels(images[: len(decoded)])
        return levels

    def _pyramids(self, name: str, guide: Guide, images: Tensor) -> dict[str, Tensor]:
        """All kinds and grids of one guide, whose levels are called after ``name``."""
        grids, levels = self.config.grids, {}
        prefix = f"{name}." if name else ""
        for kind in self.config.kinds:
            pyramid = (
                pooled_pyramid(guide, images, grids, self.config.base_grid, self.antialias)
                if kind == "pooled"
                else native_pyramid(guide, images, grids, self.antialias)
            )
            for grid, features in pyramid.items():
                levels[f"{prefix}{kind[0]}{grid}"] = features.half()
        return levels

    @torch.inference_mode()
    def _embed(self, embedder: Embedder, crops: list[Crop], like: Tensor) -> Tensor:
        """Embedded captions of crops, (B, 1, E) float16 as ``like``; zeros without a caption."""
        embedded = torch.zeros_like(like)
        for row, crop in enumerate(crops):
            if crop.caption is not None:
                # One by one; otherwise a caption's last bit depends on the longest of its batch.
                embedded[row] = embedder.captions([crop.caption]).half()
        return embedded

    def _by_name(self) -> dict[str, Guide]:
        """All guides; the main one's name is empty."""
        return ({} if self.guide is None else {"": self.guide}) | self.guides

    def _collect(
        self, crops: list[Crop], levels: dict[str, Tensor]
    ) -> Iterator[tuple[Crop, Levels]]:
        arrays: Levels = {name: features.cpu().numpy() for name, features in levels.items()}
        for row, crop in enumerate(crops):
            mine = {name: features[row] for name, features in arrays.items()}
            for name, features in mine.items():
                if not np.isfinite(features).all():
                    raise self._overflow(crop, name)
            yield crop, mine

    def _overflow(self, crop: Crop, level: str) -> PrepareError:
        """The error for a level that float16 cannot hold."""
        what, remedy = f"the features of {self.label}", "choose another layer"
        if self.latents is not None and level_guide(level) in OF_LATENTS:
            what = f"the latents of {self.latents.label}"
            remedy = "choose another autoencoder (prepare.latents.path)"
        return PrepareError(
            f"{crop.key}: level {level} is not finite in float16: {what} exceed 65504; {remedy}"
        )


def batched(crops: Iterable[Crop], size: int) -> Iterator[list[Crop]]:
    """Lists of ``size`` crops in their order; the last may be shorter."""
    batch: list[Crop] = []
    for crop in crops:
        batch.append(crop)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def _decode(crop: Crop) -> NDArray[np.uint8]:
    try:
        return decode_image(crop.image, crop.image_format)
    except ValueError as error:
        raise PrepareError(
            f"{crop.key}.{crop.image_format}: cannot be decoded ({error}): delete it and run "
            "`dinogen faces` again"
        ) from error
