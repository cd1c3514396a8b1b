"""Runs on this machine: the commands, signals on their way to the workers, restarts, lost nodes."""

from __future__ import annotations

import base64
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from typer.testing import CliRunner

from dinogen.config import dump_config
from dinogen.errors import UserError
from launch.cli.main import app
from launch.local.deepspeed import launcher_command
from launch.local.signals import catches
from tests.families.tiny import pack_discs, tiny_config

ROOT = Path(__file__).parents[2]

# A worker that takes its time to start, says what it is, and saves when it is asked to.
WORKER = """
import os, signal, sys, time
from pathlib import Path
time.sleep(float(sys.argv[1]))
place = Path(sys.argv[2]) / os.environ["RANK"]
def stop(number, frame):
    place.with_suffix(".got").write_text(signal.Signals(number).name)
    sys.exit(int(sys.argv[3]))
if sys.argv[4] == "catch":
    signal.signal(signal.SIGUSR1, stop); signal.signal(signal.SIGTERM, stop)
place.with_suffix(".up").write_text(os.environ["WORLD_SIZE"])
time.sleep(600)
"""


@pytest.fixture
def worker(tmp_path):
    (tmp_path / "worker.py").write_text(WORKER)
    return tmp_path


def environment(**variables: str) -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)} | variables


def start(folder: Path, *words: object) -> subprocess.Popen[str]:
    """``python -m WORDS`` in a session of its own, its words in ``folder/log``."""
    with (folder / f"log{len(list(folder.glob('log*')))}").open("w") as log:
        return subprocess.Popen(
            [sys.executable, "-m", *map(str, words)],
            cwd=folder,
            env=environment(),
            stdout=log,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )


def torchrun(folder: Path, *worker: object) -> subprocess.Popen[str]:
    flags = ("--standalone", "--nproc-per-node", 2, "-m", "worker")
    return start(folder, "launch.local.torchrun", *flags, *worker)


def wait_for(check, seconds: float = 240) -> None:
    until = time.monotonic() + seconds
    while not check():
        assert time.monotonic() < until
        time.sleep(0.1)


def got(folder: Path) -> list[str]:
    return [path.read_text() for path in sorted(folder.glob("*.got"))]


def test_usr1_waits_until_there_are_workers_that_can_take_it(worker):
    process = torchrun(worker, 1.5, worker, 0, "catch")
    time.sleep(0.5)  # torch is still being imported
    process.send_signal(signal.SIGUSR1)
    assert process.wait(120) == 75
    assert got(worker) == ["SIGUSR1", "SIGUSR1"]


def test_a_process_that_was_only_forked_has_no_handler_yet():
    before = signal.signal(signal.SIGUSR1, lambda number, frame: None)
    child = os.fork()
    if not child:
        time.sleep(30)
        os._exit(0)
    try:
        assert catches(os.getpid(), signal.SIGUSR1)
        assert not catches(child, signal.SIGUSR1)  # exec would take it away
        assert not catches(os.getpid(), signal.SIGUSR2)
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        signal.signal(signal.SIGUSR1, before)
    assert not catches(child, signal.SIGUSR1)


def test_term_lets_the_workers_save_and_int_is_term_to_them(worker):
    process = torchrun(worker, 0, worker, 0, "catch")
    wait_for(lambda: len(list(worker.glob("*.up"))) == 2)
    process.send_signal(signal.SIGINT)
    assert process.wait(120) == 75
    assert got(worker) == ["SIGTERM", "SIGTERM"]


def test_workers_that_have_nothing_to_save_end_at_once(worker):
    process = torchrun(worker, 0, worker, 0, "die")
    wait_for(lambda: len(list(worker.glob("*.up"))) == 2)
    process.send_signal(signal.SIGTERM)
    assert process.wait(120) == 128 + signal.SIGTERM


def test_a_failure_is_one_line_and_its_exit_code(worker):
    process = start(worker, "launch.local.torchrun", "--standalone", "-m", "worker", "no-number")
    assert process.wait(120) == 1
    log = (worker / "log0").read_text()
    assert "torchrun: rank 0 failed first: exit code 1" in log
    assert "ChildFailedError" not in log


def test_the_deepspeed_launcher_starts_ranks_on_the_cpu_and_hands_signals_on(worker):
    pytest.importorskip("deepspeed")
    process = start(worker, "launch.local.deepspeed", 2, "-m", "worker", 0, worker, 75, "catch")
    wait_for(lambda: len(list(worker.glob("*.up"))) == 2)
    assert [path.read_text() for path in worker.glob("*.up")] == ["2", "2"]
    process.send_signal(signal.SIGUSR1)
    assert process.wait(120) == 75
    assert got(worker) == ["SIGUSR1", "SIGUSR1"]


def test_the_deepspeed_launcher_keeps_the_gpus_that_were_chosen(monkeypatch):
    def world(count):
        command = launcher_command([str(count), "-m", "launch.cli", "train", "x"])
        (found,) = [word for word in command if word.startswith("--world_info=")]
        return json.loads(base64.urlsafe_b64decode(found.partition("=")[2]))

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert world(2) == {"localhost": ["0", "1"]}
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6,7")
    assert world(2) == {"localhost": ["4", "6"]}
    with pytest.raises(SystemExit, match="fewer than 4 GPUs"):
        world(4)


@pytest.fixture
def config(tmp_path):
    """A run that takes seconds, as a file; of a family that imports no guide."""
    pack_discs(tmp_path / "discs")
    changes = ("stages.0.kimg=0.4", "log.every_kimg=0.04", "checkpoint.every_kimg=0.04")
    path = tmp_path / "run.yaml"
    path.write_text(
        dump_config(tiny_config("dcgan", tmp_path / "discs", tmp_path / "run", *changes))
    )
    return path


def checkpoints(config: Path) -> list[Path]:
    run = Path(yaml.safe_load(config.read_text())["run"])
    return list((run / "16x16" / "checkpoints").glob("0*"))


def result(config: Path) -> dict:
    run = Path(yaml.safe_load(config.read_text())["run"])
    return json.loads((run / "16x16" / "result.json").read_text())


def children(pid: int) -> list[int]:
    text = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True)
    return [int(word) for word in text.stdout.split()]


def test_a_worker_that_is_killed_is_started_again(config, tmp_path):
    words = ("launch", config, "--gpus", 2, "--max-restarts", 2)
    process = start(tmp_path, "launch.cli", *words)
    wait_for(lambda: checkpoints(config))
    os.kill(children(process.pid)[-1], signal.SIGKILL)
    assert process.wait(240) == 0, (tmp_path / "log0").read_text()
    assert "resumed from" in (tmp_path / "log0").read_text()
    assert result(config)["nimg"] == 400


def test_an_error_in_the_config_is_told_once_and_not_tried_again(config, tmp_path):
    words = ("--standalone", "--nproc-per-node", 2, "--max-restarts", 3)
    words += ("-m", "launch.cli", "train", config, "stages.0.batch=1")
    process = start(tmp_path, "launch.local.torchrun", *words)
    assert process.wait(120) == UserError.exit_code
    log = (tmp_path / "log0").read_text()
    assert "smaller than the number of ranks 2" in log
    assert log.count("torchrun: rank") == 1 and "attempts left" not in log
    assert log.count("dinogen: stages: batch 1") <= 2  # once per rank at most


def test_a_lost_node_leaves_the_other_to_go_on(config, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    rdzv = "keep_alive_interval=1,keep_alive_max_attempt=3,last_call_timeout=2"
    words = ("--nnodes=1:2", "--nproc-per-node=1", "--max-restarts=2", "--rdzv-id=x")
    words += ("--rdzv-backend=c10d", f"--rdzv-endpoint=localhost:{port}", f"--rdzv-conf={rdzv}")
    words += ("-m", "launch.cli", "train", config)
    first = start(tmp_path, "launch.local.torchrun", *words)
    wait_for(lambda: socket.socket().connect_ex(("localhost", port)) == 0)
    second = start(tmp_path, "launch.local.torchrun", *words)
    wait_for(lambda: checkpoints(config))
    for pid in (second.pid, *children(second.pid)):
        os.kill(pid, signal.SIGKILL)
    second.wait()
    log = tmp_path / "log0"
    assert first.wait(240) == 0, log.read_text()
    assert "resumed from" in log.read_text()
    assert (result(config)["world_size"], result(config)["nimg"]) == (1, 400)


def dry(*words: object) -> list[str]:
    done = CliRunner().invoke(app, ["launch", *map(str, words), "--dry-run"])
    if done.exception:
        raise done.exception
    return shlex.split(done.stdout)


def test_a_dry_run_prints_what_can_be_pasted(config, monkeypatch):
    monkeypatch.setattr("launch.local.start.usable_cores", lambda: 8)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    name = "run=my runs/a"
    words = dry(config, name, "--gpus", 4, "--stages", "16")
    assert words[:4] == ["OMP_NUM_THREADS=2", sys.executable, "-m", "launch.local.torchrun"]
    assert words[words.index("--nproc-per-node") + 1] == "4"
    assert words[words.index("train") :] == ["train", str(config), name, "--stage", "16"]
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert dry(config, "--gpus", 4)[0] == sys.executable


def test_the_engine_chooses_the_launcher(config):
    pytest.importorskip("deepspeed")
    words = dry(config, "--gpus", 2, "--engine", "deepspeed")
    assert words[words.index("-m") + 1] == "launch.local.deepspeed"
    assert "engine.name=deepspeed" in words
    assert "launch.local.deepspeed" in dry(config, "engine.name=deepspeed")
    assert "launch.local.torchrun" in dry(config, "engine.name=deepspeed", "--engine", "ddp")


def test_more_gpus_than_there_are(config, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UserError, match="--gpus 4: this machine has 2"):
        dry(config, "--gpus", 4)
    assert "2" in dry(config)  # all of them


def test_without_gpus_it_says_so(config):
    if torch.cuda.is_available():
        pytest.skip("this machine has GPUs")
    command = [sys.executable, "-m", "launch.cli", "launch", config, "--gpus", "2", "--dry-run"]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert "no GPU here: 2 processes on the CPU" in done.stderr


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--nodes", 2), "--nodes is for --on slurm"),
        (("--photos", "x"), "--photos is for --on slurm"),
        (("--on", "moon"), "--on moon: runs are started on local or slurm"),
        (("--stages", "8"), "stage 8 is not in the config"),
        (("--stages", "four"), "write one resolution, such as 8, or a range"),
    ],
)
def test_what_cannot_be_started_is_one_error(config, words, told):
    with pytest.raises(UserError, match=told):
        dry(config, *words)
