"""Calls a function on several gloo ranks, forked from one process that has only imported."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from typing import Any

from tests import forked


def on_ranks(num: int, function: Callable[..., None], *arguments: Any) -> None:
    """Call it on each rank, and see that each of them ends well."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = forked.context()
    ranks = [
        context.Process(target=_call, args=(rank, num, port, function, arguments))
        for rank in range(num)
    ]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(240)
    assert [rank.exitcode for rank in ranks] == [0] * num


def evaluate_here(run: str, num_samples: int, names: list[str]) -> None:
    """What `dinogen evaluate` does on a rank."""
    from pathlib import Path

    from dinogen.evaluation.evaluate import evaluate

    evaluate(Path(run), num_samples=num_samples, names=names)


def lock_here(run: str, said: str) -> None:
    """Fail to lock a run, and note what this rank says of it."""
    import json
    from pathlib import Path

    from dinogen.config import ConfigError
    from dinogen.distributed import process_group
    from dinogen.distributed.failure import failure_propagation
    from dinogen.runs.lock import run_lock

    process_group.init()
    try:
        with failure_propagation(), run_lock(Path(run)):
            text = "locked"
    except ConfigError as error:
        text = str(error)
    Path(f"{said}{process_group.rank()}.json").write_text(json.dumps(text), encoding="utf-8")


def _call(
    rank: int, num: int, port: int, function: Callable[..., None], arguments: tuple[Any, ...]
) -> None:
    import torch

    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(num)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "HF_HUB_OFFLINE": "1"}
    torch.set_num_threads(1)
    from dinogen.distributed import process_group

    function(*arguments)
    process_group.shutdown()
