"""The device guard of guard.cpp: compiled when it is needed, loaded before torch is imported."""

from __future__ import annotations

import ctypes
import hashlib
import os
import runpy
import shutil
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

SOURCE = Path(__file__).with_name("guard.cpp")
COMPILER = "g++"


class NoGuardError(Exception):
    """The guard cannot be compiled or loaded; the message says what is missing."""


def gpu_found() -> bool:
    """Whether torch can compute on a GPU; it is not imported."""
    _, _, cuda = _torch()
    if cuda is None:
        return False
    count = ctypes.c_int(0)
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return not driver.cuInit(0) and not driver.cuDeviceGetCount(ctypes.byref(count)) and count.value


def load() -> None:
    """Make a CUDA device known to the parts of torch that are written in C++.

    Raises:
        NoGuardError: torch is imported already, there is no g++, or it cannot compile the guard.
    """
    if "torch" in sys.modules:  # by then it has concluded that there is no device
        raise NoGuardError("the guard has to be loaded before torch is imported")
    ctypes.CDLL(str(compiled()), mode=ctypes.RTLD_GLOBAL)


def compiled() -> Path:
    """guard.cpp as a shared library, compiled once for each version of it and of torch.

    Raises:
        NoGuardError: as :func:`load`.
    """
    home, version, cuda = _torch()
    key = hashlib.sha256(SOURCE.read_bytes() + str(home).encode()).hexdigest()[:16]
    folder = Path(tempfile.gettempdir()) / f"dinogen-fake-cuda-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        raise NoGuardError(f"{folder} belongs to another user: set TMPDIR to a folder of your own")
    library = folder / f"guard-{version}-{key}.so"
    if library.exists():
        return library
    if shutil.which(COMPILER) is None:
        raise NoGuardError(
            f"without a GPU, steps are run with fake CUDA tensors; {SOURCE.name} has to be "
            f"compiled for that, and there is no {COMPILER} on the PATH: install it (apt-get "
            f"install {COMPILER}), or use a machine with a GPU"
        )
    part = library.with_suffix(f".{os.getpid()}")
    command = [COMPILER, "-O1", "-shared", "-fPIC", "-std=c++20", str(SOURCE), "-o", str(part)]
    command += [f"-I{home}/include", f"-I{home}/include/torch/csrc/api/include"]
    # A build with CUDA has hooks of its own, and ends the process at a second registration.
    command += ["-DOWN_HOOKS"] if cuda is None else []
    command += [f"-L{home}/lib", f"-Wl,-rpath,{home}/lib", "-ltorch_cpu", "-lc10"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise NoGuardError(
            f"{COMPILER} cannot compile {SOURCE} for torch {version}:\n{done.stderr[-2000:]}"
        )
    part.replace(library)  # another process may have done the same meanwhile
    return library


def _torch() -> tuple[Path, str, str | None]:
    """Folder and version of torch, and of the CUDA that it was built with, if it was."""
    found = find_spec("torch")
    if found is None or found.origin is None:
        raise NoGuardError("torch is not installed")
    home = Path(found.origin).parent
    facts = runpy.run_path(str(home / "version.py"))
    return home, facts["__version__"], facts["cuda"]
