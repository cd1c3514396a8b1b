"""A played SLURM: its programs, the states of its jobs, and what was submitted to it."""

from __future__ import annotations

import fcntl

from dinogen.files import write_text

# Jobs are lines "ID STATE REASON CODE" in $SLURM_PLAYED/jobs, changed under a lock,
# for a study submits one job while another ends.
SBATCH = """#!/usr/bin/env bash
cd "$SLURM_PLAYED"; exec 9> lock; flock 9; echo "$*" >> submitted
if [[ -e refuse && "$*" == *"$(cat refuse)"* ]]; then
    echo "sbatch: error: invalid partition specified: nowhere" >&2; exit 1
fi
id=$(( $(wc -l < jobs) + 101 )); echo "$id PENDING Dependency 0" >> jobs; echo "$id;mini"
"""
SCONTROL = """#!/usr/bin/env bash
line=$(grep "^${!#} " "$SLURM_PLAYED/jobs")
[[ -n $line ]] || { echo "slurm_load_jobs error: Invalid job id specified" >&2; exit 1; }
set -- $line
echo "JobId=$1 JobName=x JobState=$2 Reason=$3 Dependency=(null) Restarts=0 ExitCode=$4:0"
"""
SCANCEL = """#!/usr/bin/env bash
exec 9> "$SLURM_PLAYED/lock"; flock 9
echo "$1" >> "$SLURM_PLAYED/cancelled"
sed -i "s/^$1 .*/$1 CANCELLED None 0/" "$SLURM_PLAYED/jobs"
"""


def set_state(folder, number, state, reason="None", code=0):
    new = f"{number} {state} {reason} {code}"
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        lines = (folder / "jobs").read_text().splitlines()
        text = "".join(f"{new if line.startswith(f'{number} ') else line}\n" for line in lines)
        write_text(folder / "jobs", text)


def submitted(folder):
    path = folder / "submitted"
    return path.read_text().splitlines() if path.exists() else []
