"""docs/cluster.md on the real mini Slurm: each of its commands, in its order, by bash."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import skimage
import yaml
from PIL import Image, ImageEnhance

from tests.slurm.helpers import ROOT

BLOCKS = re.findall(
    r"^```(\w+)\n(.*?)^```", (ROOT / "docs" / "cluster.md").read_text(encoding="utf-8"), re.M | re.S
)
STEPS = ["faces", "pyramids", "pack", "train-4", "train-8", "evaluate"]


@pytest.fixture
def workplace(tmp_path, guide_folder):
    """What the page's user has: photos, slurm/ and my.yaml, all of it small."""
    image = Image.open(Path(skimage.data_dir) / "astronaut.png").convert("RGB")
    image = image.crop((60, 0, 380, 320))
    (tmp_path / "photos").mkdir()
    for number in range(12):
        photo = ImageEnhance.Brightness(image).enhance(0.6 + 0.05 * number)
        photo.save(tmp_path / "photos" / f"{number}.jpg")
    (tmp_path / "slurm").symlink_to(ROOT / "slurm")
    (text,) = [block for kind, block in BLOCKS if kind == "yaml"]
    config = yaml.safe_load(text)
    config["guide"]["path"] = str(guide_folder)
    config["prepare"] = {"pack": {"val_fraction": 0.3}, "faces": {"size": 32}}
    config["family"] |= {"z_dim": 8, "channel_base": 64, "channel_max": 8, "probe_samples": 4}
    config["metrics"] = {"num_samples": 16}
    for stage in config["stages"]:
        stage |= {"kimg": 0.016, "batch": 4}
        stage |= {"fade_kimg": 0.008} if "fade_kimg" in stage else {}
    # The mini cluster has two nodes with two GPUs and four cores, which are not real ones.
    config["cluster"] |= {"gpus_per_node": 1, "cpus_per_process": 1, "partition": "main"}
    config["cluster"] |= {"time": "10", "max_restarts": 0}
    (tmp_path / "my.yaml").write_text(yaml.safe_dump(config))
    return tmp_path


def test_every_command_runs_in_its_order(cluster, workplace):
    commands = [line for kind, block in BLOCKS if kind == "bash" for line in block.splitlines()]
    assert len(commands) >= 15
    programs = str(Path(sys.executable).parent)
    environment = os.environ | {
        "PATH": f"{programs}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "COLUMNS": "200",
    }
    numbers: dict[str, str] = {}
    for kind, block in BLOCKS:
        if kind != "bash":
            continue
        done = subprocess.run(
            ["bash", "-ec", block],
            cwd=workplace,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, f"{block}\n{done.stdout}\n{done.stderr}"
        if not numbers:
            numbers = wait_for_chain(cluster, workplace)
            script = (workplace / "first-launch.sh").read_text()
            assert "train_8=$(sbatch --parsable --dependency=afterok:$train_4" in script
        elif "launch status" in block:
            assert done.stdout.count("COMPLETED") >= len(STEPS)
        elif "--photos" in block:
            assert "everything is done" in done.stderr
    assert (workplace / "first.safetensors").is_file()
    assert (workplace / "runs/first/8x8/evaluation.json").is_file()
    result = json.loads((workplace / "runs/first/8x8/result.json").read_text())
    assert result["world_size"] == 2


def wait_for_chain(cluster, workplace) -> dict[str, str]:
    """Wait until all jobs are done; their numbers."""
    folder = workplace / "runs" / "first" / "launch"
    jobs = json.loads((folder / "jobs.json").read_text())["jobs"]
    assert [job["step"] for job in jobs] == STEPS
    for job in jobs:
        cluster.wait(job["id"], "COMPLETED", 120, Path(job["log"]))
    assert cluster.job(jobs[-2]["id"])["NumNodes"] == "2"
    return {job["step"]: job["id"] for job in jobs}


def test_what_installs_is_run_by_ci():
    lines = [line for kind, block in BLOCKS if kind == "sh" for line in block.splitlines()]
    assert lines == ["make install", "source .venv/bin/activate", "dinogen doctor"]
    assert "make install" in (ROOT / ".ci" / "run").read_text()


def test_what_it_names_is_there():
    text = (ROOT / "docs" / "cluster.md").read_text(encoding="utf-8")
    from dinogen.config.training import ClusterConfig

    for key in ("qos", "constraint", "gpu_type", "mem", "signal_seconds", "max_restarts"):
        assert f"`{key}" in text and key in ClusterConfig.model_fields
    names = set(re.findall(r"DINOGEN_\w+", text))
    assert names and all(name in (ROOT / "slurm" / "common.sh").read_text() for name in names)
