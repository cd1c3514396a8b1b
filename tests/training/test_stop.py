"""A run that is asked to stop while a shard is not available saves what it learnt, on all ranks."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time

import pytest
import torch

from dinogen.config import dump_config
from dinogen.distributed import process_group
from dinogen.training.run import train
from dinogen.training.stop import Steps, StopFlag, Stopped
from shards.errors import FetchError
from shards.read.stream import Stream
from tests.forked import torchrun
from tests.training.helpers import curve, stage, weights

LOST = "train-00001.tar: 503 (asked to stop)"

RANKS = """
import signal, sys
from pathlib import Path
from dinogen.distributed import process_group as dist
from dinogen.config import load_config
from dinogen.training.run import train
from dinogen.training.stop import Stopped
from shards.errors import FetchError
from shards.read.stream import Stream

take = Stream._take

def lose(stream):
    # 24 images were shown; the other rank has its batch and has heard of no signal
    if dist.rank() == 1 and stream.state_dict()["position"] == 24:
        signal.raise_signal(signal.SIGTERM)
        raise FetchError("lost")
    return take(stream)

Stream._take = lose
try:
    train(load_config(sys.argv[1]))
except Stopped as stopped:
    (Path(sys.argv[2]) / str(dist.rank())).write_text(f"{stopped.exit_code} {stopped}")
dist.shutdown()
"""


@pytest.fixture
def lose(monkeypatch):
    """No shard can be read from some image on; before that the run is asked to stop, or not."""
    take = Stream._take

    def at(nimg, asked):
        def taken(self):
            if self.state_dict()["position"] < nimg:
                return take(self)
            if asked:
                signal.raise_signal(signal.SIGTERM)
            raise FetchError(LOST)

        monkeypatch.setattr(Stream, "_take", taken)

    return at


def checkpoints(config, resolution=4):
    return sorted(path.name for path in (stage(config, resolution) / "checkpoints").glob("0*"))


def test_what_was_learnt_is_saved_and_the_run_goes_on_from_it(
    make_config, lose, monkeypatch, caplog
):
    whole = make_config(run="whole")
    train(whole)
    config = make_config("data.num_threads=1", "checkpoint.every_kimg=1", run="part")
    lose(56, asked=True)
    with pytest.raises(Stopped, match="SIGTERM at 56 images, all of it saved") as stopped:
        train(config)
    assert stopped.value.exit_code == 75
    assert LOST in caplog.text  # why it ended between two batches
    assert checkpoints(config) == ["000000056"]
    monkeypatch.undo()
    train(config)
    for resolution in (4, 8):
        left, right = weights(config, resolution), weights(whole, resolution)
        assert [name for name in right if not torch.equal(left[name], right[name])] == []
        assert curve(config, resolution) == curve(whole, resolution)


def test_without_a_step_there_is_nothing_to_save(make_config, lose):
    config = make_config()
    lose(0, asked=True)
    with pytest.raises(Stopped, match="at 0 images"):
        train(config)
    assert checkpoints(config) == []


def test_a_shard_that_nobody_asked_to_stop_for_is_an_error(make_config, lose):
    config = make_config("checkpoint.every_kimg=1")
    lose(24, asked=False)
    with pytest.raises(FetchError, match="503"):
        train(config)
    assert checkpoints(config) == []


def test_asked_in_its_last_step_a_stage_is_finished(make_config, monkeypatch):
    from dinogen.training.trainer import Trainer

    config = make_config()
    step = Trainer.train_step

    def stop_at_the_end(self, batch):
        step(self, batch)
        if self.state.finished:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(Trainer, "train_step", stop_at_the_end)
    with pytest.raises(Stopped, match="after stage 4"):
        train(config)
    assert json.loads((stage(config, 4) / "result.json").read_text())["status"] == "finished"
    assert not stage(config, 8).exists()


def test_all_ranks_stop_with_the_one_that_cannot_have_its_shard(make_config, tmp_path):
    config = make_config("checkpoint.every_kimg=1")
    path, script = tmp_path / "config.yaml", tmp_path / "ranks.py"
    path.write_text(dump_config(config))
    script.write_text(RANKS)
    done = torchrun(2, script, path, tmp_path)
    assert done.returncode == 0, done.stderr[-4000:]
    said = [(tmp_path / str(rank)).read_text() for rank in range(2)]
    # One may have begun a step more than the other, which still has the batches for it.
    found = [re.fullmatch(r"75 stopped by (.*) at (\d+) images, .*", text) for text in said]
    assert [match and match[1] for match in found] == ["another rank", "SIGTERM"]
    first, second = (int(match[2]) for match in found if match)
    assert first == second <= 24
    assert checkpoints(config) == [f"{first:09d}"]


def test_what_comes_after_the_end_kills_no_finished_run():
    before = {number: signal.getsignal(number) for number in StopFlag.SIGNALS}
    signal.signal(signal.SIGUSR1, signal.SIG_DFL)
    try:
        with StopFlag():
            pass
        signal.raise_signal(signal.SIGUSR1)  # whose default ends the process
        assert signal.getsignal(signal.SIGTERM) is before[signal.SIGTERM]
        assert signal.getsignal(signal.SIGINT) is before[signal.SIGINT]
    finally:
        signal.signal(signal.SIGUSR1, before[signal.SIGUSR1])


def test_what_is_started_afterwards_can_still_trap_the_signal():
    """A shell cannot trap what it was started to ignore."""
    before = signal.signal(signal.SIGUSR1, signal.SIG_DFL)
    try:
        with StopFlag():
            pass
        script = "trap 'echo trapped' USR1; kill -USR1 $$"
        done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True)
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert done.stdout == "trapped\n"


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGQUIT])
def test_hup_and_quit_save_unless_they_were_ignored_at_the_start(number):
    before = signal.signal(number, signal.SIG_DFL)
    try:
        with StopFlag() as stop:
            signal.raise_signal(number)
            assert stop.name == number.name
        assert signal.getsignal(number) == signal.SIG_DFL
        signal.signal(number, signal.SIG_IGN)
        with StopFlag() as stop:
            signal.raise_signal(number)
            assert stop.name is None and signal.getsignal(number) == signal.SIG_IGN
    finally:
        signal.signal(number, before)


@pytest.fixture
def hup():
    """As on a terminal: under nohup the tests inherit an ignored HUP."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.fixture
def clock(monkeypatch):
    """Seconds since the start, as the flag sees them."""
    passed = [100.0]
    monkeypatch.setattr("dinogen.training.stop.time.monotonic", lambda: passed[0])
    return passed


def test_only_a_late_ctrl_c_interrupts(clock, hup):
    with StopFlag() as stop:
        for number in (signal.SIGHUP, signal.SIGINT, signal.SIGINT, signal.SIGTERM):
            signal.raise_signal(number)
        assert stop.name == "SIGHUP"
        clock[0] += 60
        signal.raise_signal(signal.SIGTERM)
        with stop.saving():
            signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_signals_during_a_save_do_not_lose_it(make_config, monkeypatch, hup):
    from dinogen.training.checkpointing import checkpoint

    monkeypatch.setattr("dinogen.training.stop._SAME", 0.0)
    config = make_config("checkpoint.every_kimg=1")
    save = checkpoint.save_checkpoint

    def slowly(*arguments):
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
            os.kill(os.getpid(), number)
            time.sleep(0.05)
        return save(*arguments)

    monkeypatch.setattr("dinogen.training.state.save_checkpoint", slowly)
    stop_at(monkeypatch, 24)
    with pytest.raises(Stopped, match="SIGTERM at 24 images"):
        train(config)
    assert checkpoints(config) == ["000000024"]


def stop_at(monkeypatch, nimg):
    """Ask for a stop after the step that ends at these images."""
    from dinogen.training.trainer import Trainer

    step = Trainer.train_step

    def stopping(self, batch):
        step(self, batch)
        if self.progress.nimg == nimg:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(Trainer, "train_step", stopping)


def test_a_rank_that_is_asked_before_it_has_read_anything_takes_part_to_the_last_step(monkeypatch):
    store = torch.distributed.HashStore()
    monkeypatch.setattr(process_group, "control_store", lambda: store)
    monkeypatch.setattr(process_group, "world_size", lambda: 2)
    read = []

    def batches():
        for number in range(9):
            read.append(number)
            yield number

    with StopFlag() as stop:
        steps = Steps(stop, batches(), 9)
        # The other rank has begun two steps, and says so before this one begins its first.
        store.set(f"{steps._prefix}/1", "2")
        store.set(steps._prefix, "")
        with steps:
            while not steps._asked:
                time.sleep(0.01)
            assert [steps.next() for _ in range(3)] == [0, 1, None]
    assert read == [0, 1]
