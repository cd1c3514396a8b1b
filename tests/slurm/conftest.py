"""The mini Slurm that .ci/run starts, real daemons and two nodes; without it all is skipped."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from dinogen.config import dump_config, parse_config
from tests.families.tiny import TINY
from tests.slurm.helpers import ROOT, Cluster
from tests.training.conftest import data_folder, guide_folder  # noqa: F401

TOOL = ROOT.parent / "shared" / "tools" / "mini-slurm.sh"


@pytest.fixture(scope="session")
def cluster():
    """A cluster that may be used; real ones are left alone."""
    if shutil.which("sbatch") is None:
        pytest.skip("no sbatch on the PATH")
    shown = subprocess.run(["scontrol", "show", "config"], capture_output=True, text=True)
    name = re.search(r"^ClusterName\s*=\s*(\S+)", shown.stdout, re.M)
    if shown.returncode or name is None:
        pytest.skip(f"no cluster answers: {shown.stderr.partition(chr(10))[0]}")
    if name[1] != "mini":
        pytest.skip(f"the cluster {name[1]} is a real one: these tests want the mini Slurm")
    found = Cluster(TOOL if TOOL.is_file() else None, Path(os.environ["SLURM_CONF"]).parents[1])
    yield found
    found.cancel_all()


@pytest.fixture
def write_config(tmp_path, data_folder):  # noqa: F811
    """Writes the YAML of a run of stages 4 and 8, two nodes with a process each.

    Its family grows without a guide, which each process would import for seconds.
    """

    def write(*overrides: str, folder: Path = tmp_path) -> Path:
        base = {
            "run": str(folder / "run"),
            "data": {"path": str(data_folder), "num_threads": 0},
            "family": {"name": "progressive_gan", **TINY["progressive_gan"]},
            "stages": [
                {"resolution": 4, "kimg": 0.08, "batch": 8, "lr": 0.01},
                {"resolution": 8, "kimg": 0.16, "fade_kimg": 0.08, "batch": 8, "lr": 0.01},
            ],
            "checkpoint": {"every_kimg": 0.4},
            "log": {"every_kimg": 0.016, "num_samples": 4},
            "cluster": {
                "nodes": 2,
                "cpus_per_process": 1,
                "time": "10",
                "max_restarts": 0,
                "stages": [{"resolution": 4, "nodes": 2}, {"resolution": 8, "nodes": 2}],
            },
        }
        path = folder / "my.yaml"
        path.write_text(dump_config(parse_config(base, overrides)))
        return path

    return write


@pytest.fixture
def dinogen(tmp_path):
    """Runs a dinogen command as a user does; gives what it printed."""

    def run(*words: object, code: int = 0) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "launch.cli", *map(str, words)],
            cwd=tmp_path,
            env=os.environ | {"COLUMNS": "200", "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
        )
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout + done.stderr

    return run


@pytest.fixture
def jobs_of():
    """Steps and job numbers of a run, from its record."""

    def read(config: Path) -> dict[str, str]:
        run = Path(yaml.safe_load(config.read_text())["run"])
        record = yaml.safe_load((run / "launch" / "jobs.json").read_text())  # JSON is YAML
        return {job["step"]: job["id"] for job in record["jobs"]}

    return read
