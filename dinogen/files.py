"""Files that appear whole or not at all: temporary name, fsync, rename; and the hash of weights.

A job may be killed at any moment, and the next one takes the presence of a file as a sign that it
is complete.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from dinogen.errors import ConfigError
from shards.files import TEMPORARY, atomic_write, sync_folder

# torch takes seconds to import, and most of those who write files do without it.
if TYPE_CHECKING:
    from torch import Tensor


def write_bytes(path: Path, data: bytes) -> None:
    """Write ``data`` to ``path``, whole or not at all; the folder of ``path`` is created.

    Raises:
        OSError: the folder or file cannot be written; an older file at ``path`` is unchanged.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as file:
        file.write(data)


@contextmanager
def written_beside(path: Path) -> Iterator[Path]:
    """A temporary name beside ``path``, for what is written in pieces or by another program.

    The file has to be there at the end, and is then renamed to ``path``; if an exception is raised
    it is removed, and ``path`` stays as it was. The folder of ``path`` is created.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}{TEMPORARY}")
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.rename(path)
        sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write ``text`` as UTF-8 to ``path``, whole or not at all; line ends stay as they are."""
    write_bytes(path, text.encode("utf-8"))


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as indented JSON to ``path``, whole or not at all.

    Raises:
        ValueError: NaN or infinity, which JSON does not have.
        TypeError: a value that JSON cannot hold.
    """
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def named_folder(path: Path) -> Path:
    """The same folder by a path that ends in its name, unlike ``.`` and ``..``.

    Messages and stored paths have to name the folder wherever they are read.
    """
    return path.resolve() if path.name in ("", "..") else path


def module_of_file(path: Path, kind: str) -> ModuleType:
    """Run a Python file of the user's own.

    Args:
        path: an absolute path.
        kind: what it defines, ``family`` or ``guide``; also the section of the config that has
            the key ``file``.

    Raises:
        ConfigError: there is no such file, or it fails; names the key.
    """
    name = f"dinogen_{kind}_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if not path.is_file() or spec is None or spec.loader is None:
        raise ConfigError(
            f"{kind}.file: {path} is not a Python file: name one that defines a {kind}"
        )
    module = importlib.util.module_from_spec(spec)
    # by this name its class is found again, as pickling and typing do
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise ConfigError(
            f"{kind}.file: {path} cannot be imported: {type(error).__name__}: {error}"
        ) from error
    return module


def why_not_writable(path: Path, make: bool) -> str | None:
    """Why a file cannot be written, found by trying without leaving a trace; None if it can.

    Args:
        path: the file, which is not touched.
        make: whether to create the folder that it is in.
    """
    if path.is_dir():
        return "it is a folder"
    try:
        if make:
            path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
        os.close(descriptor)
        Path(name).unlink()
    except OSError as error:
        return error.strerror or str(error)
    return None


def next_free(path: Path) -> Path:
    """The path, or the first of ``PATH-2``, ``PATH-3`` and so on that does not exist."""
    free, number = path, 1
    while os.path.lexists(free):
        number += 1
        free = path.with_name(f"{path.name}-{number}")
    return free


def weights_sha256(tensors: Mapping[str, Tensor]) -> str:
    """Hash over the sorted tensors: names, dtypes, shapes and bytes.

    Args:
        tensors: a state dict, on any device.

    Returns:
        64 hex digits, independent of the mapping's order and of the device.
    """
    import torch

    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name}\0{tensor.dtype}\0{list(tensor.shape)}\0".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
