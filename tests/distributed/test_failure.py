"""One rank's failure ends all within seconds, with its message; under torchrun with gloo."""

from __future__ import annotations

import re
import subprocess
import time
from pathlib import Path

import pytest

from dinogen.distributed import process_group
from dinogen.distributed.failure import failure_propagation
from dinogen.errors import UserError
from tests.forked import torchrun

RANKS = """
import datetime, os, signal, sys, time
import torch
from dinogen.distributed import process_group as dist
from dinogen.errors import UserError
from dinogen.distributed.failure import failure_propagation
from launch.cli.console import setup_logging

setup_logging(quiet=not dist.is_main())
case = sys.argv[1]
if case == "killed at work":
    sys.modules["dinogen.distributed.failure"]._SILENT = 6.0
if case == "slow":
    dist._TIMEOUT = datetime.timedelta(seconds=10)
dist.init()
try:
    with failure_propagation():
        dist.all_reduce_sum(torch.ones(1))
        open(sys.argv[2] + str(dist.rank()), "w").close()  # its time is that of the failure
        if dist.rank() == 1:
            if case in ("user error", "busy"):
                raise UserError("data/x.tar: is damaged: pack it again")
            if case == "bug":
                raise ValueError("an unforeseen thing")
            if case == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
        if case == "busy":
            # with work of its own, and TERM asks it only to stop at the end of a step
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            time.sleep(60)
        if case == "killed at work":
            # the others wait at the store, which torchrun hosts: no connection breaks
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            with dist.rank_zero_section() as mine:
                if mine:
                    os.kill(os.getpid(), signal.SIGKILL)
        if case == "slow":
            with dist.rank_zero_section() as mine:
                time.sleep(14 if mine else 0)
        if case == "rank 0 works":
            with dist.rank_zero_section() as mine:
                if mine:
                    time.sleep(2)
                    raise UserError("runs/x: the disk is full")
        dist.all_reduce_sum(torch.ones(1))
except UserError as error:
    print(f"rank {dist.rank()}: {error}", file=sys.stderr)
    sys.exit(error.exit_code)
"""


def run(tmp_path: Path, case: str) -> tuple[subprocess.CompletedProcess, float]:
    script = tmp_path / "ranks.py"
    script.write_text(RANKS)
    if case == "killed at work":
        script.write_text('import os\nos.environ["LOCAL_RANK"] = "0"\n' + RANKS)  # a node each
    done = torchrun(3, script, case, tmp_path / "failed", timeout=240)
    failed = max(path.stat().st_mtime for path in tmp_path.glob("failed*"))
    return done, time.time() - failed


@pytest.mark.parametrize(
    ("case", "message"),
    [
        # said by itself or, unless torchrun ends it before, by the other one
        ("user error", "rank 1( failed)?: data/x.tar: is damaged: pack it again"),
        ("busy", "rank 1( failed)?: data/x.tar: is damaged: pack it again"),
        ("bug", "ValueError: an unforeseen thing"),
        ("killed", "the connection to another rank is lost: it was killed, or its node died"),
        ("rank 0 works", "rank 0: runs/x: the disk is full"),
        ("killed at work", "rank 0 failed: no sign of life for 6 s: it was killed, or its node"),
    ],
)
def test_the_others_end_within_seconds_and_say_why(tmp_path, case, message):
    done, seconds = run(tmp_path, case)
    assert done.returncode != 0
    assert re.search(message, done.stderr), done.stderr
    # torchrun itself gives the others 30 s and a collective half an hour
    assert seconds < 28
    if case == "bug":
        assert "Traceback" in done.stderr


def test_rank_0_may_work_longer_than_a_collective_waits(tmp_path):
    done, seconds = run(tmp_path, "slow")
    assert done.returncode == 0, done.stderr[-3000:]
    assert seconds > 14


def test_one_process_alone_keeps_its_exception():
    with pytest.raises(UserError, match="as it is"), failure_propagation():
        raise UserError("as it is")
    assert process_group.control_store() is None


class Store:
    """The part of a torch store that is used here."""

    def __init__(self) -> None:
        self.values: dict[str, bytes] = {}

    def compare_set(self, key, expected, desired):
        return self.values.setdefault(key, desired.encode())

    def set(self, key, value):
        if not key.startswith("beat/"):
            self.values[key] = value.encode()

    def check(self, keys):
        return all(key in self.values for key in keys)

    def get(self, key):
        return self.values[key]


def test_the_first_to_fail_keeps_its_exception_and_the_second_ends_with_its_code(monkeypatch):
    store = Store()
    monkeypatch.setattr(process_group, "control_store", lambda: store)
    error = UserError("first")
    error.exit_code = 7
    monkeypatch.setattr(process_group, "rank", lambda: 2)
    with pytest.raises(UserError, match="first"), failure_propagation():
        raise error
    monkeypatch.setattr(process_group, "rank", lambda: 1)
    with pytest.raises(SystemExit) as ended, failure_propagation():
        raise ValueError("second")
    assert ended.value.code == 7


def test_what_all_ranks_agreed_on_is_no_failure_of_one(monkeypatch):
    store = Store()
    monkeypatch.setattr(process_group, "control_store", lambda: store)

    class Agreed(UserError):
        agreed = True

    with pytest.raises(Agreed), failure_propagation():
        raise Agreed("stopped")
    assert not store.values


def test_a_broken_connection_is_told_as_what_it_means(monkeypatch):
    store = Store()
    monkeypatch.setattr(process_group, "control_store", lambda: store)
    with (
        pytest.raises(process_group.DistError, match="killed, or its node died"),
        failure_propagation(),
    ):
        raise RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer [::1]:1")
    store.values.clear()
    with pytest.raises(RuntimeError, match="shapes"), failure_propagation():
        raise RuntimeError("shapes do not fit")
