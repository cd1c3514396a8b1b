"""What a run says as it begins, and how far it is while it trains."""

from __future__ import annotations

import logging
import time

from dinogen.config import Config
from dinogen.config.guides import default_path
from dinogen.distributed import process_group
from dinogen.families.base import Family
from dinogen.report.progress import LiveLine, duration
from dinogen.runs.layout import stage_name
from dinogen.training.data import any_of_a_guide
from dinogen.training.engines.base import resolve_precision
from shards.read.dataset import Dataset

log = logging.getLogger(__name__)

# The length that is proposed for a GAN that is given fewer images.
ENOUGH_KIMG = 1000


def say_what_begins(config: Config, families: list[Family], data: Dataset) -> None:
    """Log what is trained, on what and for how long; and a warning if that is short for a GAN.

    Args:
        config: the whole run, lengths in thousands of images.
        families: one per stage, in the order of the config.
        data: what it is trained on.
    """
    if not process_group.is_main():
        return
    for line in opening_lines(config, families, data):
        log.info("%s", line)
    if words := short_gan(config, families, data.num_samples(config.data.split)):
        log.warning("%s", words)


def opening_lines(config: Config, families: list[Family], data: Dataset) -> list[str]:
    """Family, stages and kimg; device, precision and guide; parameters; data."""
    stages = [f"{stage_name(s.resolution)} {s.num_images / 1000:g} kimg" for s in config.stages]
    total = sum(stage.num_images for stage in config.stages) / 1000
    device, ranks = process_group.device(), process_group.world_size()
    precision = resolve_precision(config.engine.precision, device)
    guide = "no guide"
    if any(any_of_a_guide(family.inputs.levels) for family in families):
        has_path = default_path(config.guide.name, config.guide.file) is not None
        guide = f"guide {config.guide.name}{f' {config.guide.path}' if has_path else ''}"
    last = families[-1]
    sizes = ", ".join(
        f"{name} {sum(p.numel() for p in network.parameters()):,}"
        for name, network in last.networks.items()
    )
    split = config.data.split
    return [
        f"run {config.run}: family {config.family.name}, {total:g} kimg in all: "
        + ", ".join(stages),
        f"device {device.type} ({ranks} process{'es' if ranks > 1 else ''}), {precision}, {guide}",
        f"parameters at {stage_name(last.stage.resolution)}: {sizes}",
        f"data {data.location}: {data.num_samples(split):,} images in split {split}",
    ]


def short_gan(config: Config, families: list[Family], num_samples: int) -> str | None:
    """A warning if epochs make a GAN's run shorter than 1,000 kimg; None otherwise.

    Args:
        config: the whole run, lengths in thousands of images.
        families: one per stage.
        num_samples: of an epoch.
    """
    epochs = sum(stage.epochs or 0.0 for stage in config.stages)
    total = sum(stage.num_images for stage in config.stages) / 1000
    from_epochs = abs(epochs * num_samples / 1000 - total) < 0.001
    if not from_epochs or total >= ENOUGH_KIMG or not any("D" in f.networks for f in families):
        return None
    remedy = " ".join(
        f"stages.{number}.kimg={ENOUGH_KIMG * stage.num_images / 1000 / total:.4g}"
        for number, stage in enumerate(config.stages)
    )
    return (
        f"stages: {epochs:g} epochs of {num_samples:,} images are only {total:.4g} kimg, and a GAN "
        f"needs thousands: set {remedy} or more (StyleGAN2-ADA's authors train 25,000)"
    )


class ProgressLine:
    """Shows images/s, loss, floor and the time left, of the stage and of the run.

    Args:
        title: such as ``stage 8x8``.
        start: nimg at which the bar begins.
        end: nimg at which it ends.
        show: False on ranks that stay silent.
        later: number of images of the stages that follow.
    """

    def __init__(self, title: str, start: int, end: int, show: bool, later: int = 0) -> None:
        self.start, self.end, self.later = start, end, later
        self.nimg = self.begun_at = start
        self.began = time.monotonic()
        self.values: dict[str, float | None] = {}
        self.line = LiveLine(title, end - start, self.parts, show)

    def begin(self, nimg: int) -> None:
        """Count from here: ``nimg`` images were shown before the run was resumed."""
        self.nimg = self.begun_at = nimg
        self.began = time.monotonic()

    def step(self, nimg: int) -> None:
        """Take over how far the run is; costs nothing that a step would notice."""
        self.nimg = nimg
        self.line.move(min(nimg, self.end) - self.start)

    def update(self, nimg: int, values: dict[str, float | None]) -> None:
        """Show the numbers of the newest line."""
        self.values = values
        self.step(nimg)
        self.line.say()

    def parts(self) -> list[str]:
        """The most important first: images shown, time left, speed, losses."""
        speed = self.values.get("images_per_s") or self._speed()
        parts = [f"{self.nimg / 1000:.1f}/{self.end / 1000:.1f} kimg"]
        if speed:
            left = max(0, self.end - self.nimg)
            parts.append(f"ETA {duration(left / speed)}")
            if self.later:
                # Later stages are larger, and slower.
                parts.append(f"run > {duration((left + self.later) / speed)}")
            parts.append(f"{speed:.1f} images/s")
        if (mfu := self.values.get("mfu")) is not None:
            parts.append(f"mfu {mfu:.0%}")
        for name in ("loss", "diversity", "floor"):
            value = self.values.get(name)
            if value is not None:
                parts.append(f"{name} {value:.4g}")
        return parts

    def _speed(self) -> float:
        """Images per second since it began; 0 before the first."""
        return (self.nimg - self.begun_at) / max(time.monotonic() - self.began, 1e-9)

    def close(self) -> None:
        """Leave the terminal as it was."""
        self.line.close()
