"""Looks through the whole training: the same latents at each checkpoint that was kept."""

from __future__ import annotations

import logging
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from dinogen.config import ConfigError
from dinogen.report.images import Sheet
from dinogen.training.checkpointing.snapshot import load_snapshot
from dinogen.visualize.scene import LeftOut, Look, Scene

log = logging.getLogger(__name__)

NUM_LATENTS = 16
NUM_ROWS = 6
MAX_COLUMNS = 8
MAX_FRAMES = 24
FRAME_SECONDS = 0.6


class History:
    """Pictures of the same latents at checkpoints of a stage, up to the scene's own.

    Args:
        scene: its seed and stage.
    """

    def __init__(self, scene: Scene) -> None:
        self.scene = scene

    @cached_property
    def pictures(self) -> dict[int, Tensor]:
        """(16, 3, R, R) by the images that the run had been shown.

        Raises:
            LeftOut: there is one checkpoint alone.
        """
        scene, snapshot = self.scene, self.scene.snapshot
        parent = snapshot.checkpoint.folder.parent
        kept = sorted(int(p.name) for p in parent.iterdir() if p.is_dir() and p.name.isdigit())
        kept = [nimg for nimg in kept if nimg <= snapshot.nimg]
        if len(kept) < 2:
            raise LeftOut(
                "only one checkpoint was kept: set checkpoint.keep_every_kimg to see the way here"
            )
        indices = torch.arange(NUM_LATENTS)
        found = {}
        for nimg in _spread(kept, MAX_FRAMES):
            if nimg == snapshot.nimg:
                found[nimg] = scene.drawn[:NUM_LATENTS]
                continue
            try:
                then = load_snapshot(scene.family.config.run, scene.resolution, nimg)
            except ConfigError as error:
                log.warning("left out of the progression: %s", error)
                continue
            past = Scene(then, scene.seed)
            found[nimg] = past.decode(past.latents(indices), indices)
        if len(found) < 2:
            raise LeftOut("all checkpoints before this one are broken")
        return found

    def progression(self, scene: Scene) -> Look:
        """Columns of checkpoints, rows of latents."""
        chosen = _spread(list(self.pictures), MAX_COLUMNS)
        images = torch.stack([self.pictures[nimg][:NUM_ROWS] for nimg in chosen], 1)
        labels = [self._when(nimg) for nimg in chosen]
        caption = f"The same latents in the course of training, at {_list(chosen)} images."
        return Look((Sheet(images.flatten(0, 1).numpy(), len(chosen), labels),), caption)

    def animation(self, scene: Scene) -> Look:
        """The same as an animation, of more latents and checkpoints."""
        sheets = tuple(
            Sheet(images.numpy(), 4, [self._when(nimg)]) for nimg, images in self.pictures.items()
        )
        caption = f"The same latents in the course of training, {len(sheets)} checkpoints."
        return Look(sheets, caption)

    @cached_property
    def _num_train(self) -> int | None:
        try:
            return self.scene.data.num_samples(self.scene.family.config.data.split)
        except LeftOut:
            return None

    def _when(self, nimg: int) -> str:
        """In epochs, as far as the data are known."""
        if self._num_train:
            epochs = nimg / self._num_train
            return f"{epochs:.0f} epochs" if epochs >= 10 else f"{epochs:.1f} epochs"
        return f"{nimg / 1000:.3g}k images"


def _spread(items: list[int], num: int) -> list[int]:
    """At most ``num`` of them, evenly, the first and the last among them."""
    chosen = np.linspace(0, len(items) - 1, min(num, len(items))).round().astype(int)
    return [items[i] for i in chosen]


def _list(numbers: list[int]) -> str:
    return ", ".join(f"{number:,}" for number in numbers)
