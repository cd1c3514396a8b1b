"""What a stage logs: stats.jsonl, health.jsonl and live sinks, all against nimg."""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from dinogen.batch import Scalars
from dinogen.distributed import process_group
from dinogen.errors import UserError
from dinogen.files import next_free, write_bytes
from dinogen.runs.files import line_nimg, read_raw
from dinogen.runs.run import Stage
from dinogen.training.logging.sinks.base import Charts, Event, LiveSink
from dinogen.training.logging.sinks.registry import live_sinks
from dinogen.transfer import to_device


class Logger:
    """Means since the last line, over samples of all ranks.

    Sums are kept on the device, so that adding never waits for it, and are part of the checkpoint:
    a run that was interrupted between two lines writes the same next line.

    Args:
        place: the stage; None on ranks that do not write.
        stage: resolution, part of each line.
        device: where the sums are kept.
    """

    def __init__(self, place: Stage | None, stage: int, device: torch.device) -> None:
        self.place = place
        self.stage = stage
        self.device = device
        # Apple's GPUs know no double precision
        self.dtype = torch.float32 if device.type == "mps" else torch.float64
        self.groups: dict[str, _Group] = {}
        self.numbers: dict[str, float] = {}
        self.weights: dict[str, float] = {}
        self.resumed: dict[str, float] = {}
        self.sinks: dict[str, LiveSink] = {}

    def start(self, nimg: int, state: dict[str, Any] | None, charts: Charts) -> None:
        """Open the files at ``nimg``; what was written past it is dropped.

        Args:
            nimg: where the run starts or resumes.
            state: what :meth:`state` gave, or None.
            charts: what TensorBoard shows in the tab Custom Scalars.
        """
        if state is not None:
            # Every rank has every name, as all of them are summed; the values count once.
            main = process_group.is_main()
            self.resumed = {
                name: _number(value) if main else 0.0 for name, value in state["sums"].items()
            }
            self.weights = {name: main * value for name, value in state["weights"].items()}
        if self.place is None:
            return
        self.place.folder.mkdir(parents=True, exist_ok=True)
        cut_lines(self.place.stats_file, nimg)
        cut_lines(self.place.health_file, nimg)
        place = self.place
        self.sinks = live_sinks(place.run)
        self._each(lambda sink: sink.start(place, nimg, charts))

    def add(self, group: str, values: Scalars, weight: float) -> None:
        """Add a microbatch's means, all of them in one go.

        Args:
            group: a name is always added in the same one.
            values: scalar tensors, by the names they are logged under.
            weight: the microbatch's share of the global batch.
        """
        if not values:
            return
        if group not in self.groups:
            self.groups[group] = _Group(self.device, self.dtype)
        self.groups[group].add(values, weight, self.resumed)
        self._weigh(values, weight)

    def add_number(self, name: str, value: float, weight: float) -> None:
        """Add a number that the host knows, as :meth:`add` does."""
        before = self.numbers[name] if name in self.numbers else self.resumed.pop(name, 0.0)
        self.numbers[name] = before + value * weight
        self._weigh((name,), weight)

    def flush(self) -> dict[str, float]:
        """Means over all ranks since the last flush; every rank has to call it."""
        sums, weights = self._totals()
        self.groups.clear()
        self.numbers.clear()
        self.weights.clear()
        self.resumed.clear()
        return {name: value / weights[name] for name, value in sums.items()}

    def state(self) -> dict[str, Any]:
        """Unwritten sums over all ranks, JSON-ready; every rank has to call it."""
        sums, weights = self._totals()
        return {
            "sums": {name: _json_number(value) for name, value in sums.items()},
            "weights": weights,
        }

    def _weigh(self, names: Iterable[str], weight: float) -> None:
        for name in names:
            self.weights[name] = self.weights.get(name, 0.0) + weight

    def _totals(self) -> tuple[dict[str, float], dict[str, float]]:
        """Sums and weights over all ranks, by name."""
        host = self.resumed | self.numbers
        groups = list(self.groups.values())
        found = [name for group in groups for name in group.names] + list(host)
        if not found:
            return {}, {}
        numbers = torch.tensor(list(host.values()), dtype=self.dtype)
        sums = torch.cat([*(group.sums for group in groups), to_device(numbers, self.device)])
        order = sorted(range(len(found)), key=found.__getitem__)
        names = [found[i] for i in order]
        weights = torch.tensor([self.weights[name] for name in names], dtype=torch.float64)
        totals = process_group.all_reduce_sum(sums).cpu()[order].tolist()
        shares = process_group.all_reduce_sum(weights).tolist()
        return dict(zip(names, totals, strict=True)), dict(zip(names, shares, strict=True))

    def write(self, nimg: int, values: dict[str, float | None]) -> None:
        """One line to stats.jsonl and the same numbers to the sinks; rank 0 only writes."""
        if self.place is None:
            return
        line = {"nimg": nimg, "stage": self.stage} | {
            name: _json_number(value) for name, value in values.items()
        }
        with self.place.stats_file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        self._show(Event(nimg, self.stage, values))

    def write_health(self, nimg: int, status: str, warnings: list[str]) -> None:
        """A change of the health status, with what was found, to health.jsonl and the sinks."""
        if self.place is None:
            return
        line = {"nimg": nimg, "stage": self.stage, "status": status, "warnings": warnings}
        append_line(self.place.health_file, line)
        self._show(Event(nimg, self.stage, health=status, warnings=tuple(warnings)))

    def write_images(self, nimg: int, images: Mapping[str, Path]) -> None:
        """Images, as PNG files by name, to the sinks."""
        self._show(Event(nimg, self.stage, images=images))

    def sync(self) -> None:
        """Bring what was written to disk; done before each checkpoint."""
        if self.place is None:
            return
        self._each(lambda sink: sink.flush())
        path = self.place.stats_file
        if path.exists():
            with path.open("rb") as file:
                os.fsync(file.fileno())

    def close(self) -> None:
        """Close the files."""
        self._each(lambda sink: sink.close("done"))

    def _show(self, event: Event) -> None:
        self._each(lambda sink: sink.write(event))

    def _each(self, act: Callable[[LiveSink], None]) -> None:
        """Do something with every sink; one that cannot be written is left out from then on."""
        for name, sink in list(self.sinks.items()):
            try:
                act(sink)
            except Exception as error:  # of a library too; no sink stops training
                # The saver's thread may have met the same error at the same time.
                if self.sinks.pop(name, None) is not None:
                    log.warning(
                        "logging: %s CANNOT BE WRITTEN, and lacks what follows: %s; training goes "
                        "on",
                        name,
                        str(error) or type(error).__name__,
                    )


class _Group:
    """Sums of values that are added together, as one tensor.

    Args:
        device: where it is.
        dtype: its type.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.names: list[str] = []
        self.sums = torch.zeros(0, dtype=dtype, device=device)

    def add(self, values: Scalars, weight: float, resumed: dict[str, float]) -> None:
        """Add weighted values; a new name begins with what it had when the run was interrupted."""
        if new := [name for name in values if name not in self.names]:
            begin = torch.tensor([resumed.pop(name, 0.0) for name in new], dtype=self.sums.dtype)
            self.names += new
            self.sums = torch.cat([self.sums, to_device(begin, self.sums.device)])
        device = self.sums.device
        scalars = [
            value.detach() if value.device == device else to_device(value.detach(), device)
            for value in values.values()
        ]
        if len({scalar.dtype for scalar in scalars}) > 1:
            scalars = [scalar.to(self.sums.dtype) for scalar in scalars]
        terms = torch.stack(scalars).to(self.sums.dtype) * weight
        if self.names == list(values):
            self.sums += terms
            return
        for name, term in zip(values, terms, strict=True):
            self.sums[self.names.index(name)] += term


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def _json_number(value: float | None) -> float | None:
    """JSON knows no NaN and no infinity; readers meet null."""
    return value if value is not None and math.isfinite(value) else None


log = logging.getLogger(__name__)


def cut_lines(path: Path, nimg: int) -> None:
    """Drop what was written past ``nimg``, and every line that is damaged or was cut off.

    A file with damage that no kill explains, which cuts off the last line alone, is kept beside the
    new one as ``NAME.damaged``, ``NAME.damaged-2`` and so on.

    Raises:
        UserError: the file cannot be read, or something else stands in its place.
    """
    found = read_raw(path)
    if found.problems:
        raise UserError(f"{found.messages()[0]}: move it away")
    lines = found.value.splitlines(keepends=True)
    kept = [line for line in lines if line_nimg(line) <= nimg]
    damaged = sum(line_nimg(line) == math.inf for line in lines)
    if damaged:
        log.warning("%s: %d damaged lines are dropped", path, damaged)
        if damaged > 1 or found.value.endswith(b"\n") or line_nimg(lines[-1]) < math.inf:
            kept_as = next_free(path.with_name(f"{path.name}.damaged"))
            write_bytes(kept_as, found.value)
            log.warning("%s: as it was, it is kept as %s", path, kept_as)
    text = b"".join(kept)
    if kept and not text.endswith(b"\n"):
        text += b"\n"  # or the next line would be appended to this one
    if text != found.value:
        write_bytes(path, text)


def append_line(path: Path, line: dict[str, Any]) -> None:
    """Add a line, and bring it to disk: what it says took long to find out.

    What a kill has left of a line before stays a line of its own.

    Raises:
        ValueError: a number is not finite.
    """
    text = json.dumps(line, allow_nan=False) + "\n"
    with path.open("ab+") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                text = "\n" + text
        file.write(text.encode())
        file.flush()
        os.fsync(file.fileno())
