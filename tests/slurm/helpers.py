"""Looks at the mini Slurm and its nodes by SLURM's own programs, not by ours."""

from __future__ import annotations

import re
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]


def wait_for(what: str, check: Callable[[], object], seconds: float) -> None:
    """Poll until ``check`` is true."""
    until = time.monotonic() + seconds
    while not check():
        assert time.monotonic() < until, f"{what}: not within {seconds} s"
        time.sleep(0.2)


@dataclass(frozen=True)
class Cluster:
    """The mini Slurm.

    Attributes:
        tool: mini-slurm.sh, which can crash and boot nodes; None if it is not here.
        folder: where the cluster lives.
    """

    tool: Path | None
    folder: Path

    def job(self, number: str) -> dict[str, str]:
        """What scontrol knows of a job."""
        line = subprocess.check_output(["scontrol", "-o", "show", "job", number], text=True)
        return dict(re.findall(r"(\w+)=(\S*)", line))

    def state(self, number: str) -> str:
        return self.job(number)["JobState"]

    def wait(self, number: str, state: str, seconds: float, log: Path | None = None) -> None:
        """Wait for a state; another end than that one fails at once."""
        ends = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL"}

        def check() -> bool:
            now = self.state(number)
            told = log.read_text() if log and log.is_file() else ""
            assert now == state or now not in ends, f"job {number} is {now}\n{told[-4000:]}"
            return now == state

        wait_for(f"job {number} {state}", check, seconds)

    def node(self, verb: str, name: str) -> None:
        """``crash`` or ``boot`` a node."""
        command = [str(self.tool), verb, name]
        environment = {"MINI_SLURM_DIR": str(self.folder), "PATH": "/usr/sbin:/usr/bin:/sbin:/bin"}
        subprocess.run(command, env=environment, check=True, capture_output=True)

    def num_idle(self) -> int:
        return (
            subprocess.check_output(["sinfo", "-h", "-N", "-p", "main", "-o", "%T"], text=True)
            .split()
            .count("idle")
        )

    def cancel_all(self) -> None:
        numbers = subprocess.check_output(["squeue", "-h", "-o", "%A"], text=True).split()
        for number in set(numbers):
            subprocess.run(["scancel", number], check=False)
