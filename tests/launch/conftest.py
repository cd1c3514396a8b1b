"""A SLURM that is played, for the tests of chains of jobs."""

from __future__ import annotations

import os
import stat

import pytest
import yaml

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
    data = tmp_path / "data"
    data.mkdir()
    (data / "manifest.json").write_text('{"splits": {"train": {}, "val": {}}}')
    stages = [{"resolution": size, "kimg": 1} for size in (4, 8, 16)]
    config = {"run": str(tmp_path / "run"), "data": {"path": str(data)}, "stages": stages}
    (tmp_path / "my.yaml").write_text(yaml.safe_dump(config))
    return tmp_path
