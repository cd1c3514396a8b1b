"""Starts a run on this machine: the torchrun or DeepSpeed command replaces this process."""

from __future__ import annotations

import logging
import os
import shlex
import sys
from importlib.util import find_spec

from dinogen.errors import UserError
from launch.doctor import usable_cores
from launch.request import Request, choose_stages

log = logging.getLogger(__name__)


def launch_local(request: Request) -> None:
    """Start the run, or print the command; on success this function does not return.

    The command replaces this process, so signals reach it and its exit code is ours: 75 if it was
    asked to stop and saved.

    Raises:
        UserError: more GPUs are requested than there are, DeepSpeed is not installed, or the run
            would be refused at its start.
    """
    from dinogen.families.registry import resolve
    from launch.check import check_run_here

    num_processes = count_processes(request.num_processes)
    env, command = build_command(request, num_processes)
    shown = " ".join(
        [*(f"{key}={shlex.quote(value)}" for key, value in env.items()), *map(shlex.quote, command)]
    )
    if request.dry_run:
        print(shown)
    if not request.unchecked:
        config = resolve(request.config)
        sizes = choose_stages(config, request.stages)
        check_run_here(config, dict.fromkeys(sizes, num_processes))
    if request.dry_run:
        return
    log.info(shown)
    sys.stdout.flush()
    os.execve(command[0], command, os.environ | env)


def build_command(request: Request, num_processes: int) -> tuple[dict[str, str], list[str]]:
    """Variables to set and the command of a run by ``num_processes`` processes.

    Raises:
        UserError: a stage that the config does not have; DeepSpeed is not installed.
    """
    env = {}
    if "OMP_NUM_THREADS" not in os.environ:
        env["OMP_NUM_THREADS"] = str(max(1, usable_cores() // num_processes))
    train = ["-m", "launch.cli", "train", str(request.path), *request.overrides]
    if request.stages is not None:
        choose_stages(request.config, request.stages)
        train += ["--stage", request.stages]
    if request.config.engine.name == "deepspeed":
        if find_spec("deepspeed") is None:
            raise UserError("DeepSpeed is not installed: pip install -e '.[deepspeed]'")
        if request.max_restarts:
            raise UserError("--max-restarts: not possible with DeepSpeed: use --engine ddp")
        return env, [sys.executable, "-m", "launch.local.deepspeed", str(num_processes), *train]
    command = [sys.executable, "-m", "launch.local.torchrun", "--standalone"]
    command += ["--nproc-per-node", str(num_processes)]
    command += ["--max-restarts", str(request.max_restarts or 0)]
    return env, command + train


def count_processes(wanted: int | None) -> int:
    """Number of processes to start: one per GPU; without GPUs ``wanted`` on the CPU.

    Raises:
        UserError: ``wanted`` is more than the number of GPUs.
    """
    import torch

    num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if num_gpus:
        if wanted is not None and wanted > num_gpus:
            raise UserError(f"--gpus {wanted}: this machine has {num_gpus} (see dinogen doctor)")
        return wanted or num_gpus
    plural = "es" if (wanted or 1) > 1 else ""
    log.info("no GPU here: %d process%s on the CPU", wanted or 1, plural)
    return wanted or 1
