"""HUP, QUIT, nohup, a closed terminal and impatience: a launched run saves, or is left alone."""

from __future__ import annotations

import os
import pty
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from launch.local import signals as signals_module
from launch.local.signals import SignalForwarder
from launch.local.torchrun import _address
from tests.families.tiny import pack_discs, tiny_config
from tests.launch.test_launch_local import (
    ROOT,
    checkpoints,
    environment,
    got,
    result,
    wait_for,
)
from tests.launch.test_launch_local import worker as worker

DEFAULT = {signal.SIGHUP: signal.SIG_DFL, signal.SIGQUIT: signal.SIG_DFL}
IGNORED = {signal.SIGHUP: signal.SIG_IGN, signal.SIGQUIT: signal.SIG_DFL}


def begin(handlers, folder: Path, *words: object) -> subprocess.Popen[str]:
    """``python -m WORDS`` in a process group of its own, with these handlers at its start."""

    def prepare() -> None:
        for number, handler in handlers.items():
            signal.signal(number, handler)

    with (folder / f"log{len(list(folder.glob('log*')))}").open("w") as log:
        return subprocess.Popen(
            [sys.executable, "-m", *map(str, words)],
            cwd=folder,
            env=environment(),
            stdout=log,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            preexec_fn=prepare,
        )


@pytest.fixture
def config(tmp_path):
    """A run of some seconds, as a file."""
    from dinogen.config import dump_config

    pack_discs(tmp_path / "discs")
    changes = ("stages.0.kimg=0.4", "log.every_kimg=0.04", "checkpoint.every_kimg=0.04")
    path = tmp_path / "run.yaml"
    path.write_text(
        dump_config(tiny_config("dcgan", tmp_path / "discs", tmp_path / "run", *changes))
    )
    return path


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGQUIT])
def test_hup_and_quit_let_the_workers_save(worker, number):
    words = ("launch.local.torchrun", "--standalone", "--nproc-per-node", 2, "-m", "worker")
    process = begin(DEFAULT, worker, *words, 0, worker, 0, "catch")
    wait_for(lambda: len(list(worker.glob("*.up"))) == 2)
    os.killpg(process.pid, number)
    os.killpg(process.pid, number)  # a terminal that closes sends it twice
    assert process.wait(120) == 75
    assert got(worker) == ["SIGTERM", "SIGTERM"]


@pytest.mark.parametrize("module", ["launch.local.torchrun", "launch.local.deepspeed"])
def test_what_nohup_ignores_is_ignored_by_all_processes(worker, module):
    if module == "launch.local.deepspeed":
        pytest.importorskip("deepspeed")
    count = ("--standalone", "--nproc-per-node", 2) if module == "launch.local.torchrun" else (2,)
    process = begin(IGNORED, worker, module, *count, "-m", "worker", 0, worker, 0, "catch")
    wait_for(lambda: len(list(worker.glob("*.up"))) == 2)
    os.killpg(process.pid, signal.SIGHUP)
    statuses = [Path(f"/proc/{process.pid}/status").read_text()]
    import psutil

    for child in psutil.Process(process.pid).children(recursive=True):
        statuses.append(Path(f"/proc/{child.pid}/status").read_text())
    for text in statuses:
        facts = dict(line.split(":", 1) for line in text.splitlines())
        assert int(facts["SigIgn"], 16) & 1, facts["Name"]  # HUP is signal 1
    time.sleep(0.5)
    assert process.poll() is None and not got(worker)
    process.send_signal(signal.SIGTERM)
    assert process.wait(120) in (0, 75) and got(worker) == ["SIGTERM", "SIGTERM"]


def test_a_launched_run_saves_at_hup_and_goes_on_under_nohup(config, tmp_path):
    words = ("launch.cli", "launch", config, "--gpus", 2)
    process = begin(DEFAULT, tmp_path, *words)
    wait_for(lambda: checkpoints(config))
    os.killpg(process.pid, signal.SIGHUP)
    assert process.wait(120) == 75, (tmp_path / "log0").read_text()
    saved = max(path.name for path in checkpoints(config))
    process = begin(IGNORED, tmp_path, *words)
    wait_for(lambda: max(path.name for path in checkpoints(config)) > saved)
    os.killpg(process.pid, signal.SIGHUP)
    assert process.wait(240) == 0, (tmp_path / "log1").read_text()
    assert f"resumed from {tmp_path}" in (tmp_path / "log1").read_text()
    assert result(config)["nimg"] == 400


def test_a_closed_terminal_saves(config):
    """The kernel sends HUP, and whatever is written from then on fails."""
    pid, terminal = pty.fork()
    if not pid:
        for number, handler in DEFAULT.items():
            signal.signal(number, handler)
        os.environ |= environment(TERM="xterm")
        os.execv(sys.executable, [sys.executable, "-m", "launch.cli", "train", str(config)])
    os.set_blocking(terminal, False)

    def saved() -> bool:
        with suppress(BlockingIOError):
            os.read(terminal, 1 << 16)
        return bool(checkpoints(config))

    wait_for(saved)
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 75


class Played(SignalForwarder):
    """A SignalForwarder whose one worker is ready, and whose clock and signals are played."""

    def __init__(self, monkeypatch) -> None:
        self.now, self.ended, self.killed = 0.0, [], []
        monkeypatch.setattr(signals_module.time, "monotonic", lambda: self.now)
        monkeypatch.setattr(signals_module, "catches", lambda pid, number: True)
        monkeypatch.setattr(signals_module, "_kill", lambda pid, number: self.killed.append(number))
        monkeypatch.setattr(signals_module.threading, "Thread", lambda **words: self)
        super().__init__(lambda: [7], self.ended.append)

    def start(self) -> None:
        """In place of the thread."""

    def ask(self, number: signal.Signals, after: float) -> None:
        self.now += after
        self._handle(number, None)


def test_impatience_ends_nothing(monkeypatch):
    forwarder = Played(monkeypatch)
    for _ in range(5):
        forwarder.ask(signal.SIGINT, after=0.5)
    for _ in range(5):
        forwarder.ask(signal.SIGHUP, after=60)
    assert forwarder.stopping and forwarder.ended == []
    assert forwarder.killed == [signal.SIGINT] * 4  # the workers know whether they are saving


def test_who_insists_is_obeyed(monkeypatch):
    forwarder = Played(monkeypatch)
    forwarder.ask(signal.SIGTERM, after=0)
    forwarder.ask(signal.SIGTERM, after=6)
    assert forwarder.ended == []
    forwarder.ask(signal.SIGTERM, after=6)
    assert forwarder.ended == [signal.SIGTERM]


def test_one_machine_needs_no_name():
    program = ["-m", "x", "--standalone"]
    assert _address(["--standalone", *program]) == ["--local-addr", "127.0.0.1"]
    assert _address(["--standalone", "--local_addr=10.0.0.1", *program]) == []
    assert _address(["--nnodes=2", *program]) == []  # what stands behind -m is not torchrun's


def unknown_name() -> list[str]:
    """A command line that runs another one where nobody knows the machine's name."""
    place = ["unshare", "--uts", "sh", "-c", 'hostname no-dns-knows-me && exec "$@"', "sh"]
    if shutil.which("unshare") is None:
        pytest.skip("needs unshare")
    done = subprocess.run([*place, "true"], capture_output=True, check=False)
    if done.returncode:
        pytest.skip(f"unshare --uts: {done.stderr!r}")
    return place


def test_a_machine_that_no_dns_knows(worker):
    """torchrun, the store of our ranks, and gloo."""
    with pytest.raises(OSError):
        socket.getaddrinfo("no-dns-knows-me", None)
    (worker / "ranks.py").write_text(
        "from dinogen.distributed import process_group as dist\n"
        "dist.init()\n"
        "assert dist.any_rank(dist.rank() == 1) and dist.world_size() == 2\n"
        "dist.shutdown()\n"
    )
    command = [
        sys.executable,
        "-m",
        "launch.local.torchrun",
        "--standalone",
        "--nproc-per-node",
        "2",
    ]
    done = subprocess.run(
        [*unknown_name(), *command, "-m", "ranks"],
        cwd=worker,
        env=environment(PYTHONPATH=f"{ROOT}:{worker}"),
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "no-dns-knows-me" not in done.stderr
