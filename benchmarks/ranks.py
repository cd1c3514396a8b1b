"""A group of ranks as separate processes on this machine: started, killed, waited for."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

REPO = Path(__file__).parents[1]
SILENT = 15.0  # seconds without a sign of life after which a rank is gone


class Ranks(Protocol):
    """What both ways of starting ranks have in common."""

    size: int

    def pids(self) -> list[int]:
        """Process ids by rank."""

    def terminate(self) -> None:
        """SIGTERM to all that are left."""

    def wait(self, seconds: float) -> bool:
        """Whether all ranks end within so long."""

    def codes(self) -> list[int | None]:
        """Exit codes; None of what still runs, negative after a signal."""

    def output(self) -> str:
        """What they wrote to stdout and stderr."""

    def end(self) -> None:
        """Kill what is left."""


class ForkedRanks:
    """Ranks forked from a process that has done nothing but import.

    Args:
        work: a function of a module, called in every rank.
        arguments: for it.
        size: number of ranks.
        folder: for what they write, ``<rank>.log``.
        node_each: whether each rank believes to be on a node of its own.
    """

    def __init__(
        self,
        work: Callable[..., None],
        arguments: tuple[Any, ...],
        size: int,
        folder: Path,
        node_each: bool = False,
    ) -> None:
        self.size, self.folder = size, folder
        folder.mkdir(parents=True, exist_ok=True)
        context = multiprocessing.get_context("forkserver")
        port = free_port()
        self.processes = []
        for rank in range(size):
            place = {
                "RANK": rank,
                "WORLD_SIZE": size,
                "LOCAL_RANK": 0 if node_each else rank,
                "LOCAL_WORLD_SIZE": 1 if node_each else size,
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
            }
            environment = {key: str(value) for key, value in place.items()} if size > 1 else {}
            process = context.Process(
                target=_rank, args=(environment, self.log(rank), work, arguments), daemon=True
            )
            process.start()
            self.processes.append(process)

    def log(self, rank: int) -> Path:
        """What a rank wrote."""
        return self.folder / f"{rank}.log"

    def pids(self) -> list[int]:
        """Process ids by rank."""
        return [process.pid or 0 for process in self.processes]

    def terminate(self) -> None:
        """SIGTERM to all that are left, as torchrun does."""
        for process in self.processes:
            if process.exitcode is None:
                process.terminate()

    def wait(self, seconds: float) -> bool:
        """Whether all ranks end within so long."""
        until = time.monotonic() + seconds
        for process in self.processes:
            process.join(max(0.0, until - time.monotonic()))
        return None not in self.codes()

    def codes(self) -> list[int | None]:
        """Exit codes; None of what still runs, negative after a signal."""
        return [process.exitcode for process in self.processes]

    def output(self) -> str:
        """What they wrote to stdout and stderr, rank by rank."""
        logs = [self.log(rank) for rank in range(self.size)]
        return "".join(f"--- rank {p.stem}\n{p.read_text()}" for p in logs if p.exists())

    def end(self) -> None:
        """Kill what is left."""
        for process in self.processes:
            if process.exitcode is None:
                process.kill()
            process.join()


class TorchrunRanks:
    """Ranks started by torchrun.

    Args:
        script: what they run, and its arguments.
        size: number of ranks.
        folder: for what they write, ``torchrun.log``.
        pids: finds their process ids, by rank, once they run.
    """

    def __init__(
        self, script: list[str], size: int, folder: Path, pids: Callable[[], list[int]]
    ) -> None:
        self.size, self.pids = size, pids
        folder.mkdir(parents=True, exist_ok=True)
        self.log = folder / "torchrun.log"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc-per-node", str(size), *script]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPO)}
        environment["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
        with self.log.open("w") as file:
            self.process = subprocess.Popen(command, env=environment, stdout=file, stderr=file)

    def terminate(self) -> None:
        """Nothing: that is what torchrun is for."""

    def wait(self, seconds: float) -> bool:
        """Whether torchrun, and so all ranks, ends within so long."""
        try:
            self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            return False
        return True

    def codes(self) -> list[int | None]:
        """The exit code of torchrun alone, which it ends with if any rank failed."""
        return [self.process.poll()]

    def output(self) -> str:
        """What torchrun and its ranks wrote."""
        return self.log.read_text()

    def end(self) -> None:
        """Kill what is left."""
        for pid in self.pids() if self.process.poll() is None else ():
            kill(pid)
        self.process.kill()
        self.process.wait()


def preload(deepspeed: bool) -> None:
    """What the process that ranks are forked from has to import; to be said before the first start.

    Args:
        deepspeed: whether a rank uses it.
    """
    # it finds modules beside this one by the environment alone
    paths = [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    # the second is what ZeRO imports at its first use, for seconds
    modules = ["deepspeed", "deepspeed.runtime.zero.muon.muon_optimizer"] if deepspeed else []
    multiprocessing.get_context("forkserver").set_forkserver_preload(["imports", *modules])


def call(work: Callable[..., None], *arguments: Any) -> None:
    """Call a function in one forked process, which has imported already what takes long.

    Raises:
        RuntimeError: it failed.
    """
    context = multiprocessing.get_context("forkserver")
    process = context.Process(target=work, args=arguments, daemon=True)
    process.start()
    process.join()
    if process.exitcode:
        raise RuntimeError(f"{work.__name__} failed with {process.exitcode}")


def kill(pid: int) -> None:
    """SIGKILL; nothing if it is gone already."""
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


def _rank(
    environment: dict[str, str], log: Path, work: Callable[..., None], arguments: tuple[Any, ...]
) -> None:
    """One rank, in its own process."""
    import torch

    from dinogen.distributed import failure

    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    for key in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        os.environ.pop(key, None)
    os.environ |= environment | {"OMP_NUM_THREADS": "1"}
    torch.set_num_threads(1)
    # torchrun would notice a killed rank at once; here nothing but its silence may tell.
    failure._SILENT = SILENT
    work(*arguments)
