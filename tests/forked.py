"""Processes forked from one that has imported already, and torchrun whose ranks are such ones.

A fresh interpreter takes seconds until torch, transformers and TensorBoard are there. What is about
starting itself (tests/launch, tests/slurm, tests/distributed, the README) starts real ones.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
import traceback
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext
from pathlib import Path

REPO = Path(__file__).parents[1]
_ENVIRONMENT = dict(os.environ)  # before any test changes it


def context() -> ForkServerContext:
    """Starts processes by forking one that has done nothing but import ``tests.preloaded``."""
    found = multiprocessing.get_context("forkserver")
    found.set_forkserver_preload(["tests.preloaded"])
    kept = dict(os.environ)
    try:
        os.environ.clear()
        # It finds what it imports by PYTHONPATH alone, and keeps its variables for all that follow.
        fixed = {"PYTHONPATH": str(REPO), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        os.environ.update(_ENVIRONMENT | fixed)
        forkserver.ensure_running()
    finally:
        os.environ.clear()
        os.environ.update(kept)
    return found


def torchrun(
    num_ranks: int, *words: object, timeout: float = 240, **variables: str
) -> subprocess.CompletedProcess[str]:
    """``torchrun --standalone --nproc-per-node NUM_RANKS WORDS``, a script or ``-m`` a module.

    torchrun itself, its agent, and each rank runs ``WORDS`` as an interpreter does; but they are
    forked.

    Args:
        num_ranks: ranks, on this machine.
        words: what each of them runs.
        timeout: seconds for all of it.
        variables: added to the environment.
    """
    command = [str(word) for word in words]
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | variables
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        for name in ("out", "err"):
            (place / name).touch()
        (place / "environment").write_text(json.dumps(dict(environment)))
        agent = context().Process(target=_agent, args=(place, num_ranks, command))
        agent.start()
        agent.join(timeout)
        late = agent.exitcode is None
        if late:
            agent.terminate()  # which ends the ranks
            agent.join(40)
            agent.kill()
        out, err = ((place / name).read_text() for name in ("out", "err"))
    if late:
        raise subprocess.TimeoutExpired(command, timeout, out, err)
    assert agent.exitcode is not None
    return subprocess.CompletedProcess(command, agent.exitcode, out, err)


def _agent(place: Path, num_ranks: int, command: list[str]) -> None:
    _become(place)
    # Otherwise it would start another one, which has imported nothing.
    forkserver._forkserver.ensure_running = lambda: None  # type: ignore[method-assign]
    from torch.distributed.run import main

    flags = ["--standalone", "--nproc-per-node", str(num_ranks)]
    flags += ["--run-path", "--start-method", "forkserver"]
    main([*flags, __file__, str(place), *command])


def _become(place: Path) -> None:
    """Take over the variables, and write to the files of :func:`torchrun`."""
    os.environ.update(json.loads((place / "environment").read_text()))
    sys.stdout.flush()
    sys.stderr.flush()
    for number, name in ((1, "out"), (2, "err")):
        file = os.open(place / name, os.O_WRONLY | os.O_APPEND)
        os.dup2(file, number)
        os.close(file)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]


def _run(command: list[str]) -> None:
    """What the interpreter does with a script, or ``-m`` and a module."""
    try:
        if command[0] == "-m":
            sys.argv = command[1:]
            runpy.run_module(command[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = command
            sys.path.insert(0, str(Path(command[0]).parent))
            runpy.run_path(command[0], run_name="__main__")
    except SystemExit as ended:
        if ended.code:
            raise
    except BaseException:
        traceback.print_exc()
        sys.exit(1)


if __name__ == "__main__":
    _become(Path(sys.argv[1]))
    _run(sys.argv[2:])
