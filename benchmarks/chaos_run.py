"""One training of benchmarks/chaos.py: started, killed at drawn moments, and started again."""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import chaos_worker
import discs
import yaml
from chaos_checks import Records, newest, read_records, unfinished
from ranks import ForkedRanks, Ranks, TorchrunRanks, call, kill

NUM_SAMPLES = 40
BATCH = 8
ENDS_WITHIN = 15.0  # seconds for the ranks that are left, by themselves
SILENT = 15.0  # and that many more where DeepSpeed makes its groups: nothing but silence tells
LONGEST_START = 180.0  # seconds without a step after which a start counts as hung
ENGINES = {
    "auto": ("auto", 1),
    "zero0": ("deepspeed", 0),
    "zero1": ("deepspeed", 1),
    "zero2": ("deepspeed", 2),
}


@dataclass
class Kill:
    """One kill as it was drawn."""

    moment: str
    nimg: int
    delay: float
    victims: list[int]


@dataclass
class Attempt:
    """One start of the ranks and its end.

    Attributes:
        size: number of ranks.
        expected: images of the newest whole checkpoint before it.
        moment: of the kill: ``step``, ``save`` or ``start``; ``finished`` if there was none.
        in_save: whether a half-written checkpoint was left behind.
        ended: seconds until the ranks that were left had ended.
    """

    size: int
    engine: str
    expected: int
    moment: str = "finished"
    in_save: bool = False
    ended: float = 0.0
    records: Records = field(default_factory=Records)
    wrong: list[str] = field(default_factory=list)


class Chaos:
    """One run and all that is done to it.

    Args:
        folder: for everything.
        options: of the command line.
        tell: is called after each start, with its number.
    """

    def __init__(
        self, folder: Path, options: argparse.Namespace, tell: Callable[[int, Attempt], None]
    ) -> None:
        self.folder, self.options, self.tell = folder, options, tell
        self.rng = random.Random(options.seed)
        call(discs.make, folder, NUM_SAMPLES)
        self.end = options.steps * BATCH
        first, fade = options.steps * 5 // 12 * BATCH, options.steps // 4 * BATCH
        stage = {"resolution": 4, "kimg": first / 1000, "batch": BATCH, "lr": 0.002}
        grown = {"resolution": 8, "kimg": (self.end - first) / 1000, "fade_kimg": fade / 1000}
        self.base = discs.settings(folder / "data", folder / "guide") | {
            "stages": [stage, stage | grown],
            "checkpoint": {"every_kimg": 0.024},
            "log": {
                "every_kimg": 0.016,
                "probe_kimg": 0.08,
                "samples_kimg": 0.16,
                "num_samples": 4,
            },
        }
        self.run, self.whole = folder / "run", folder / "whole"
        self.num_started = 0
        self.left: set[tuple[str, int]] = set()  # by saves that were killed earlier

    def uninterrupted(self) -> Records:
        """Train once without a kill."""
        size = self.options.fixed_world or 1
        name = "auto" if self.options.engine == "any" else self.options.engine
        ranks, records = self.start(self.whole, size, ENGINES[name])
        if not ranks.wait(600) or set(ranks.codes()) != {0}:
            ranks.end()
            sys.exit(f"the uninterrupted run failed:\n{ranks.output()[-4000:]}")
        return read_records(records)

    def killed(self) -> list[Attempt]:
        """Train with kills, started again after each, until the run is finished."""
        attempts: list[Attempt] = []
        while not attempts or attempts[-1].moment != "finished":
            attempts.append(self.attempt(len(attempts)))
            self.tell(len(attempts), attempts[-1])
            if any("no step" in text or "failed" in text for text in attempts[-1].wrong):
                break
        return attempts

    def attempt(self, num_kills: int) -> Attempt:
        """Start the ranks once, and kill some of them unless all kills were made."""
        size = self.options.fixed_world or self.rng.choice((1, 2, 3))
        name = self.options.engine
        name = self.rng.choice(list(ENGINES)) if name == "any" else name
        found = Attempt(size, name, newest(self.run))
        plan = None
        if num_kills < self.options.kills:
            plan = self.draw(size, found.expected, self.options.kills - num_kills)
        self.left = unfinished(self.run)
        ranks, folder = self.start(self.run, size, ENGINES[name])
        try:
            if plan is None or not self.strike(plan, ranks, folder, found):
                finished = ranks.wait(LONGEST_START)
                if not finished or any(ranks.codes()):
                    found.wrong.append(
                        f"failed unharmed: {ranks.codes()}\n{ranks.output()[-3000:]}"
                    )
        finally:
            ranks.end()
        found.records = read_records(folder)
        first = found.records.first
        if first is not None and first != found.expected:
            found.wrong.append(
                f"went on at {first} images, the newest checkpoint was at {found.expected}"
            )
        return found

    def strike(self, plan: Kill, ranks: Ranks, folder: Path, found: Attempt) -> bool:
        """Wait for the moment and kill; False if the run ended before."""
        if not self.wait_for(plan, ranks, folder, found):
            return False
        pids = ranks.pids()
        joined = len(read_records(folder).pids) == ranks.size
        saved = _newest_name(self.run)
        for victim in plan.victims:
            kill(pids[victim])
        began = time.monotonic()
        if not joined:
            # They wait for each other to come; nobody but their starter can know better.
            ranks.terminate()
        limit = ENDS_WITHIN + (SILENT if found.engine.startswith("zero") else 0)
        ended = ranks.wait(limit)
        found.moment, found.ended = plan.moment, time.monotonic() - began
        if not ended:
            found.wrong.append(
                f"ranks still run {limit} s after the kill: {ranks.codes()}\n"
                f"{ranks.output()[-3000:]}"
            )
        elif 0 in ranks.codes():
            found.wrong.append(f"a rank ended with 0 after a kill: {ranks.codes()}")
        found.in_save = bool(unfinished(self.run) - self.left)
        if newest(self.run) < saved:
            found.wrong.append(f"the checkpoint at {saved} images was lost")
        return True

    def wait_for(self, plan: Kill, ranks: Ranks, folder: Path, found: Attempt) -> bool:
        """Wait for the moment of a kill; False if the run ended before, or got stuck."""
        until = time.monotonic() + LONGEST_START
        if plan.moment == "start":
            return not ranks.wait(plan.delay)
        while None in ranks.codes():
            if time.monotonic() > until:
                found.wrong.append(f"no step in {LONGEST_START} s\n{ranks.output()[-3000:]}")
                return False
            records = read_records(folder)
            if len(records.pids) == ranks.size and (records.last or -1) >= plan.nimg:
                break
            time.sleep(0.005)
        saving = plan.moment != "save"
        while not saving and None in ranks.codes():
            time.sleep(0.0005)
            saving = bool(unfinished(self.run) - self.left)
        time.sleep(plan.delay)
        return None in ranks.codes()

    def draw(self, size: int, now: int, num_left: int) -> Kill:
        """Where to kill next, so that all kills fit into the steps that are left."""
        moments = ["step", "step", "save", "save", "start"]
        moment = self.rng.choice(moments[:4] if self.options.torchrun else moments)
        later = self.rng.uniform(0, 2) * (self.end - now) / (num_left + 1)
        nimg = min(now + round(later), self.end - 5 * BATCH)
        victims = [self.rng.randrange(size)]
        delay = {
            "step": self.rng.uniform(0, 0.05),
            "save": self.rng.choice((0, self.rng.uniform(0, 0.01))),
            "start": self.rng.uniform(0, 1.0),
        }[moment]
        if moment == "save" and self.rng.random() < 0.6:
            victims = [0]  # which writes it
        elif self.rng.random() < 0.25:
            victims = list(range(size))  # as if the node had died
        return Kill(moment, nimg, delay, victims)

    def start(self, run: Path, size: int, engine: tuple[str, int]) -> tuple[Ranks, Path]:
        """Start the ranks; returns them and the folder of their records."""
        self.num_started += 1
        folder = self.folder / "attempts" / f"{self.num_started:03d}"
        config = self.folder / f"{self.num_started:03d}.yaml"
        name, zero = engine
        mapping: dict[str, Any] = self.base | {
            "run": str(run),
            "engine": {"name": name, "zero": zero},
        }
        config.write_text(yaml.safe_dump(mapping))
        if self.options.torchrun:
            script = [chaos_worker.__file__, str(config), str(folder / "records")]

            def pids() -> list[int]:
                return [pid for _, pid in sorted(read_records(folder / "records").pids.items())]

            return TorchrunRanks(script, size, folder, pids), folder / "records"
        arguments = (config, folder / "records")
        return ForkedRanks(chaos_worker.train, arguments, size, folder), folder / "records"


def _newest_name(run: Path) -> int:
    """As :func:`newest`, by names alone: fast enough for the moment of a kill."""
    return max((int(p.name) for p in run.glob("*x*/checkpoints/[0-9]*")), default=0)
