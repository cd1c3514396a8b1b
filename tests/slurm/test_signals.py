"""On the real mini Slurm: time up, a lost node, a failing stage."""

from __future__ import annotations

import subprocess
from pathlib import Path

import yaml

from dinogen.config import load_config
from tests.slurm.helpers import wait_for
from tests.training.helpers import newest_on_disk, torchrun, weights

LONG = ("stages.0.kimg=0.9", "checkpoint.every_kimg=0.05", "log.every_kimg=0.1")


def log_of(config: Path, number: str, step: str = "train-4") -> Path:
    return Path(yaml.safe_load(config.read_text())["run"]) / "launch" / f"{step}-{number}.log"


def newest(config: Path) -> int:
    """Images of the newest checkpoint; 0 if there is none."""
    return newest_on_disk(load_config(config))


def test_a_signal_and_a_crashed_node_requeue_and_the_weights_stay_the_same(
    cluster, write_config, dinogen, jobs_of, tmp_path
):
    config = write_config(*LONG)
    dinogen("launch", config, "--on", "slurm", "--stages", 4)
    number = jobs_of(config)["train-4"]
    log = log_of(config, number)
    wait_for("training", lambda: newest(config) > 0, 60)
    subprocess.run(["scancel", "--batch", "--signal=USR1", number], check=True)
    wait_for("requeue", lambda: cluster.job(number)["Restarts"] == "1", 40)
    assert "stopped by SIGUSR1" in log.read_text()

    whole = load_config(config, [f"run={tmp_path / 'whole'}"])
    whole = whole.model_copy(update={"stages": whole.stages[:1]})
    num_restarts = "1"
    if cluster.tool is not None:  # mini-slurm.sh, which crashes nodes
        saved = newest(config)
        wait_for("training again", lambda: newest(config) > saved, 60)
        cluster.node("crash", "node2")
        try:
            torchrun(whole, 2)  # SLURM takes as long to notice
            num_restarts = "2"
            wait_for("requeue", lambda: cluster.job(number)["Restarts"] == num_restarts, 60)
            assert "restart 2" in dinogen("launch", "status", load_config(config).run)
        finally:
            cluster.node("boot", "node2")
            wait_for("node2 again", lambda: "down" not in nodes(), 30)
    else:
        torchrun(whole, 2)
    cluster.wait(number, "COMPLETED", 90, log)
    assert log.read_text().count("resumed from") >= int(num_restarts)
    assert cluster.job(number)["Restarts"] == num_restarts
    one, other = weights(load_config(config), 4), weights(whole, 4)
    assert one.keys() == other.keys()
    assert all(one[name].equal(other[name]) for name in one)


def nodes() -> str:
    return subprocess.check_output(["sinfo", "-h", "-N", "-o", "%N %t"], text=True)


def test_a_failing_stage_cancels_those_after_it_and_status_says_why(
    cluster, write_config, dinogen, jobs_of
):
    config = write_config("data.path=gone")
    Path(config.parent / "gone").mkdir()
    (config.parent / "gone" / "manifest.json").write_text("{}")
    dinogen("launch", config, "--on", "slurm", "--unchecked")
    jobs = jobs_of(config)
    cluster.wait(jobs["train-4"], "FAILED", 60)
    cluster.wait(jobs["train-8"], "CANCELLED", 20)
    lines = dinogen("launch", "status", load_config(config).run, code=1).splitlines()
    failed, cancelled = (
        "".join(lines[number : number + 2])  # the reason stands below
        for step in ("train-4", "train-8")
        for number, line in enumerate(lines)
        if line.startswith(step)
    )
    assert "FAILED" in failed and str(log_of(config, jobs["train-4"])) in failed
    assert f"needs train-4 (job {jobs['train-4']}), which ended as FAILED" in cancelled
    assert "gone" in log_of(config, jobs["train-4"]).read_text()
