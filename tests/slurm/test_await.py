"""`await` of slurm/common.sh: whatever signals come, it returns what the child ended with."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

SLURM = Path(__file__).parents[2] / "slurm"
# Signals come all the while, the last in the very moment in which the child ends.
ROUNDS = """
set -e
DINOGEN_SLURM=$1
. "$1/common.sh"
trap 'told=yes' USR1
for round in 1 2 3 4 5 6; do
    (for _ in 1 2 3 4 5; do sleep 0.02; kill -USR1 $$; done; exit 75) &
    child=$!
    code=0
    await "$child" || code=$?
    echo "$code"
done
echo "$told"
"""
GONE = """
set -e
DINOGEN_SLURM=$1
. "$1/common.sh"
(exit 3) &
child=$!
sleep 0.2
await "$child" || echo "$?"
"""


def bash(script: str) -> list[str]:
    done = subprocess.run(
        ["bash", "-c", script, "test", str(SLURM)],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    return done.stdout.split()


def test_signals_do_not_hide_how_the_child_ended():
    assert bash(ROUNDS) == ["75"] * 6 + ["yes"]


@pytest.mark.parametrize("times", range(3))
def test_a_child_that_is_gone_already_is_remembered(times):
    assert bash(GONE) == ["3"]
