"""On the real mini Slurm: what the first job would refuse leaves the queue empty."""

from __future__ import annotations

import subprocess

import pytest


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("family={name: guided}", "guide.name=pixels"), "guide: not the one that made"),
        (("data.path=gone",), "gone holds no packed data"),
        (("stages.0.batch=1",), "smaller than the number of ranks 2"),
    ],
    ids=["guide", "data", "batch"],
)
def test_nothing_is_queued(cluster, write_config, dinogen, tmp_path, words, told):
    before = subprocess.check_output(["squeue", "-h", "-o", "%A %j"], text=True)
    printed = dinogen("launch", write_config(), *words, "--on", "slurm", code=2)
    assert told in printed
    assert subprocess.check_output(["squeue", "-h", "-o", "%A %j"], text=True) == before
    assert not (tmp_path / "run" / "launch" / "jobs.json").exists()
