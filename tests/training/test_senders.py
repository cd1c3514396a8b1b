"""The processes that send a run to W&B, MLflow and Trackio: signals, hangs, crashes, kills."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import psutil
import pytest

from dinogen.config import dump_config, parse_config
from dinogen.runs.run import Run
from dinogen.training.logging.sinks import senders
from dinogen.training.logging.sinks.sender import _locked
from dinogen.training.run import train
from dinogen.training.stop import StopFlag, Stopped
from dinogen.training.trainer import Trainer
from tests import forked
from tests.training.sink_stores import die_after
from tests.training.sink_stores import place as place
from tests.training.sink_stores import stores as stores


def test_no_process_outlives_a_killed_run(make_config, stores, place):
    config = make_config("logging=[wandb, trackio]", "stages.1.kimg=100", run="long")
    arguments = (place, config.model_dump(mode="json"), 24)
    process = forked.context().Process(target=die_after, args=arguments)
    process.start()
    seen = {}
    while process.is_alive():
        with suppress(psutil.NoSuchProcess):  # it dies at any moment
            seen |= {one.pid: one for one in psutil.Process(process.pid).children(recursive=True)}
        process.join(0.05)
    assert len(seen) >= 2
    _, alive = psutil.wait_procs(list(seen.values()), timeout=120)
    assert alive == []


HANGS = """
import os, time
open(os.environ["HUNG"], "w").close()
time.sleep(1000)
"""


@pytest.fixture
def hung(tmp_path, stores):
    """Trackio's place is taken by a package that never returns; gives the file that it leaves."""
    (tmp_path / "lib" / "trackio").mkdir(parents=True)
    (tmp_path / "lib" / "trackio" / "__init__.py").write_text(HANGS)
    os.environ |= {"HUNG": str(tmp_path / "hung"), "PYTHONPATH": str(tmp_path / "lib")}
    return tmp_path / "hung"


def wait_for(path):
    deadline = time.monotonic() + 20
    while not path.exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def train_signalled(place, variables, dumped, number, stopped):
    """Train while Trackio hangs; signals arrive before and in the wait for it."""
    os.environ |= variables
    for each in StopFlag.SIGNALS:
        signal.signal(each, signal.SIG_DFL)
    senders._PATIENCE_SECONDS = 0.2
    step, end = Trainer.train_step, senders.Senders.__exit__

    def train_step(self, batch):
        step(self, batch)
        if stopped:
            signal.raise_signal(signal.SIGTERM)

    def end_signalled(self, *error):
        signal.raise_signal(number)
        end(self, *error)

    def in_the_wait(record):
        if "waiting up to" in record.msg:
            (place / "waiting").write_text(record.getMessage())
            signal.raise_signal(number)
        elif "NOT EVERYTHING WAS SENT" in record.msg:
            (place / "said").touch()
        return True

    Trainer.train_step, senders.Senders.__exit__ = train_step, end_signalled
    senders.log.setLevel("INFO")
    senders.log.addFilter(in_the_wait)
    try:
        (result,) = train(parse_config(dumped), 4)
    except Stopped as error:
        sys.exit(error.exit_code)
    assert result["status"] == "finished"


@pytest.mark.parametrize(
    ("number", "stopped", "code"),
    [(signal.SIGTERM, True, 75), (signal.SIGUSR1, False, 0), (signal.SIGHUP, False, 0)],
)
def test_a_signal_ends_the_wait_for_a_sink_and_not_the_run(
    make_config, hung, tmp_path, number, stopped, code
):
    config = make_config("logging=[trackio]", "stages.0.kimg=0.08")
    variables = {name: os.environ[name] for name in ("HUNG", "PYTHONPATH")}
    arguments = (tmp_path, variables, config.model_dump(mode="json"), number, stopped)
    process = forked.context().Process(target=train_signalled, args=arguments)
    process.start()
    process.join(120)
    assert process.exitcode == code
    assert time.time() - (tmp_path / "waiting").stat().st_mtime < 25  # of the 30 s
    assert "up to 30 s for trackio" in (tmp_path / "waiting").read_text()
    assert (tmp_path / "said").exists()


STARTS_SENDER = """
import os, subprocess, sys, time
script = (
    "import sys; from dinogen.training.logging.sinks import sender;"
    "sender.LAST_SECONDS = sender.POLL_SECONDS = 0.2;"
    "sys.exit(sender.main(sender.Run(sys.argv[1]), 'trackio', int(sys.argv[2])))"
)
command = [sys.executable, "-c", script, sys.argv[1], str(os.getpid())]
sender = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
if len(sys.argv) > 2:
    sender.stdin.write(sys.argv[2].encode())
    sender.stdin.close()
print(sender.pid, flush=True)
time.sleep(1000)
"""


@pytest.mark.parametrize("word", [(), ("stopped\n",)])
def test_a_sender_stuck_in_a_library_ends_with_the_run_and_frees_the_sink(make_config, hung, word):
    config = make_config("logging=[trackio]")
    config.run.mkdir()
    (config.run / "config.yaml").write_text(dump_config(config))
    run, said = Run.of(config), []
    os.environ["PYTHONPATH"] += os.pathsep + str(forked.REPO)
    command = [sys.executable, "-c", STARTS_SENDER, str(config.run), *word]
    trainer = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ)
    stuck = psutil.Process(int(trainer.stdout.readline()))

    def next_run():
        with _locked(run, "trackio", lambda level, text: said.append(text)):
            pass

    with ThreadPoolExecutor() as pool:
        try:
            wait_for(hung)
            later = pool.submit(next_run)
            time.sleep(0.5)
            assert stuck.is_running() and not later.done()
            assert said == ["trackio: another process still sends this run: waiting for its end"]
            trainer.kill()
            trainer.wait()
            _, alive = psutil.wait_procs([stuck], timeout=8)
            assert alive == []
            later.result(5)
        finally:
            trainer.kill()
            if stuck.is_running():
                stuck.kill()


def test_a_sender_that_crashes_says_why(make_config, stores, caplog):
    config = make_config("logging=[trackio]")
    config.run.mkdir()
    (config.run / "logging").write_text("in the way")
    train(config, 4)
    assert caplog.text.count("trackio: NOTHING MORE IS SENT: FileExistsError") == 1
    assert str(config.run / "logging") in caplog.text
    assert "was ended" not in caplog.text and "NOT EVERYTHING" not in caplog.text
