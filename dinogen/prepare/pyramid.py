"""Aligned faces to pyramids: batches through the guide, on one device, in order."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dinogen.config_prepare import PyramidsConfig
from dinogen.features import Guide, native_pyramid, pooled_pyramid
from dinogen.prepare.crop import Crop
from dinogen.prepare.read import PrepareError
from shards.image import decode_image

Levels = dict[str, NDArray[np.float16]]

_NUM_DECODERS = 2


class PyramidMaker:
    """Puts crops through the guide, ``config.batch`` at a time.

    The last batch is filled up, so the guide always sees the same shape. Networks choose their
    kernels by it, and the features of a picture must not depend on where a run was interrupted.

    Args:
        guide: on ``device``.
        config: grids, kinds and batch.
        device: where the guide runs.
    """

    def __init__(self, guide: Guide, config: PyramidsConfig, device: torch.device) -> None:
        self.guide = guide
        self.config = config
        self.device = device

    def settings(self) -> dict[str, Any]:
        """What decides the features, besides the guide and the pictures; JSON values."""
        return {"grids": list(self.config.grids), "kinds": list(self.config.kinds)}

    def check_size(self, size: int) -> None:
        """Raise PrepareError unless crops of ``size`` pixels have all the levels asked for."""
        wrong = [grid for grid in self.config.grids if size % grid]
        if "native" in self.config.kinds and wrong:
            raise PrepareError(
                f"prepare.faces.size: {size} is no multiple of the native grid {wrong[0]}: make "
                "faces of a multiple of it (256), or set prepare.pyramids.kinds to [pooled]"
            )

    def levels(self, crops: Iterable[Crop]) -> Iterator[tuple[Crop, Levels]]:
        """Every crop with its levels, in order.

        Args:
            crops: square pictures, all of one size. They are read one batch ahead, so that they
                are decoded while the GPU works.

        Returns:
            The crop and ``{"p4": (16, C), "n4": (16, C), ...}`` float16.

        Raises:
            PrepareError: a crop is damaged, not square or of another size than the first, or its
                features exceed float16; naming its key.
        """
        pending: tuple[list[Crop], dict[str, Tensor]] | None = None
        side: int | None = None
        with ThreadPoolExecutor(_NUM_DECODERS) as pool:
            for batch in batched(crops, self.config.batch):
                pictures = list(pool.map(_decode, batch))
                side = self._common_side(batch, pictures, side)
                started = (batch, self._compute(pictures))
                if pending is not None:
                    yield from self._collect(*pending)
                pending = started
            if pending is not None:
                yield from self._collect(*pending)

    def _common_side(
        self, crops: list[Crop], pictures: list[NDArray[np.uint8]], side: int | None
    ) -> int:
        if side is None:
            side = pictures[0].shape[0]
            self.check_size(side)
        for crop, picture in zip(crops, pictures, strict=True):
            height, width = picture.shape[:2]
            if (height, width) != (side, side):
                raise PrepareError(
                    f"{crop.key}: the face is {width}x{height} pixels, others are {side}x{side}: "
                    "make them alike with `dinogen faces` (prepare.faces.detect=none)"
                )
        return side

    @torch.inference_mode()
    def _compute(self, pictures: list[NDArray[np.uint8]]) -> dict[str, Tensor]:
        """Levels of up to a batch of pictures, (B, g * g, C) float16, still on the device."""
        pixels = np.stack(pictures + pictures[-1:] * (self.config.batch - len(pictures)))
        images = torch.from_numpy(pixels).to(self.device).permute(0, 3, 1, 2)
        images = (images.float() - 127.5) / 127.5
        levels = {}
        for kind in self.config.kinds:
            pyramid = pooled_pyramid if kind == "pooled" else native_pyramid
            for grid, features in pyramid(self.guide, images, self.config.grids).items():
                levels[f"{kind[0]}{grid}"] = features.half()
        return levels

    def _collect(
        self, crops: list[Crop], levels: dict[str, Tensor]
    ) -> Iterator[tuple[Crop, Levels]]:
        arrays: Levels = {name: features.cpu().numpy() for name, features in levels.items()}
        for row, crop in enumerate(crops):
            mine = {name: features[row] for name, features in arrays.items()}
            for name, features in mine.items():
                if not np.isfinite(features).all():
                    raise PrepareError(
                        f"{crop.key}: level {name} is not finite in float16: the features of "
                        f"{self.guide.info.label} exceed 65504; choose another guide.layer"
                    )
            yield crop, mine


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
