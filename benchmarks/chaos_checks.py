"""What benchmarks/chaos.py demands of a run that was killed; every check returns its violations."""

from __future__ import annotations

import contextlib
import json
import math
from dataclasses import dataclass, field
from pathlib import Path

import torch

from dinogen.training.checkpointing.checkpoint import Checkpoint, load_checkpoint

# what a clock measures; all else is a function of config and seed
WALL_CLOCK = {"images_per_s", "training_s", "data_wait", "save_share"}
FILES = ("G", "G.ema", "optim")
RESOLUTIONS = (4, 8)
FLOAT32 = 2e-7  # TensorBoard rounds to it


@dataclass
class Records:
    """What one start of the ranks consumed.

    Attributes:
        pids: process ids by rank, of those that joined the others.
        steps: {nimg: {position: key}}, over all ranks.
        twice: positions that two ranks consumed.
    """

    pids: dict[int, int] = field(default_factory=dict)
    steps: dict[int, dict[int, str]] = field(default_factory=dict)
    twice: list[int] = field(default_factory=list)

    @property
    def first(self) -> int | None:
        """nimg of the first step."""
        return min(self.steps, default=None)

    @property
    def last(self) -> int | None:
        """nimg of the last step, which may be recorded by some ranks only."""
        return max(self.steps, default=None)


def read_records(folder: Path) -> Records:
    """Records of all ranks of one start."""
    found = Records()
    for path in sorted(folder.glob("*.jsonl")):
        for line in path.read_text().splitlines():
            values = json.loads(line)
            if "pid" in values:
                found.pids[int(path.stem)] = values["pid"]
                continue
            step = found.steps.setdefault(values["nimg"], {})
            for position, key in zip(values["positions"], values["keys"], strict=True):
                if position in step:
                    found.twice.append(position)
                step[position] = key
    return found


def newest(run: Path) -> int:
    """Images shown up to the newest whole checkpoint; 0 if there is none.

    Raises:
        ValueError: a checkpoint is not whole, though it has its final name.
    """
    found = [0]
    for size in RESOLUTIONS:
        for folder in (run / f"{size}x{size}" / "checkpoints").glob("[0-9]*"):
            load_checkpoint(folder)  # compares every file with its hash
            found.append(int(folder.name))
    return max(found)


def unfinished(run: Path) -> set[tuple[str, int]]:
    """Name and inode of temporary folders: of a save on its way, or that a killed one left."""
    found = set()
    for path in run.glob("*x*/checkpoints/.tmp-*"):
        with contextlib.suppress(FileNotFoundError):
            found.add((path.name, path.stat().st_ino))
    return found


def check_keys(attempts: list[Records], whole: Records, num_samples: int) -> list[str]:
    """The order in which samples were consumed, over all attempts, is the uninterrupted run's."""
    wrong = [f"samples at {a.twice} consumed by two ranks" for a in [*attempts, whole] if a.twice]
    order = _order(whole.steps)
    if sorted(p for step in whole.steps.values() for p in step) != list(range(len(order))):
        wrong.append("the uninterrupted run does not consume every position once")
    for first in range(0, len(order), num_samples):
        keys = order[first : first + num_samples]
        if len(set(keys)) < len(keys):
            wrong.append(f"the epoch from {first} of the uninterrupted run repeats a sample")
    last: dict[int, dict[int, str]] = {}
    for number, attempt in enumerate(attempts):
        for nimg, step in sorted(attempt.steps.items()):
            expected = whole.steps.get(nimg, {})
            same = step == expected or (
                # the step in which the ranks died: some had not come to it
                nimg == attempt.last and step.items() <= expected.items()
            )
            if not same:
                wrong.append(f"attempt {number}: other samples in the step at {nimg} images")
            last[nimg] = step
    if last.keys() != whole.steps.keys():
        odd = sorted(last.keys() ^ whole.steps.keys())
        wrong.append(f"steps made in one run only, at {odd} images")
    elif _order(last) != order:
        wrong.append("the sequence of consumed keys differs")
    return wrong


def check_curve(run: Path, whole: Path, tolerance: float) -> list[str]:
    """stats.jsonl and TensorBoard: same points, same values; returns what differs."""
    wrong = []
    for size in RESOLUTIONS:
        mine, theirs = (
            _lines(folder / f"{size}x{size}" / "stats.jsonl") for folder in (run, whole)
        )
        wrong += _compare(f"stage {size}, stats.jsonl", mine, theirs, tolerance)
        mine, theirs = (_tensorboard(folder / f"{size}x{size}" / "tb") for folder in (run, whole))
        wrong += _compare(f"stage {size}, TensorBoard", mine, theirs, max(tolerance, FLOAT32))
    return wrong


def distances(run: Path, whole: Path) -> dict[str, float]:
    """{file: how far the last checkpoints are apart, over all stages}; 0 only if bitwise equal.

    Weights: largest difference over the largest weight. Where a gradient is all but zero, Adam
    makes a step of its rounding, so a tensor of small values is no measure of its own. Optimizer
    state: largest difference of a tensor over its largest value.
    """
    found = dict.fromkeys(FILES, 0.0)
    for folder in sorted(whole.glob("*x*/checkpoints")):
        mine = _last_checkpoint(run / folder.relative_to(whole))
        theirs = _last_checkpoint(folder)
        for name in FILES:
            a, b = mine.tensors(name), theirs.tensors(name)
            if a.keys() != b.keys() or mine.folder.name != theirs.folder.name:
                found[name] = math.inf
                continue
            largest = max(float(value.abs().max()) for value in b.values())
            for key in a:
                if torch.equal(a[key], b[key]):
                    continue
                apart = float((a[key].double() - b[key].double()).abs().max())
                scale = float(b[key].abs().max()) if name == "optim" else largest
                found[name] = max(found[name], apart / max(scale, 1e-30))
    return found


Points = dict[str, list[tuple[int, float | None]]]


def _order(steps: dict[int, dict[int, str]]) -> list[str]:
    """Keys in the order of their global positions."""
    return [key for nimg in sorted(steps) for _, key in sorted(steps[nimg].items())]


def _last_checkpoint(folder: Path) -> Checkpoint:
    return load_checkpoint(max(folder.glob("[0-9]*")))


def _lines(path: Path) -> Points:
    """{name: [(nimg, value)]} in the order of the file."""
    points: Points = {}
    for text in path.read_text().splitlines():
        line = json.loads(text)
        nimg = line.pop("nimg")
        for name, value in line.items():
            points.setdefault(name, []).append((nimg, value))
    return points


def _tensorboard(folder: Path) -> Points:
    """{name: [(nimg, value)]} as TensorBoard shows them, images and notes without values."""
    from tensorboard.backend.event_processing import event_accumulator, plugin_event_accumulator

    events = event_accumulator.EventAccumulator(str(folder), {"scalars": 0, "images": 0})
    events.Reload()
    scalars, images = (events.Tags()[kind] for kind in ("scalars", "images"))
    points: Points = {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in scalars}
    points |= {f"image {tag}": [(e.step, None) for e in events.Images(tag)] for tag in images}
    # What the program TensorBoard reads with: the class above shows notes that were purged.
    shown = plugin_event_accumulator.EventAccumulator(str(folder), {"tensors": 0})
    shown.Reload()
    # the charts' layout is written by each start again, always the same
    notes = set(shown.Tags()["tensors"]) - {*scalars, *images, "custom_scalars__config__"}
    points |= {f"note {tag}": [(e.step, None) for e in shown.Tensors(tag)] for tag in notes}
    return points


def _compare(place: str, mine: Points, theirs: Points, tolerance: float) -> list[str]:
    if mine.keys() != theirs.keys():
        return [f"{place}: curves in one run only: {sorted(mine.keys() ^ theirs.keys())}"]
    wrong = []
    for name in sorted(mine):
        a, b = [p for p, _ in mine[name]], [p for p, _ in theirs[name]]
        if a != b:
            overlap = sorted({p for p in a if a.count(p) > 1})
            hole = sorted(set(b) - set(a))
            wrong.append(f"{place}: {name} overlaps at {overlap}, has holes at {hole}: {a}")
        elif name not in WALL_CLOCK:
            for (nimg, x), (_, y) in zip(mine[name], theirs[name], strict=True):
                if not _close(x, y, tolerance):
                    wrong.append(f"{place}: {name} at {nimg} images is {x} instead of {y}")
    return wrong


def _close(x: float | None, y: float | None, tolerance: float) -> bool:
    if x is None or y is None:
        return x is y
    return math.isclose(x, y, rel_tol=tolerance, abs_tol=tolerance * 1e-3)
