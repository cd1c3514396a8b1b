"""Checkpoints: folders that appear whole or not at all, written in a thread; no pickle."""

from __future__ import annotations

import copy
import json
import logging
import os
import platform
import shutil
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from dinogen.config import Config, ConfigError, parse_config, with_earlier_defaults
from dinogen.distributed import process_group
from dinogen.errors import UserError
from dinogen.families.registry import resolve
from dinogen.files import write_json
from dinogen.hub import refuse_code
from dinogen.runs.files import read_object, read_raw, state_problem
from dinogen.runs.layout import STATE, checkpoint_name
from dinogen.runs.run import Checkpoints, Run
from dinogen.runs.values import with_new_keys
from dinogen.version import __version__
from shards.files import sha256_file, sync_folder

log = logging.getLogger(__name__)

TEMPORARY = ".tmp-"
BROKEN = ".broken-"


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint on disk.

    Attributes:
        folder: ``.../checkpoints/000012800``.
        state: the JSON-ready rest: progress, config, versions, logger.
    """

    folder: Path
    state: dict[str, Any]

    @property
    def config(self) -> Config:
        """What it was trained with, by today's schema, as :func:`past_config` reads it."""
        version = self.state["versions"]["dinogen"]
        return past_config(self.state["config"], self.folder / STATE, version)

    def tensors(self, name: str) -> dict[str, Tensor]:
        """One file's tensors on the CPU, such as ``G``, ``G.ema`` or ``optim``."""
        return load_file(self.folder / f"{name}.safetensors")

    def holds(self, name: str) -> bool:
        """Whether there is such a file: a later stage may have networks that it does not know."""
        return (self.folder / f"{name}.safetensors").is_file()


def on_host(tensors: dict[str, dict[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
    """Copies in host memory, which training does not change while they are written."""
    # one by one: safetensors refuses tensors that share memory, and views of larger storage
    copies = {
        file: {k: _copy(v.detach()) for k, v in items.items()} for file, items in tensors.items()
    }
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return copies


def _copy(value: Tensor) -> Tensor:
    # Pinned memory takes a GPU's data at full speed; torch keeps the pages for the next save.
    copy = torch.empty(value.shape, dtype=value.dtype, pin_memory=value.is_cuda)
    return copy.copy_(value, non_blocking=True)


def save_checkpoint(
    parent: Path, nimg: int, tensors: dict[str, dict[str, Tensor]], state: dict[str, Any]
) -> Path:
    """Write ``parent/<nimg>``: a temporary folder, fsync, rename.

    Args:
        parent: the stage's ``checkpoints`` folder.
        nimg: images seen; names the folder.
        tensors: {file name without suffix: {name: tensor}}, as :func:`on_host` gives them.
        state: JSON-ready; ``files`` (hashes) is added.

    Returns:
        The folder. If it is there already and whole, it is left as it is. What lies further on is
        broken, or the run would have gone on from there: it is set aside as ``.broken-<nimg>``.

    Raises:
        OSError: the disk is full or cannot be written; nothing half-written stays.
    """
    checkpoints = Checkpoints(parent)
    final = checkpoints.at(nimg)
    for folder in checkpoints.folders:
        if int(folder.name) < nimg:
            continue
        if folder == final and _whole(final, usable=state_problem({"files": {}} | state) is None):
            return final
        aside = folder.with_name(f"{BROKEN}{folder.name}")
        shutil.rmtree(aside, ignore_errors=True)
        folder.rename(aside)
    temporary = parent / f"{TEMPORARY}{checkpoint_name(nimg)}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        hashes = {}
        for name, items in tensors.items():
            path = temporary / f"{name}.safetensors"
            save_file(items, path)
            with path.open("rb+") as file:
                os.fsync(file.fileno())
            hashes[path.name] = sha256_file(path)
        write_json(temporary / STATE, state | {"files": hashes})
        mode = (temporary / STATE).stat().st_mode
        for name in hashes:
            # safetensors denies access to other users, regardless of the umask
            (temporary / name).chmod(mode)
        sync_folder(temporary)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    temporary.rename(final)
    sync_folder(parent)
    return final


def load_checkpoint(folder: Path, verify: bool = True) -> Checkpoint:
    """Read one checkpoint, and compare the hashes of its files unless told otherwise.

    Raises:
        ValueError: a file is missing, cut off or changed; names it.
    """
    path = folder / STATE
    try:
        raw = read_raw(path)  # a pipe in its place would be waited for
        if raw.problems or not raw.there:
            raise ValueError(raw.problems[0].strip() if raw.problems else "no such file")
        state = with_new_keys(json.loads(raw.value.decode("utf-8")))
        hashes = dict(state["files"])
        if not hashes:
            raise ValueError("it names no files")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} is missing or not readable ({error})") from error
    for name, expected in hashes.items() if verify else ():
        try:
            if (folder / name).exists() and not (folder / name).is_file():
                raise OSError("it is not a regular file")
            found = sha256_file(folder / name)
        except OSError as error:
            raise ValueError(f"{folder / name} cannot be read ({error})") from error
        if found != expected:
            raise ValueError(f"{folder / name} is cut off or changed (its hash differs)")
    return Checkpoint(folder, state)


def newest_checkpoint(parent: Path, usable: bool = False) -> Checkpoint | None:
    """The newest complete checkpoint; a broken one is skipped with a warning.

    Args:
        parent: the stage's ``checkpoints`` folder.
        usable: it also has to hold all that a run needs to go on.
    """
    for folder in reversed(Checkpoints(parent).folders):
        try:
            checkpoint = load_checkpoint(folder)
            if usable and (problem := state_problem(checkpoint.state)):
                raise ValueError(f"{folder / STATE}: {problem}")
            return checkpoint
        except ValueError as error:
            log.warning("checkpoint %s is broken and skipped: %s", folder, error)
    return None


class NewestCheckpoints:
    """The newest complete checkpoint of each stage of a run, with each file hashed once.

    Starting a run asks for the same checkpoint several times: to compare it with the config, to
    see whether its stage is finished, to grow the next stage, and to resume. The first answer is
    kept for as long as no file of the stage's checkpoints changes.

    Args:
        run: its folder.
    """

    def __init__(self, run: Path) -> None:
        self._run = Run(run)
        self._known: dict[int, tuple[_Marks, Checkpoint | None]] = {}

    def of(self, resolution: int) -> Checkpoint | None:
        """That of one stage, the same on every rank; every rank has to call it."""
        parent = self._run.stage(resolution).checkpoints.folder
        found: Checkpoint | None = None
        # rank 0 alone verifies hashes: the others read what it chose
        with process_group.rank_zero_section() as mine:
            if mine:
                found = self._verified(resolution, parent)
        name = process_group.broadcast_object(found.folder.name if found else None)
        if name is None:
            return None
        return found or load_checkpoint(parent / name, verify=False)

    def _verified(self, resolution: int, parent: Path) -> Checkpoint | None:
        marks = _marks_of_files(parent)  # before they are read: a later change is then noticed
        if resolution not in self._known or self._known[resolution][0] != marks:
            self._known[resolution] = marks, newest_checkpoint(parent, usable=True)
        return self._known[resolution][1]


# By path, what changes when a file is written or replaced; None if it cannot be read.
_Marks = dict[Path, tuple[int, ...] | None]


def _marks_of_files(parent: Path) -> _Marks:
    marks: _Marks = {}
    for folder in Checkpoints(parent).folders:
        for path in folder.iterdir():
            try:
                now = path.stat()
                marks[path] = (
                    now.st_dev, now.st_ino, now.st_size, now.st_mtime_ns, now.st_ctime_ns
                )  # fmt: skip
            except OSError:
                marks[path] = None
    return marks


def past_config(
    then: dict[str, Any], source: Path | str, version: str, overrides: Sequence[str] = ()
) -> Config:
    """The config in a checkpoint or an export, maybe of another dinogen, by today's schema.

    Keys that it lacks get today's defaults, for a new key's default has to leave what a run
    computes as it was; where a default has changed, they get that of the time.

    Args:
        then: the config as it was saved.
        source: what holds it, named in errors.
        version: the dinogen that wrote it.
        overrides: ``KEY=VALUE`` changes to it.

    Raises:
        ConfigError: naming a key that today's schema does not know, or a value that it refuses.
    """
    refuse_code(then, Path(source))
    try:
        earlier = with_earlier_defaults(copy.deepcopy(then))
        return resolve(parse_config(earlier, list(overrides)))
    except ConfigError as error:
        raise ConfigError(
            f"{source}: {error}\nit was written by dinogen {version}, this is {__version__}: "
            "use the version that wrote it"
        ) from None


def or_a_new_run(config: Config) -> str:
    """What to do where a config, data or weights differ from those of a checkpoint."""
    return (
        f"restore that, or set run= to a new folder (with init_from={config.run} too, the new run "
        "starts from the weights of this one)"
    )


def check_same_data(
    checkpoint: Checkpoint, config: Config, fingerprint: str, remedy: str | None = None
) -> None:
    """Refuse other shards than a checkpoint was trained on.

    Args:
        checkpoint: of the stage.
        config: names today's data.
        fingerprint: of today's data.
        remedy: what to do about it, where nothing is trained; unless given, it is that of training.

    Raises:
        ConfigError: naming ``data.path``.
    """
    if checkpoint.state["data"] is None:
        log.warning(
            "%s does not say which data it was trained on: NOT checked that %s holds them",
            checkpoint.folder,
            config.data.location,
        )
    elif checkpoint.state["data"] != fingerprint:
        raise ConfigError(
            f"data.path: {config.data.location} holds other shards than the checkpoint "
            f"{checkpoint.folder} was trained on: {remedy or or_a_new_run(config)}"
        )


def versions() -> dict[str, str]:
    """Versions that a result depends on."""
    return {"dinogen": __version__, "torch": torch.__version__, "python": platform.python_version()}


def prune(parent: Path, keep_last: int) -> None:
    """Delete all but the newest ``keep_last`` checkpoints, the best, and those saved to be kept.

    What a killed save left is deleted too.
    """
    folders = Checkpoints(parent).folders
    marks = [_saved_marks(folder) for folder in folders]
    best = max((i for i, mark in enumerate(marks) if mark.get("best")), default=None)
    for i, folder in enumerate(folders[:-keep_last]):
        if not marks[i].get("keep") and i != best:
            # renamed first, so that a kill in the midst leaves no half checkpoint
            doomed = folder.with_name(f"{TEMPORARY}{folder.name}")
            folder.rename(doomed)
    for left in parent.glob(f"{TEMPORARY}*"):
        shutil.rmtree(left, ignore_errors=True)


def _saved_marks(folder: Path) -> dict[str, Any]:
    return read_object(folder / STATE).value or {}


def _whole(folder: Path, usable: bool) -> bool:
    try:
        found = load_checkpoint(folder)
    except ValueError:
        return False
    return not usable or state_problem(found.state) is None


class SaveError(UserError):
    """A checkpoint could not be written; the one before is whole."""


class Saver:
    """At most one checkpoint is on its way; the next one waits for it.

    Attributes:
        waited: seconds that the caller has spent waiting here.
    """

    def __init__(self) -> None:
        self.waited = 0.0
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="saver")
        self._pending: Future[None] | None = None
        self._folder = Path()

    def submit(self, folder: Path, write: Callable[[], None]) -> None:
        """Call ``write`` in the thread, after what is on its way now.

        Args:
            folder: where it writes, for messages.
            write: owns all that it writes; nobody changes it meanwhile.

        Raises:
            SaveError: the checkpoint before could not be written.
        """
        self.wait()
        self._folder = folder
        self._pending = self._pool.submit(write)

    def check(self) -> None:
        """Say at once if what was on its way has failed.

        Raises:
            SaveError: it could not be written.
        """
        if self._pending is not None and self._pending.done():
            self.wait()

    def wait(self) -> None:
        """Wait until what is on its way is on disk.

        Raises:
            SaveError: it could not be written.
        """
        if self._pending is None:
            return
        before = time.monotonic()
        pending, self._pending = self._pending, None
        try:
            pending.result()
        except (OSError, SafetensorError) as error:
            raise SaveError(
                f"{self._folder}: the checkpoint could not be written ({error}): free space there "
                "or give run: another disk; the same command goes on from the last good one"
            ) from error
        finally:
            self.waited += time.monotonic() - before

    def close(self) -> None:
        """End the thread; what is on its way is written first, its failure no longer matters."""
        self._pool.shutdown(wait=True)
