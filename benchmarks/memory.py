"""Peak memory and time of a step by the size of its batch, whole and in parts.

    python benchmarks/memory.py configs/guided_energy_64.yaml data.path=data/faces_64
    python benchmarks/memory.py CONFIG --whole 64 256 --parts 256 2048 --micro 64 [KEY=VALUE]...

Trains one step of the config's first stage per row, each in a process of its own. An objective that
compares distributions is over the whole batch in both: in parts by gradient caching. Memory is that
of the GPU where there is one, else of the process; the first row, two samples, is what all have.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from dinogen.config import load_config

COLUMNS = ("batch", "at once", "peak MiB", "over first", "s of step")


def main() -> None:
    """Measure each batch and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("config", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--whole", type=int, nargs="*", default=[64, 256])
    parser.add_argument("--parts", type=int, nargs="*", default=[256, 2048])
    parser.add_argument("--micro", type=int, default=64)
    options = parser.parse_intermixed_args()
    rows = [(2, 2)]
    rows += [(batch, batch) for batch in options.whole]
    rows += [(batch, options.micro) for batch in options.parts]
    print("".join(f"{name:>12}" for name in COLUMNS))
    first = None
    for batch, micro in rows:
        peak, seconds = measure(options, batch, micro)
        first = peak if first is None else first
        print(f"{batch:12}{micro:12}{peak:12.0f}{peak - first:12.0f}{seconds:12.1f}", flush=True)


def measure(options: argparse.Namespace, batch: int, micro: int) -> tuple[float, float]:
    """(peak in MiB, seconds) of a run of one step."""
    stage = str(load_config(options.config).stages[0].resolution)
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "launch.cli", "train", str(options.config)]
        command += options.overrides
        command += [f"run={folder}/run", f"stages.0.batch={batch}", f"stages.0.kimg={batch / 1000}"]
        command += ["stages.0.fade_kimg=0", f"engine.micro_batch={micro}", "log.num_samples=1"]
        with (Path(folder) / "log").open("w+") as log:
            child = subprocess.Popen([*command, "--stage", stage], stdout=log, stderr=log)
            # wait4 and not wait: it alone says what this very child used
            _, status, usage = os.wait4(child.pid, 0)
            child.returncode = os.waitstatus_to_exitcode(status)
            if child.returncode:
                log.seek(0)
                sys.exit(f"batch {batch}, {micro} at once: failed\n{log.read()[-3000:]}")
        (result,) = (json.loads(p.read_text()) for p in Path(folder).glob("run/*x*/result.json"))
    peak = result["peak_memory_mb"] or usage.ru_maxrss / 1024
    return peak, result["seconds"]


if __name__ == "__main__":
    main()
