"""Runs trainings in other processes and compares what they leave."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import threading
import time
from pathlib import Path

import torch

from dinogen.config import Config, dump_config, parse_config
from dinogen.training.checkpointing.checkpoint import newest_checkpoint
from tests import forked

# what a clock measures; everything else in a line is a function of config and seed
WALL_CLOCK = {"images_per_s", "training_s", "data_wait", "save_share"}


def train_here(dumped: dict | None) -> None:
    """Train in this process; target of :func:`start`."""
    from dinogen.training.run import train

    torch.set_num_threads(1)
    if dumped is not None:
        train(parse_config(dumped))


def train_and_die(dumped: dict, nimg: int, delay: float) -> None:
    """Train, and be killed ``delay`` seconds after a checkpoint of ``nimg`` images is there.

    It kills itself, and waits for that at its end: however busy the machine is, it is killed.
    """
    config = parse_config(dumped)

    def kill() -> None:
        while newest_on_disk(config) < nimg:
            time.sleep(0.004)
        time.sleep(delay)
        os.kill(os.getpid(), signal.SIGKILL)

    thread = threading.Thread(target=kill, daemon=True)
    thread.start()
    train_here(dumped)
    thread.join()


def newest_on_disk(config: Config) -> int:
    """Images of the newest checkpoint on disk; 0 if there is none."""
    found = [int(path.name) for path in config.run.glob("*x*/checkpoints/[0-9]*")]
    return max(found, default=0)


def start(config: Config | None) -> multiprocessing.process.BaseProcess:
    """A fresh process that trains, or does nothing for None.

    It is forked from one that has only imported, not computed.
    """
    arguments = (config and config.model_dump(mode="json"),)
    process = forked.context().Process(target=train_here, args=arguments)
    process.start()
    return process


def torchrun(config: Config, num_ranks: int) -> None:
    """Train on several gloo ranks by the same command that a user gives."""
    config.run.mkdir(parents=True, exist_ok=True)
    path = config.run.with_suffix(".yaml")
    path.write_text(dump_config(config))
    done = forked.torchrun(num_ranks, "-m", "launch.cli", "train", path)
    assert done.returncode == 0, done.stderr[-4000:]


def weights(config: Config, resolution: int) -> dict[str, torch.Tensor]:
    """Every tensor of a stage's newest checkpoint, networks, averages and optimizer."""
    found = newest_checkpoint(stage(config, resolution) / "checkpoints")
    assert found is not None
    return {
        f"{name}/{key}": value
        for name in sorted(path.stem for path in found.folder.glob("*.safetensors"))
        for key, value in found.tensors(name).items()
    }


def curve(config: Config, resolution: int) -> list[dict]:
    """The logged lines of a stage without what a clock measured."""
    lines = (stage(config, resolution) / "stats.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in WALL_CLOCK} for line in lines]


def stage(config: Config, resolution: int) -> Path:
    """Folder of a stage."""
    return config.run / f"{resolution}x{resolution}"
