"""Many kills by benchmarks/chaos.py: any engine, a fixed number of ranks, under torchrun."""

from __future__ import annotations

import pytest

from tests.training.benchmarks import benchmark  # noqa: F401


@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    "options",
    [
        ("--kills", "30", "--engine", "any"),
        ("--kills", "20", "--fixed-world", "2", "--engine", "zero1"),
        ("--kills", "5", "--torchrun"),
    ],
    ids=["any-engine", "bitwise", "torchrun"],
)
def test_a_run_killed_many_times_ends_as_one_that_was_left_alone(benchmark, options):  # noqa: F811
    printed = benchmark("chaos", "--steps", "120", *options)
    table = dict(line.split("  ", 1) for line in printed.splitlines() if "  " in line)
    assert table["kills"].strip().startswith(f"{options[1]} (")
    assert table["violations"].strip() == "0"
