"""`.ci/newest.py` finds the newest Python that is supported, wherever it lies on a machine."""

import importlib.util
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def ci():
    spec = importlib.util.spec_from_file_location("newest", ROOT / ".ci" / "newest.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """Interpreters that say a version and do nothing else; an empty one is a stand-in of pyenv."""
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{tmp_path / 'nowhere'}")
    monkeypatch.setenv("PYENV_ROOT", str(tmp_path / "pyenv"))

    def add(name, version):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("#!/bin/sh\n" + (f"echo {version}\n" if version else "exit 127\n"))
        path.chmod(0o755)
        return str(path)

    return add


SUPPORTED = {(3, 11), (3, 12), (3, 13)}


def test_on_the_path_and_in_pyenvs_folder(ci, machine):
    machine("bin/python3", "3 11")
    machine("bin/python3.12", "3 12")
    machine("bin/python3.13", "")
    wanted = machine("pyenv/versions/3.13.0/bin/python3", "3 13")
    machine("pyenv/versions/3.9.18/bin/python3", "3 9")
    assert ci.newest(ci.interpreters(), SUPPORTED, (3, 11)) == (wanted, (3, 13))


def test_only_what_is_newer_than_the_other_one(ci, machine):
    machine("bin/python3", "3 11")
    machine("bin/python3.10", "3 10")
    assert ci.newest(ci.interpreters(), SUPPORTED, (3, 11)) is None


def test_a_python_that_nobody_has_tried_is_named_and_skipped(ci, machine, capsys):
    machine("bin/python3.99", "3 99")
    wanted = machine("bin/python3.12", "3 12")
    machine("bin/python3-config", "3 13")
    assert ci.newest(ci.interpreters(), SUPPORTED, (3, 11)) == (wanted, (3, 12))
    assert (
        "Python 3.99 is here, but setup.cfg does not name it: NOT tested" in capsys.readouterr()[0]
    )


def test_a_machine_with_one_python_says_so(ci, machine, tmp_path, capsys):
    assert ci.install(tmp_path) == 0
    assert json.loads((tmp_path / "state.json").read_text()) == {"python": None}
    assert ci.test(tmp_path) == 0
    assert "ALONE" in capsys.readouterr()[0]


def test_what_is_installed_stands_in_setup_cfg(ci):
    assert ci.supported() == SUPPORTED
    without, whole = ci.requirements(False), ci.requirements(True)
    assert any(line.startswith("torch>=") for line in whole)
    assert not any("torch" in name for name in without)
    assert {"moto[s3]>=5.1", "s3fs>=2025.3", "pytest>=9", "numpy>=2.0"} <= set(without)
