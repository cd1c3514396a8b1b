"""A SLURM that is played, and the terminal and the signal handlers of tests of studies."""

from __future__ import annotations

import os
import signal
import stat

import pytest
import yaml

from tests.families.tiny import TINY, pack_discs
from tests.launch.played_slurm import SBATCH, SCANCEL, SCONTROL


@pytest.fixture
def played(tmp_path, monkeypatch):
    """A played SLURM on the PATH, and a run with packed data; gives the folder of both."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, text in {"sbatch": SBATCH, "scontrol": SCONTROL, "scancel": SCANCEL}.items():
        (programs / name).write_text(text)
        (programs / name).chmod(0o755 | stat.S_IEXEC)
    (tmp_path / "jobs").touch()
    monkeypatch.setenv("SLURM_PLAYED", str(tmp_path))
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    monkeypatch.setenv("COLUMNS", "220")
    monkeypatch.chdir(tmp_path)  # a dry run writes its commands there
    data = tmp_path / "data"
    pack_discs(data)
    config = {
        "run": str(tmp_path / "run"),
        "data": {"path": str(data)},
        "family": {"name": "progressive_gan", **TINY["progressive_gan"]},
        "stages": [{"resolution": size, "kimg": 1} for size in (4, 8, 16)],
    }
    (tmp_path / "my.yaml").write_text(yaml.safe_dump(config))
    return tmp_path


@pytest.fixture
def calm(monkeypatch):
    """Wide tables, and the signal handlers of the tests back at the end."""
    monkeypatch.setenv("COLUMNS", "240")
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP, signal.SIGQUIT)
    before = {number: signal.getsignal(number) for number in numbers}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)
