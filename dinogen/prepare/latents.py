"""Latents of aligned faces: the posteriors of a frozen autoencoder, as levels of a pseudo guide."""

from __future__ import annotations

import json
import logging
from typing import Any

import torch
from torch import Tensor

from dinogen.config import LatentsConfig
from dinogen.features.autoencoder import FrozenAutoencoder, load_autoencoder
from dinogen.features.pyramid import tokens
from dinogen.prepare.photos.read import PrepareError
from shards.format.sample import OF_LATENTS

_logger = logging.getLogger(__name__)


class LatentMaker:
    """Encodes images, ``config.batch`` at a time.

    Args:
        autoencoder: encodes.
        config: batch, and whether mirrored images get latents too.
    """

    def __init__(self, autoencoder: FrozenAutoencoder, config: LatentsConfig) -> None:
        self.autoencoder = autoencoder
        self.config = config

    @classmethod
    def load(cls, config: LatentsConfig, device: torch.device) -> LatentMaker:
        """With the autoencoder that the config names.

        Raises:
            GuideError: it cannot be loaded.
        """
        return cls(load_autoencoder(config.path, device, config.revision), config)

    @property
    def label(self) -> str:
        """Name of the network, for messages."""
        return self.autoencoder.label

    def identity(self) -> dict[str, dict[str, Any]]:
        """The autoencoder, as among the ``guides`` of a manifest."""
        info: dict[str, Any] = json.loads(json.dumps(self.autoencoder.info))
        return dict.fromkeys(self._names, info)

    def check_size(self, size: int) -> None:
        """Raise PrepareError unless images of ``size`` pixels can be encoded."""
        if size % self.autoencoder.factor:
            raise PrepareError(
                f"prepare.faces.size: {size} is not a multiple of {self.autoencoder.factor}, the "
                f"pixels of a location of {self.label}'s latents: make the faces a multiple of it "
                "(256), or leave out prepare.latents"
            )

    def warn_of_size(self, size: int) -> None:
        """Warn if images of ``size`` pixels are others than the autoencoder was trained on."""
        trained = self.autoencoder.resolution
        if trained is not None and size != trained:
            _logger.warning(
                "prepare.faces.size: %d, but the autoencoder %s was trained on images of %d "
                "pixels: it may reconstruct others badly",
                size, self.label, trained,
            )  # fmt: skip

    def level_names(self, size: int) -> list[str]:
        """The levels that images of ``size`` pixels get."""
        return [f"{name}.n{size // self.autoencoder.factor}" for name in self._names]

    def levels(self, images: Tensor) -> dict[str, Tensor]:
        """Means, then log variances, of the posteriors of images.

        The last batch is padded, so the autoencoder always sees the same shape, for the same
        reason as in :class:`dinogen.prepare.pyramid.PyramidMaker`.

        Args:
            images: (B, 3, R, R), RGB in [-1, 1], on the autoencoder's device.

        Returns:
            ``{"latents.n32": (B, 32 * 32, 2C)}`` float16, locations row by row; infinite where
            they exceed float16. "latents_flipped.n32" are those of the mirrored images.
        """
        found = [self._encoded(images)]
        if self.config.flips:
            found.append(self._encoded(images.flip(3)))
        return dict(zip(self.level_names(images.shape[-1]), found, strict=True))

    @property
    def _names(self) -> list[str]:
        return list(OF_LATENTS if self.config.flips else OF_LATENTS[:1])

    def _encoded(self, images: Tensor) -> Tensor:
        size, made = self.config.batch, []
        for part in images.split(size):
            padding = part[-1:].expand(size - len(part), -1, -1, -1)
            # contiguous: kernels depend on the layout too, and padded images have another
            whole = torch.cat([part, padding]).contiguous()
            posteriors = torch.cat(self.autoencoder.encode(whole), 1)
            made.append(tokens(posteriors[: len(part)]).half())
        return torch.cat(made)
