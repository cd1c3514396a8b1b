"""On the real mini Slurm: a large plan, and a user who is not root."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import yaml

from tests.families.tiny import pack_discs
from tests.slurm.helpers import ROOT

NOBODY = 65534


def test_sbatch_accepts_the_plan_up_to_256_on_four_nodes(cluster, write_config, dinogen, tmp_path):
    sizes = [4, 8, 16, 32, 64, 128, 256]
    path = write_config()
    plan = yaml.safe_load(path.read_text())
    plan["stages"] = [{"resolution": size, "kimg": 100} for size in sizes]
    plan["cluster"] = {"cpus_per_process": 1}
    pack_discs(tmp_path / "large", size=256, val_fraction=0)
    plan["data"]["path"] = str(tmp_path / "large")
    path.write_text(yaml.safe_dump(plan))
    flags = ("--on", "slurm", "--nodes", 4, "--gpus-per-node", 8, "--time", "12:00:00")
    printed = dinogen("launch", path, *flags, "--dry-run")
    assert not (tmp_path / "run").exists()
    assert "commands: run-launch.sh" in printed
    script = (tmp_path / "run-launch.sh").read_text()
    lines = [line for line in script.splitlines() if "=$(sbatch " in line]
    assert len(lines) == len(sizes)
    asked = []
    for number, line in enumerate(lines):
        words = shlex.split(line.partition("$(")[2].removesuffix(")"))
        after = [word for word in words if word.startswith("--dependency=")]
        assert after == ([f"--dependency=afterok:$train_{sizes[number - 1]}"] if number else [])
        words = [word for word in words if word not in after]
        asked.append((int(flag(words, "nodes")), int(flag(words, "gpus-per-node"))))
        # The mini cluster has two nodes of two GPUs and four cores.
        small = {"nodes": min(asked[-1][0], 2), "gpus-per-node": min(asked[-1][1], 2)}
        small["cpus-per-task"] = min(int(flag(words, "cpus-per-task")), 4)
        for name, value in small.items():
            words = [f"--{name}={value}" if w.startswith(f"--{name}=") else w for w in words]
        done = subprocess.run([words[0], "--test-only", *words[1:]], capture_output=True, text=True)
        assert done.returncode == 0, f"{words}\n{done.stderr}"
    assert asked == [(1, 1), (1, 1), (1, 1), (1, 1), (1, 4), (2, 8), (4, 8)]


def flag(words: list[str], name: str) -> str:
    (found,) = [word for word in words if word.startswith(f"--{name}=")]
    return found.partition("=")[2]


@pytest.fixture
def home(data_folder):
    """A folder of the user nobody, with data and an interpreter that it may run."""
    if os.geteuid():
        pytest.skip("this is not root: the other tests have been run as a plain user already")
    folder = Path(tempfile.mkdtemp(prefix="dinogen-nobody-"))
    folder.chmod(0o755)
    shutil.copytree(data_folder, folder / "data")
    for file in folder.rglob("*"):  # safetensors writes for its user alone
        file.chmod(0o755 if file.is_dir() else 0o644)
    work = folder / "work"
    work.mkdir()
    os.chown(work, NOBODY, NOBODY)
    yield folder
    shutil.rmtree(folder)


def as_nobody(command: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"HOME": str(folder / "work"), "USER": "nobody", "COLUMNS": "200"}
    environment |= interpreter_paths(folder)
    return subprocess.run(
        command,
        user=NOBODY,
        group=NOBODY,
        extra_groups=[],
        cwd=folder / "work",
        env=environment,
        capture_output=True,
        text=True,
    )


def interpreter_paths(folder: Path) -> dict[str, str]:
    """Where a copied interpreter finds its libraries, and this repository."""
    if not (folder / "python").exists():
        return {"PYTHONPATH": str(ROOT)}
    import torch

    packages = Path(torch.__file__).parents[1]
    return {
        "PYTHONHOME": str(folder / "python"),
        "PYTHONPATH": f"{ROOT}:{packages}",
        "LD_LIBRARY_PATH": str(folder / "python" / "lib"),
    }


def python_for_nobody(folder: Path) -> str:
    """An interpreter that nobody may run; copied, as links where that works, out of root's home."""
    with contextlib.suppress(PermissionError):
        as_nobody([sys.executable, "-c", "import torch"], folder).check_returncode()
        return sys.executable

    def link(source: str, target: str) -> None:
        try:
            os.link(source, target)
        except OSError:
            shutil.copy2(source, target)

    name = f"python{sys.version_info[0]}.{sys.version_info[1]}"
    base = Path(sys.base_prefix)
    shutil.copytree(
        base / "lib" / name,
        folder / "python" / "lib" / name,
        copy_function=link,
        ignore=shutil.ignore_patterns("site-packages", "test", "__pycache__"),
    )
    for library in (base / "lib").glob("libpython*"):
        link(str(library), str(folder / "python" / "lib" / library.name))
    (folder / "python" / "bin").mkdir()
    python = folder / "python" / "bin" / name
    link(str(base / "bin" / name), str(python))
    done = as_nobody([str(python), "-c", "import torch, launch.cli"], folder)
    if done.returncode:
        pytest.skip(f"nobody cannot run Python here: {done.stderr.strip().splitlines()[-1]}")
    return str(python)


def test_a_user_who_is_not_root_can_submit(cluster, write_config, home):
    config = write_config(
        f"run={home / 'work' / 'run'}",
        f"data.path={home / 'data'}",
        "cluster.stages=[]",
        folder=home,
    )
    python = python_for_nobody(home)
    launch = [python, "-m", "launch.cli", "launch"]
    done = as_nobody([*launch, str(config), "--on", "slurm", "--stages", "4"], home)
    assert done.returncode == 0, done.stderr
    folder = home / "work" / "run" / "launch"
    (job,) = json.loads((folder / "jobs.json").read_text())["jobs"]
    assert cluster.job(job["id"])["UserId"] == f"nobody({NOBODY})"
    cluster.wait(job["id"], "COMPLETED", 60, Path(job["log"]))
    done = as_nobody([*launch, "status", "run"], home)
    assert "COMPLETED" in done.stdout, done.stdout + done.stderr
