"""Many cases of benchmarks/fuzz.py and benchmarks/fuzz_tars.py; the suite has a few of each."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.training.benchmarks import FOLDER, benchmark  # noqa: F401


@pytest.mark.timeout(3600)
def test_every_kind_of_problem_eight_times(benchmark):  # noqa: F811
    printed = benchmark("fuzz", "--cases", "96")
    assert "96 cases, 0 wrong" in printed


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("first", [0, 1000])
def test_many_tars_and_mishaps(first):
    options = ["--tars", "400", "--mishaps", "500", "--first", str(first)]
    command = [sys.executable, str(FOLDER / "fuzz_tars.py"), *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert "; 0 cases failed" in done.stdout
