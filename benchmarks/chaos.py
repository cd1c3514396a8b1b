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
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from chaos_checks import check_curve, check_keys, distances
from chaos_run import ENGINES, NUM_SAMPLES, Attempt, Chaos
from ranks import preload

TOLERANCE = 1e-4


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
    parser.add_argument("--steps", type=int, default=120, help="of the run, both stages")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--engine", choices=[*ENGINES, "any"], default="auto")
    parser.add_argument("--fixed-world", type=int, metavar="N", help="always that many ranks")
    parser.add_argument("--torchrun", action="store_true", help="start the ranks by torchrun")
    options = parser.parse_args()
    if options.fixed_world and options.engine == "any":
        parser.error("--fixed-world compares bitwise, which takes one --engine")
    os.environ["OMP_NUM_THREADS"] = "1"
    began = time.monotonic()
    logging.getLogger("tensorboard").setLevel(logging.ERROR)  # it tells of every purge
    preload(deepspeed=options.engine != "auto")
    with tempfile.TemporaryDirectory() as folder:
        chaos = Chaos(Path(folder), options, say)
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
