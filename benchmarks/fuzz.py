"""Two and three ranks in every problem: each case ends with the right result or the right error.

    python benchmarks/fuzz.py                 200 cases
    python benchmarks/fuzz.py --cases 16      fewer
    python benchmarks/fuzz.py --only 37       one of them, and all that its ranks wrote

A right result has the weights, the keys and the metric values of one process. A right error is said
by the rank that fails, and by rank 0, and ends all ranks within seconds. Nothing may hang.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import tempfile
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import discs
import fuzz_worker
import torch
import yaml
from chaos_checks import distances, read_records
from fuzz_cases import Case, draw
from fuzz_data import FuzzData
from ranks import ForkedRanks, preload

ENDS_WITHIN = 60.0  # seconds for a case that goes well, on a busy machine
FAILS_WITHIN = 15.0  # seconds for all ranks, once one of them has failed
KILLED_WITHIN = 40.0  # once one was killed, which may show by its silence alone, after 15 s
STOPPED = 75
TOLERANCE = 1e-4


class Violation(Exception):
    """The case did not end as it has to."""


class Fuzz:
    """Runs cases in a folder of its own.

    Args:
        folder: for everything.

    Attributes:
        seconds: from the newest failure of a rank to the end of all.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.seconds = folder, 0.0
        self.data = FuzzData(folder)

    def run(self, case: Case) -> str:
        """Run a case; returns what it ended with.

        Raises:
            Violation: it did not end as it has to.
        """
        place = self.folder / f"{case.number:03d}"
        self.data.make(place / "data", case)
        alone = place / "alone"
        whole = case.error is None
        if case.work == "evaluate" or whole:
            failed = self.train_alone(place, case)
            if failed is not None:
                case, whole = replace(case, error=re.escape(failed)), False
        if case.work == "train":
            return self.check_training(place, case)
        options = ("--stage", "4", *case.options)
        expected = None
        if whole:
            arguments = (alone, options, None, case.number)
            _finish(ForkedRanks(fuzz_worker.evaluate, arguments, 1, place / "log-alone"), 0)
            expected = _evaluation(alone)
        ranks = ForkedRanks(
            fuzz_worker.evaluate,
            (alone, options, case.fault, case.number),
            case.size,
            place / "log",
            case.node_each,
        )
        if not whole and (case.fault is None or case.fault.how == "ConfigError"):
            return check_reason(ranks, case)
        if not whole:
            return self.check_error(ranks, case, alone)
        _finish(ranks, 0)
        _same_values(_evaluation(alone), expected)
        return "same values"

    def check_training(self, place: Path, case: Case) -> str:
        """Train on several ranks; compare with one process, or look at the error."""
        config = self.config(place, "together", case, case.size)
        records = place / "records"
        arguments = (config, records, case.fault, case.number)
        ranks = ForkedRanks(fuzz_worker.train, arguments, case.size, place / "log", case.node_each)
        if case.error is not None:
            return self.check_error(ranks, case, records)
        stopped = case.fault is not None and case.fault.how == "stop"
        if stopped:
            _finish(ranks, STOPPED, 0)
            stopped = STOPPED in ranks.codes()
            arguments = (config, records, None, case.number)
            ranks = ForkedRanks(
                fuzz_worker.train, arguments, case.size, place / "log-again", case.node_each
            )
        _finish(ranks, 0)
        mine, theirs = read_records(records).steps, read_records(place / "records-alone").steps
        if read_records(records).twice or mine != theirs:
            raise Violation("other samples than in one process")
        apart = distances(place / "together", place / "alone")
        if max(apart.values()) > TOLERANCE:
            raise Violation(f"apart from one process: {apart}")
        results = [
            json.loads((place / run / "4x4" / "result.json").read_text())
            for run in ("together", "alone")
        ]
        for key in ("nimg", "num_skipped", "health"):
            if results[0][key] != results[1][key]:
                raise Violation(f"{key} is {results[0][key]} instead of {results[1][key]}")
        return "stopped, then same result" if stopped else "same result"

    def check_error(self, ranks: ForkedRanks, case: Case, records: Path) -> str:
        """All ranks end with an error, and it says what it has to."""
        fault = records / "fault"
        killed = case.fault is not None and case.fault.how == "kill"
        limit = KILLED_WITHIN if killed else FAILS_WITHIN
        until = time.time() + ENDS_WITHIN
        while not ranks.wait(0.05):
            if time.time() > until or (
                fault.exists() and time.time() > fault.stat().st_mtime + limit
            ):
                raise Violation(f"hangs: {ranks.codes()}\n{_end(ranks)}")
        self.seconds = time.time() - fault.stat().st_mtime if fault.exists() else 0.0
        if 0 in ranks.codes():
            raise Violation(f"exit codes {ranks.codes()}\n{_end(ranks)}")
        speakers = {0, *([case.fault.rank] if case.fault else [])}
        if case.node_each:
            speakers = set(range(case.size))
        if case.fault and case.fault.how in ("kill", "exit", "interrupt"):
            speakers -= {case.fault.rank}
        assert case.error is not None
        for rank in speakers:
            if not re.search(case.error, ranks.log(rank).read_text()):
                raise Violation(f"rank {rank} does not say {case.error!r}\n{_end(ranks)}")
        return f"right error ({self.seconds:.1f} s)" if self.seconds else "right error"

    def train_alone(self, place: Path, case: Case) -> str | None:
        """Train in one process; returns its error, if too much is damaged."""
        arguments = (self.config(place, "alone", case, 1), place / "records-alone")
        logs = place / "log-alone"
        ranks = ForkedRanks(fuzz_worker.train, (*arguments, None, case.number), 1, logs)
        ended = ranks.wait(ENDS_WITHIN)
        last = _end(ranks).splitlines()[-1]
        if ended and ranks.codes() == [1] and case.kind == "corrupt":
            return last.removeprefix("dinogen: ")
        if not ended or ranks.codes() != [0]:
            raise Violation(f"one process ended with {ranks.codes()}\n{_end(ranks)}")
        return None

    def config(self, place: Path, run: str, case: Case, size: int) -> Path:
        """Write the YAML of a run."""
        given = dict(case.config)
        batch, steps = given.pop("batch"), given.pop("steps")
        num_images = steps * batch - (given.pop("last") and batch > 1)
        stage = {"resolution": 4, "kimg": num_images / 1000, "batch": batch, "lr": 0.002}
        stages = [stage]
        if given.pop("two_stages"):
            stages.append(stage | {"resolution": 8, "fade_kimg": num_images / 2000})
        base = discs.settings(place / "data", self.folder / "guide") | {
            "run": str(place / run),
            "stages": stages,
            "checkpoint": {"every_kimg": 2 * batch / 1000},
            "metrics": {"num_samples": 32, "num_bootstrap": 2},
            "log": {
                "every_kimg": batch / 1000,
                "probe_kimg": 2 * batch / 1000,
                "samples_kimg": 2 * batch / 1000,
                "num_samples": 2,
            },
            "engine": {"name": "single"},
        }
        base["family"]["probe_samples"] = 2
        if size > 1:
            base["engine"] = {"name": case.engine[0], "zero": case.engine[1]}
        for key, value in given.items():
            section, _, name = key.partition(".")
            base[section][name] = value
        path = place / f"{run}.yaml"
        path.write_text(yaml.safe_dump(base))
        return path


def check_reason(ranks: ForkedRanks, case: Case) -> str:
    """What cannot be measured stops nothing else, and rank 0 says why it is missing."""
    _finish(ranks, 0)
    assert case.error is not None
    for line in ranks.log(0).read_text().splitlines():
        if line.startswith("  not available: held_out: ") and re.search(case.error, line):
            return "right reason"
    raise Violation(f"rank 0 does not say {case.error!r}\n{_end(ranks)}")


def _finish(ranks: ForkedRanks, *codes: int) -> None:
    """Wait for all ranks to end with one of some exit codes, the same for all."""
    ended = ranks.wait(ENDS_WITHIN)
    if not ended or len(set(ranks.codes())) > 1 or ranks.codes()[0] not in codes:
        what = "exit codes" if ended else "hangs:"
        raise Violation(f"{what} {ranks.codes()}\n{_end(ranks)}")


def _end(ranks: ForkedRanks) -> str:
    """End what is left; returns what the ranks wrote."""
    ranks.end()
    lines = ranks.output().splitlines()
    return "\n".join(line for line in lines if not line.startswith("frame #"))


def _evaluation(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "4x4" / "evaluation.json").read_text())
    (run / "4x4" / "evaluation.json").unlink()
    del found["world_size"]
    found.pop("sampling", None)  # how fast
    found["metrics"] |= {
        name: metric_value.pop("value")
        for name, metric_value in found["measured"].items()
        if metric_value["value"] is not None
    }
    for metric_value in found["measured"].values():
        metric_value.pop("spread")
    return found


def _same_values(mine: dict[str, Any], theirs: dict[str, Any] | None) -> None:
    assert theirs is not None
    a, b = mine.pop("metrics"), theirs.pop("metrics")
    if mine != theirs or a.keys() != b.keys():
        raise Violation(f"{mine} instead of {theirs}")
    for name in a:
        if abs(a[name] - b[name]) > TOLERANCE * abs(b[name]):
            raise Violation(f"{name} is {a[name]} instead of {b[name]}")


def main() -> None:
    """Run the cases; one line each, one table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, metavar="NUMBER", help="one case, with its output")
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    began = time.monotonic()
    preload(deepspeed=True)
    numbers = range(options.cases) if options.only is None else [options.only]
    ended: Counter[tuple[str, str]] = Counter()
    longest = longest_end = 0.0
    failed = []
    with tempfile.TemporaryDirectory() as folder:
        fuzz = Fuzz(Path(folder))
        for number in numbers:
            case, before = draw(options.seed, number), time.monotonic()
            try:
                found = fuzz.run(case)
            except Violation as violation:
                found, text = "WRONG", str(violation)
                failed.append(number)
            seconds = time.monotonic() - before
            longest = max(longest, seconds)
            longest_end = max(longest_end, fuzz.seconds)
            print(f"{number:>4} {found:<26}{seconds:5.1f} s  {case.title}", flush=True)
            if found == "WRONG":
                print(text, flush=True)
            if options.only is not None:
                for log in sorted(Path(folder).glob("*/log*/*.log")):
                    print(f"--- {log.relative_to(folder)}\n{log.read_text()}")
            ended[case.kind.removesuffix(" again"), found.partition(" (")[0]] += 1
    print()
    for (kind, found), num in sorted(ended.items()):
        print(f"{kind:<14}{found:<28}{num:>4}")
    print(f"{len(numbers)} cases, {len(failed)} wrong {failed or ''}")
    print(f"longest from a failure to the end of all ranks {longest_end:.1f} s")
    print(f"longest case {longest:.1f} s, all {time.monotonic() - began:.0f} s")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
