"""What a chain of jobs will take, as a table: at measured speeds, else estimated from others."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from dinogen.config import Config, StageConfig
from dinogen.families.base import Family
from dinogen.runs.run import Run, Stage
from dinogen.training.preflight import check_config
from launch.slurm.plan import Step
from launch.study.cost import Speed, duration, speed_words, stage_speed, with_known_lengths

WIDTH = 80
# Weights, gradients, two moments of Adam and the moving average, in float32.
_BYTES_PER_PARAMETER = 4 * 5
_HEADINGS = ("job", "nodes", "GPUs", "time", "memory", "waits for", "GPU-hours")


@dataclass(frozen=True)
class Row:
    """One job of the table.

    Attributes:
        step: what it does.
        after: what it waits for; empty if nothing.
        limit: the time limit that is requested, as SLURM writes it.
        seconds: the time it will take; None if it is unknown.
        measured: whether ``seconds`` come from this stage on as many processes.
        memory: of each GPU, in words.
        why: where time and memory come from.
    """

    step: Step
    after: str
    limit: str
    seconds: float | None = None
    measured: bool = False
    memory: str = ""
    why: str = ""

    @property
    def gpus(self) -> int:
        """GPUs on all nodes."""
        return self.step.resources.nodes * self.step.resources.gpus

    @property
    def gpu_hours(self) -> tuple[float, str]:
        """Of all GPUs, and a mark: ``~`` for an estimate, ``<`` for the limit of one start."""
        mark = "<" if self.seconds is None else "" if self.measured else "~"
        seconds = limit_seconds(self.limit) if self.seconds is None else self.seconds
        return self.gpus * seconds / 3600, mark

    @property
    def time(self) -> str:
        """Its length in words, with the same marks."""
        if self.seconds is None:
            return f"<{self.limit}"
        return ("" if self.measured else "~") + duration(self.seconds)


def forecast(config: Config, steps: Sequence[tuple[Step, str]]) -> list[Row]:
    """A row for each step.

    Args:
        config: the whole run, resolved.
        steps: in their order, each with what it waits for.

    Raises:
        ConfigError: the config names what is not there.
    """
    families = dict(
        zip([one.resolution for one in config.stages], check_config(config, []), strict=True)
    )
    known = with_known_lengths(config)
    rows = []
    for step, after in steps:
        limits = re.findall(r"--time=(\S+)", " ".join(step.resources.flags))
        row = Row(step, after, limits[-1])
        if step.name.startswith("train-"):
            size = int(step.args[1])
            row = _stage_row(row, config, known, families[size])
        rows.append(row)
    return rows


def _stage_row(row: Row, config: Config, known: Config | None, family: Family) -> Row:
    stage, processes = family.stage, row.step.resources.nodes * row.step.resources.processes
    found = _speed(config, stage)
    memory, source = _memory(config, family)
    if known is None:
        time = "the length is in epochs of data that are not here"
        return replace(row, memory=memory, why=f"time: {time}; memory: {source}")
    if found is None:
        where = f"{config.run} or beside it"
        time = f"the limit: no {config.family.name} was trained in {where}"
        return replace(row, memory=memory, why=f"time: {time}; memory: {source}")
    speed, resolution = found
    ratio = (resolution / stage.resolution) ** 2
    factor = ratio * processes / (speed.num_processes or processes)
    seconds = _num_left(known, stage) / (speed.images_per_s * factor)
    time = speed_words([speed])
    if factor != 1:
        time = f"estimated at {factor:.3g} times {time}"
    words = f"time: {time}; memory: {source}"
    return replace(
        row, seconds=seconds, measured=factor == 1 and speed.same, memory=memory, why=words
    )


def _speed(config: Config, wanted: StageConfig) -> tuple[Speed, int] | None:
    """The nearest measured speed and the resolution that it was measured at."""
    sizes = sorted(
        (stage.resolution for stage in config.stages),
        key=lambda size: (max(size, wanted.resolution) / min(size, wanted.resolution), size),
    )
    for size in sizes:
        for stage, same in _stages(config, size):
            speed = stage_speed(stage, config.family.name, same)
            if speed is not None:
                return speed, size
    return None


def _stages(config: Config, resolution: int) -> Iterator[tuple[Stage, bool]]:
    """That stage of this run and of the runs beside it, and whether it is of this run."""
    yield Run.of(config).stage(resolution), True
    own = config.run.absolute()
    for folder in sorted(own.parent.glob("*/")):
        if folder != own and Run(folder).has_config:
            yield Run(folder).stage(resolution), False


def _num_left(config: Config, wanted: StageConfig) -> int:
    """Images that a stage has still to be shown."""
    start = 0
    for stage in Run.of(config).planned:
        end = start + stage.config.num_images
        if stage.resolution == wanted.resolution:
            return max(0, end - (stage.nimg or start))
        start = end
    return wanted.num_images


def _memory(config: Config, family: Family) -> tuple[str, str]:
    """Memory of each GPU, and where that comes from."""
    for stage, _ in _stages(config, family.stage.resolution):
        result = stage.result or {}
        if result.get("peak_memory_mb") and result.get("family") == config.family.name:
            return f"{result['peak_memory_mb'] / 1024:.1f} GiB", f"measured in {stage.folder}"
    num = sum(p.numel() for network in family.networks.values() for p in network.parameters())
    return (
        f">{num * _BYTES_PER_PARAMETER / 2**30:.2f} GiB",
        f"estimated, {num:,} parameters with what trains them, without activations and guides",
    )


def limit_seconds(text: str) -> float:
    """SLURM's notation of a time in seconds: ``10``, ``12:00:00``, ``2-12``; infinite if it is."""
    if not text[0].isdigit():
        return float("inf")
    days, dash, rest = text.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    # after days hours come first
    units = (60, 1) if not dash and len(parts) < 3 else (3600, 60, 1)
    seconds = sum(part * unit for part, unit in zip(parts, units, strict=False))
    return float(seconds + 86_400 * int(days or 0))


def table(rows: Sequence[Row], setup: Sequence[str]) -> str:
    """The rows in lines of at most 80 characters, with the lines of ``cluster.setup``."""
    cells = [_HEADINGS]
    for row in rows:
        hours, mark = row.gpu_hours
        cells.append(
            (
                row.step.name,
                str(row.step.resources.nodes),
                str(row.gpus) if row.gpus else "-",
                row.time,
                row.memory or "-",
                row.after or "-",
                f"{mark}{hours:,.1f}" if row.gpus else "-",
            )
        )
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["  ".join(map(str.ljust, line, widths)).rstrip() for line in cells]
    lines.append(f"GPU-hours in all: {sum(row.gpu_hours[0] for row in rows):,.1f}")
    lines.append("time: ~ is an estimate, < the limit of one start; memory is that of each GPU")
    lines += [f"{row.step.name}: {row.why}" for row in rows if row.why]
    lines += ["setup:" if setup else "setup: none", *(f"  {line}" for line in setup)]
    return "\n".join(
        textwrap.fill(line, WIDTH, subsequent_indent="  ") if len(line) > WIDTH else line
        for line in lines
    )
