"""A search on the real mini Slurm: a trial is cancelled while it trains, and has saved."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from dinogen.runs.run import Run
from launch.study.plan import open_study
from tests.families.tiny import TINY, pack_discs
from tests.slurm.helpers import ROOT


@pytest.mark.timeout(600)
def test_a_pruned_trial_saves_and_leaves_the_queue(cluster, tmp_path):
    pack_discs(tmp_path / "discs")
    config = {
        "data": {"path": str(tmp_path / "discs"), "num_threads": 0},
        "family": {"name": "dcgan", **TINY["dcgan"]},
        "stages": [{"resolution": 16, "kimg": 0.8, "batch": 8, "lr": 1e-3}],
        "log": {"every_kimg": 0.4, "probe_kimg": 9, "samples_kimg": 9, "num_samples": 4},
        "checkpoint": {"every_kimg": 50},
        "eval": {"every_kimg": 0.4, "generated": ["spectrum"], "num_generated": 16},
        "metrics": {"names": ["spectrum"], "num_samples": 16, "cache": str(tmp_path / "cache")},
        "cluster": {
            "gpus_per_node": 0,
            "cpus_per_process": 1,
            "max_restarts": 0,
            "time": "60",
        },
    }
    (tmp_path / "dcgan.yaml").write_text(yaml.safe_dump(config))
    # it learns nothing, and would take an hour
    hopeless = [{"resolution": 16, "kimg": 4000, "batch": 8, "lr": 1e-9}]
    plan = {
        "folder": str(tmp_path / "study"),
        "metric": "spectrum",
        "tracks": {"gan": {"configs": ["dcgan.yaml"]}},
        "search": {
            "over": "dcgan",
            "method": "grid",
            "num_parallel": 1,
            "parameters": {"stages": [config["stages"], hopeless]},
            "prune": {"method": "successive_halving", "at_kimg": [0.4], "min_trials": 1},
        },
    }
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(plan))
    done = subprocess.run(
        [sys.executable, "-m", "launch.cli", "study", "run", path, "--on", "slurm"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "200"},
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    trials = json.loads((tmp_path / "study" / "gan" / "dcgan-trials.json").read_text())["trials"]
    assert [one["state"] for one in trials] == ["done", "pruned"]
    pruned = open_study(path).tracks["gan"][1].folder
    jobs = json.loads((pruned / "launch" / "jobs.json").read_text())["jobs"]
    for job in jobs:
        cluster.wait(job["id"], "CANCELLED", 60)
    # the one that trained has saved
    checkpoint = Run(pruned).stage(16).checkpoints.folders[-1]
    told = f"stopped by SIGTERM at {int(checkpoint.name)} images, all of it saved"
    assert told in Path(jobs[0]["log"]).read_text()
