"""A study on the real mini Slurm: its command killed twice, its jobs go on, each submitted once."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import yaml

from tests.launch.studies import tiny_study
from tests.slurm.helpers import ROOT


@pytest.fixture
def started():
    """The study's processes; none of them stays."""
    processes: list[subprocess.Popen] = []
    yield processes
    for process in processes:
        process.kill()
        process.wait()


@pytest.mark.timeout(900)
def test_a_study_of_three_configs_killed_twice_finishes(cluster, tmp_path, started):
    path = tiny_study(tmp_path)
    folder = tmp_path / "study"
    study = yaml.safe_load(path.read_text())
    study.pop("final")
    # A job takes longer to start than a run takes: few runs, and short ones.
    study["tracks"] = {
        "gan": {"configs": ["dcgan.yaml", "wgan_gp.yaml"]},
        "vae": {"configs": ["vae.yaml"]},
    }
    study["overrides"] += [
        "cluster.gpus_per_node=0",
        "cluster.cpus_per_process=1",
        "cluster.max_restarts=0",
        "cluster.time='60'",
    ]
    path.write_text(yaml.safe_dump(study))

    def begin():
        command = [sys.executable, "-m", "launch.cli", "study", "run", path, "--on", "slurm"]
        with (tmp_path / "said").open("ab") as said:
            process = subprocess.Popen(
                command,
                cwd=tmp_path,
                env=os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "200"},
                stdout=said,
                stderr=said,
                start_new_session=True,
            )
        started.append(process)
        return process

    def until_submitted(process, num):
        deadline = time.monotonic() + 200
        while len(list(folder.glob("*/*/launch/jobs.json"))) < num:
            assert process.poll() is None, (tmp_path / "said").read_text()[-3000:]
            assert time.monotonic() < deadline
            time.sleep(0.02)

    process = begin()
    until_submitted(process, 2)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()

    process = begin()
    until_submitted(process, 3)
    process.terminate()
    assert process.wait(120) == 75, (tmp_path / "said").read_text()[-3000:]
    assert "its jobs stay queued" in (tmp_path / "said").read_text()

    process = begin()
    code = process.wait(400)
    logs = "".join(log.read_text()[-1500:] for log in folder.glob("*/*/launch/*.log"))
    assert code == 0, (tmp_path / "said").read_text()[-3000:] + logs
    runs = ["gan/dcgan-seed0", "gan/wgan_gp-seed0", "vae/vae-seed0"]
    for run in runs:
        jobs = json.loads((folder / run / "launch" / "jobs.json").read_text())["jobs"]
        assert [job["step"] for job in jobs] == ["train-16", "evaluate"]
        assert [cluster.state(job["id"]) for job in jobs] == ["COMPLETED"] * 2
    told = (folder / "report" / "comparison.json").read_text()
    assert all(run.split("/")[1] in told for run in runs)
    summary = (folder / "report" / "study.md").read_text()
    assert summary.count("| done |") == 3
    assert set(json.loads((folder / "study.json").read_text())["best"]) == {"gan", "vae"}
