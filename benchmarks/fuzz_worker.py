"""One rank of benchmarks/fuzz.py: trains or evaluates, and meets the fault drawn for it."""

from __future__ import annotations

import errno
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import chaos_worker
from fuzz_cases import Fault

from dinogen.config import ConfigError
from dinogen.distributed import process_group
from dinogen.evaluation import evaluate as evaluation
from dinogen.families.guided import Guided
from dinogen.training import run, state, trainer
from dinogen.training.checkpointing.snapshot import Ema
from dinogen.training.engines.base import SingleEngine
from dinogen.training.state import StageState
from shards.read.stream import Stream

SLOW = 2.0  # seconds


def train(config: Path, records: Path, fault: Fault | None, number: int) -> None:
    """``dinogen train CONFIG``, recording what it consumes."""
    install(fault, number, records)
    chaos_worker.train(config, records)


def evaluate(folder: Path, options: tuple[str, ...], fault: Fault | None, number: int) -> None:
    """``dinogen evaluate FOLDER``."""
    from launch.cli.main import main

    install(fault, number, folder)
    sys.argv = ["dinogen", "evaluate", str(folder), *options]
    main()


def install(fault: Fault | None, number: int, folder: Path) -> None:
    """Put a fault in its place; ``folder/fault`` appears when it is met."""
    if fault is None or fault.rank != process_group.rank():
        return
    engines: list[type[SingleEngine]] = [SingleEngine]
    if fault.place == "step":
        from dinogen.training.engines.deepspeed import DeepSpeedEngine

        engines.append(DeepSpeedEngine)
    places: dict[str, list[tuple[Any, str]]] = {
        "check_run": [(run, "check_run")],
        "build": [(StageState, "set_fade")],
        "begin": [(Guided, "begin")],
        "data": [(Stream, "__next__")],
        "loss": [(SingleEngine, "losses")],
        "step": [(engine, "step") for engine in engines],
        "ema": [(Ema, "update")],
        "capture": [(StageState, "capture")],
        "write": [(state, "save_checkpoint")],
        "probe": [(StageState, "probe")],
        "samples": [(trainer, "save_samples")],
        "finish": [(run, "finish_stage")],
        "page": [(run, "write_page")],
        "held_out": [(Guided, "held_out")],
        "result": [(evaluation, "_summarise")],
    }
    passed = [0]
    for owner, name in places[fault.place]:
        setattr(owner, name, _faulty(getattr(owner, name), fault, number, folder, passed))


def _faulty(
    inner: Callable[..., Any], fault: Fault, number: int, folder: Path, passed: list[int]
) -> Callable[..., Any]:
    def outer(*arguments: Any, **options: Any) -> Any:
        passed[0] += 1
        if passed[0] == fault.step + 1:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "fault").write_text(str(time.time()))
            _meet(fault.how, f"fuzz {number} failed")
        return inner(*arguments, **options)

    return outer


def _meet(how: str, text: str) -> None:
    if how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif how == "stop":
        os.kill(os.getpid(), signal.SIGTERM)
    elif how == "slow":
        time.sleep(SLOW)
    else:
        raise {
            "exit": SystemExit(3),
            "interrupt": KeyboardInterrupt(),
            "RuntimeError": RuntimeError(text),
            "ConfigError": ConfigError(text),
            "MemoryError": MemoryError(text),
            "OSError": OSError(errno.ENOSPC, text),
            "KeyError": KeyError(text),
            "AssertionError": AssertionError(text),
        }[how]
