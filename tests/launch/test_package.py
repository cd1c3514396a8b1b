"""The wheel is the whole product, and leaves a cluster's own torch where it is."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from configparser import ConfigParser
from email.parser import Parser
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
SOURCES = ("dinogen", "launch", "shards", "configs", "slurm")
FILES = ("setup.cfg", "pyproject.toml", "README.md", "LICENSE")
BUILD = "import sys; from setuptools import build_meta as m; print(m.build_wheel(sys.argv[1]))"


def patterns():
    setup = ConfigParser()
    setup.read(ROOT / "setup.cfg", encoding="utf-8")
    section = setup["options.package_data"]
    return [(package, pattern) for package in section for pattern in section[package].split()]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The folder of an installed wheel, far from the clone that it was built from."""
    pytest.importorskip("setuptools")
    clone = tmp_path_factory.mktemp("clone")
    for name in SOURCES:
        shutil.copytree(
            ROOT / name, clone / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__")
        )
    for name in FILES:
        shutil.copy(ROOT / name, clone / name)
    built = tmp_path_factory.mktemp("built")
    subprocess.run(
        [sys.executable, "-c", BUILD, str(built)], cwd=clone, check=True, capture_output=True
    )
    shutil.rmtree(clone)
    (wheel,) = built.glob("*.whl")
    folder = tmp_path_factory.mktemp("site")
    zipfile.ZipFile(wheel).extractall(folder)
    return folder


@pytest.fixture
def dinogen(site, tmp_path):
    """Runs the command of the wheel in an empty folder."""

    def run(*words):
        return subprocess.run(
            [sys.executable, "-m", "launch.cli", *words],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(site), "COLUMNS": "200"},
            capture_output=True,
            text=True,
            check=False,
        )

    return run


@pytest.fixture
def torch_required(site):
    """What the wheel's metadata ask of torch."""
    (metadata,) = site.glob("dinogen-*.dist-info/METADATA")
    lines = Parser().parsestr(metadata.read_text(encoding="utf-8")).get_all("Requires-Dist")
    (found,) = [one for one in map(Requirement, lines) if one.name == "torch"]
    return found.specifier


@pytest.mark.parametrize(("package", "pattern"), patterns())
def test_each_pattern_of_the_package_data_matches(package, pattern):
    assert list((ROOT / package).glob(pattern))


def test_the_wheel_holds_every_config_and_every_script(site):
    for name, there in [("configs", "dinogen/configs"), ("slurm", "launch/slurm/scripts")]:
        files = [path for path in (ROOT / name).rglob("*") if path.is_file()]
        assert len(files) > 5
        for path in files:
            assert (site / there / path.relative_to(ROOT / name)).read_bytes() == path.read_bytes()
    assert not list(site.glob("configs")) and not list(site.glob("slurm"))


def test_a_chain_of_jobs_is_planned_from_the_wheel(dinogen, site, tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.png").write_bytes((ROOT / "docs" / "overview.png").read_bytes())
    words = ("launch", "guided_64", "--on", "slurm", "--dry-run", "--photos", "photos")
    words += ("--unchecked",)  # the guide's weights are not on this machine
    done = dinogen(*words)
    assert done.returncode == 0, done.stderr
    scripts = site / "launch" / "slurm" / "scripts"
    commands = (tmp_path / "guided_64-launch.sh").read_text()
    assert f"DINOGEN_SLURM={scripts}," in commands
    assert f" {scripts / 'train.sbatch'} " in commands


def test_a_study_is_planned_from_the_wheel(dinogen):
    done = dinogen("study", "plan", "study")
    assert done.returncode == 0, done.stderr
    assert "runs of gan, vae, diffusion, guided" in done.stdout


def test_a_name_that_is_not_shipped_gets_the_list(dinogen):
    done = dinogen("launch", "guided_65", "--dry-run")
    assert done.returncode != 0
    assert "guided_65: no such config file" in done.stderr
    for name in ("guided_64", "demo", "study", "ablations"):
        assert name in done.stderr


def test_the_demo_finds_its_config(dinogen):
    done = dinogen("config", "show", "demo")
    assert done.returncode == 0, done.stderr
    assert "resolution: 16" in done.stdout


@pytest.mark.parametrize("version", ["2.13.0", "2.12.0+cu126", "2.9.0a0+nv25.8", "2.13.0+cpu"])
def test_a_torch_that_is_there_is_kept(torch_required, version):
    """pip keeps what is installed where it satisfies the requirement, pre-releases too."""
    assert torch_required.contains(version, prereleases=True)


@pytest.mark.parametrize("version", ["2.8.1", "1.13.0"])
def test_a_torch_that_is_too_old_is_replaced(torch_required, version):
    assert not torch_required.contains(version, prereleases=True)


def test_exact_versions_are_in_constraints_alone():
    setup = (ROOT / "setup.cfg").read_text(encoding="utf-8")
    assert "==" not in setup
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    assert all("==" in line for line in lines if line and not line.startswith("#"))
