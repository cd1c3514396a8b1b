"""A disk that is full in the midst of a save: a clear error, nothing half-written, nothing lost."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

import pytest
import torch

from dinogen.config import parse_config
from dinogen.training.checkpointing.checkpoint import SaveError, Saver, newest_checkpoint
from dinogen.training.run import train
from tests import forked
from tests.training.helpers import stage, weights

WIDE = ("family.channel_base=512", "family.channel_max=64", "stages.1.kimg=0.08")
LIMIT = 200_000  # bytes: between the largest file of a checkpoint of 4x4 and that of 8x8


def train_on_a_full_disk(dumped: dict, log: str) -> None:
    """Train where no file can grow beyond LIMIT; target of a process."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (LIMIT, resource.RLIM_INFINITY))
    torch.set_num_threads(1)
    try:
        train(parse_config(dumped))
    except SaveError as error:
        Path(log).write_text(str(error))
        sys.exit(error.exit_code)


def test_the_run_says_so_and_goes_on_from_the_last_good_checkpoint(make_config, tmp_path):
    reference = make_config(*WIDE, run="whole")
    train(reference)
    config = make_config(*WIDE, run="full")
    log = tmp_path / "log"
    process = forked.context().Process(
        target=train_on_a_full_disk, args=(config.model_dump(mode="json"), str(log))
    )
    process.start()
    process.join(240)
    assert process.exitcode == 2
    assert "8x8/checkpoints: the checkpoint could not be written" in log.read_text()
    assert "free space there" in log.read_text()
    assert list((stage(config, 8) / "checkpoints").iterdir()) == []
    kept = newest_checkpoint(stage(config, 4) / "checkpoints")
    assert kept is not None and kept.state["progress"]["nimg"] == 80
    train(config)
    for resolution in (4, 8):
        a, b = weights(config, resolution), weights(reference, resolution)
        assert [name for name in b if not torch.equal(a[name], b[name])] == []


def fail() -> None:
    raise OSError(28, "No space left on device")


def test_a_failed_save_is_an_error_at_the_next_check(tmp_path):
    saver, done = Saver(), []
    saver.submit(tmp_path, lambda: done.append(1))
    saver.wait()
    assert done == [1]
    saver.check()
    saver.submit(tmp_path, fail)
    with pytest.raises(SaveError, match="No space left"):
        saver.wait()
    saver.submit(tmp_path, fail)
    with pytest.raises(SaveError, match=str(tmp_path)):
        saver.submit(tmp_path, lambda: done.append(2))
    assert done == [1], "what comes after a failed save is not written"
    saver.close()
    assert saver.waited >= 0
