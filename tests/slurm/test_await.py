"""`await` of slurm/common.sh: whatever signals come, it returns what the child ended with."""

from __future__ import annotations

import subprocess
from pathlib import Path

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


def start(script: str) -> subprocess.Popen[str]:
    words = ["bash", "-c", script, "test", str(SLURM)]
    return subprocess.Popen(words, stdout=subprocess.PIPE, text=True)


def test_signals_do_not_hide_how_the_child_ended():
    shells = [start(ROUNDS) for _ in range(6)]  # the moment is not always met
    for shell in shells:
        out, _ = shell.communicate(timeout=120)
        assert (out.split(), shell.returncode) == (["75"] * 6 + ["yes"], 0)


def test_a_child_that_is_gone_already_is_remembered():
    assert start(GONE).communicate(timeout=120)[0].split() == ["3"]
