"""Kills a training at random moments, and shows that it ends as one that was left alone.

    python benchmarks/chaos.py                                 30 kills, 1 to 3 ranks after each
    python benchmarks/chaos.py --engine any                    and another engine too
    python benchmarks/chaos.py --fixed-world 2 --engine zero1  bitwise the same end
    python benchmarks/chaos.py --torchrun --kills 3            the ranks started by torchrun

Two stages with a fade-in. SIGKILL hits any rank or all of them, at a random step, in the midst of a
save, or while they start. Ends with 1 if anything is not as in the uninterrupted run.
"""

from __future__ import annotations

import argparse
import logging
import os
import random
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import chaos_worker
import discs
import yaml
from chaos_checks import (
    Records,
    check_curve,
    check_keys,
    distances,
    newest,
    read_records,
    unfinished,
)
from ranks import ForkedRanks, Ranks, TorchrunRanks, call, kill, preload

NUM_SAMPLES = 40
BATCH = 8
ENDS_WITHIN = 15.0  # seconds for the ranks that are left, by themselves
SILENT = 15.0  # and so many more where DeepSpeed makes its groups: nothing but silence tells
LONGEST_START = 180.0  # seconds without a step after which a start counts as hung
TOLERANCE = 1e-4
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
    """

    def __init__(self, folder: Path, options: argparse.Namespace) -> None:
        self.folder, self.options = folder, options
        self.rng = random.Random(options.seed)
        call(discs.make, folder, NUM_SAMPLES)
        self.base = discs.settings(folder / "data", folder / "guide") | {
            "stages": [
                {"resolution": 4, "kimg": 0.4, "batch": BATCH, "lr": 0.002},
                {"resolution": 8, "kimg": 0.56, "fade_kimg": 0.24, "batch": BATCH, "lr": 0.002},
            ],
            "checkpoint": {"every_kimg": 0.024},
            "log": {
                "every_kimg": 0.016,
                "probe_kimg": 0.08,
                "samples_kimg": 0.16,
                "num_samples": 4,
            },
        }
        self.end = 960
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
            say(len(attempts), attempts[-1])
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
        saved = newest_name(self.run)
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
        ahead = self.rng.uniform(0, 2) * (self.end - now) / (num_left + 1)
        nimg = min(now + round(ahead), self.end - 5 * BATCH)
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


def newest_name(run: Path) -> int:
    """As :func:`newest`, by names alone: fast enough for the moment of a kill."""
    return max((int(p.name) for p in run.glob("*x*/checkpoints/[0-9]*")), default=0)


def say(number: int, attempt: Attempt) -> None:
    """One line per start."""
    steps = attempt.records.steps
    print(
        f"{number:>3} {attempt.size} x {attempt.engine:<5} from {attempt.expected:>4}: "
        f"{len(steps):>3} steps, {attempt.moment:<9}"
        + (" (half a checkpoint left)" if attempt.in_save else "")
        + (f" others ended in {attempt.ended:.1f} s" if attempt.moment != "finished" else ""),
        flush=True,
    )
    for text in attempt.wrong:
        print(f"    WRONG: {text}", flush=True)


def main() -> None:
    """Train, kill, compare; one table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--engine", choices=[*ENGINES, "any"], default="auto")
    parser.add_argument("--fixed-world", type=int, metavar="N", help="always so many ranks")
    parser.add_argument("--torchrun", action="store_true", help="start the ranks by torchrun")
    options = parser.parse_args()
    if options.fixed_world and options.engine == "any":
        parser.error("--fixed-world compares bitwise, which takes one --engine")
    os.environ["OMP_NUM_THREADS"] = "1"
    began = time.monotonic()
    logging.getLogger("tensorboard").setLevel(logging.ERROR)  # it tells of every purge
    preload(deepspeed=options.engine != "auto")
    with tempfile.TemporaryDirectory() as folder:
        chaos = Chaos(Path(folder), options)
        whole = chaos.uninterrupted()
        attempts = chaos.killed()
        wrong = [text for attempt in attempts for text in attempt.wrong]
        apart: dict[str, float] = {}
        if not wrong:
            wrong += check_keys([a.records for a in attempts], whole, NUM_SAMPLES)
            # sums of a line that was cut in two are added in another order, in float64
            wrong += check_curve(
                chaos.run, chaos.whole, 1e-12 if options.fixed_world else TOLERANCE
            )
            tolerance = 0.0 if options.fixed_world else TOLERANCE
            apart = distances(chaos.run, chaos.whole)
            wrong += [f"{f}: {x:.2e} apart" for f, x in apart.items() if x > tolerance]
    kills = [attempt for attempt in attempts if attempt.moment != "finished"]
    if len(kills) < options.kills:
        wrong.append(f"only {len(kills)} of {options.kills} kills came before the end")
    sizes = Counter(attempt.size for attempt in attempts)
    moments = Counter(kill.moment for kill in kills)
    num_steps = sum(len(attempt.records.steps) for attempt in attempts)
    table = {
        "kills": f"{len(kills)} ({', '.join(f'{n} at a {m}' for m, n in moments.items())})",
        "left half a checkpoint": sum(kill.in_save for kill in kills),
        "starts by number of ranks": ", ".join(f"{n} x {s}" for s, n in sorted(sizes.items())),
        "engines": ", ".join(sorted({attempt.engine for attempt in attempts})),
        "steps of the run": len(whole.steps),
        "steps redone": num_steps - len({n for a in attempts for n in a.records.steps}),
        "longest end of the others": f"{max((k.ended for k in kills), default=0):.1f} s",
        "apart from uninterrupted": ", ".join(f"{f} {x:.1e}" for f, x in apart.items()),
        "seconds": round(time.monotonic() - began),
        "violations": len(wrong),
    }
    print()
    for name, value in table.items():
        print(f"{name:<28}{value}")
    for text in wrong:
        print(f"WRONG: {text}")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
