"""Which tests are quick, which come first or stay in one process, which need no torch."""

from __future__ import annotations

import functools
import importlib.util
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from fnmatch import fnmatch
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import FrameType, ModuleType

import pytest

ROOT = Path(__file__).parents[1]

# What `make quick` runs, as patterns below tests/: each part of the code, at most 75 s together on
# two quiet cores. A new file in these folders belongs to it, unless it is named as slow.
QUICK = (
    "diffusion/*",
    "families/test_registry.py",
    "features/*",
    "launch/test_config_command.py",
    "launch/test_launch_plan.py",
    "launch/test_package.py",
    "launch/test_study_plan.py",
    "losses/*",
    "metrics/*",
    "networks/*",
    "prepare/test_align.py",
    "prepare/test_find.py",
    "prepare/test_join.py",
    "prepare/test_pyramid.py",
    "prepare/test_read.py",
    "report/*",
    "shards/*",
    "test_config*.py",
    "distributed/test_rng.py",
    "test_examples.py",
    "test_hub.py",
    "test_layout.py",
    "training/test_augment.py",
    "training/test_checkpoint.py",
    "training/test_ema.py",
    "training/test_engine.py",
    "training/test_stages.py",
    "training/test_transfer.py",
)
SLOW = (
    "features/test_clip.py",
    "features/test_inception.py",
    "losses/test_eight_modes.py",
    "metrics/test_collect.py",
    "metrics/test_faces.py",
    "metrics/test_extractors.py",
    "metrics/test_perceptual.py",
    "metrics/test_reconstruction.py",
    "report/test_compare*.py",
    "shards/test_mix*.py",
    "shards/test_remote*.py",
    "shards/test_repair*.py",
    "shards/test_verify.py",
)
# In this order, before all others: what takes longest begins first, so that nothing is left over
# for one process at the end. The cluster's tests mostly wait.
FIRST = (
    "slurm/*",
    "test_readme.py",
    "benchmarks/*",
    "training/*",
    "evaluation/*",
    "visualize/*",
    "launch/*",
    "families/*",
    "guidance/*",
)


@functools.cache
def _is_quick(path: Path) -> bool:
    place = path.relative_to(ROOT / "tests").as_posix()
    return any(fnmatch(place, pattern) for pattern in QUICK) and not any(
        fnmatch(place, pattern) for pattern in SLOW
    )


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """tests/stress runs only where it is named; `-m quick` imports no file that is not quick."""
    stress = ROOT / "tests" / "stress"
    if collection_path.is_relative_to(stress):
        named = [Path(config.invocation_params.dir, arg.partition("::")[0]) for arg in config.args]
        return None if any(path.resolve().is_relative_to(stress) for path in named) else True
    if config.getoption("markexpr") == "quick" and collection_path.suffix == ".py":
        return None if _is_quick(collection_path) else True
    return None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what is quick, and bring what takes longest to the front."""
    for item in items:
        if _is_quick(item.path):
            item.add_marker("quick")
    items.sort(key=lambda item: _turn(item.path))


@functools.cache
def _turn(path: Path) -> int:
    place = path.relative_to(ROOT / "tests").as_posix()
    return next((n for n, pattern in enumerate(FIRST) if fnmatch(place, pattern)), len(FIRST))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Each file stays whole, for its fixtures are dear; all that use the cluster are one."""
    from xdist.scheduler import LoadFileScheduling

    class ByFile(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = super()._split_scope(nodeid)
            return "tests/slurm" if file.startswith("tests/slurm/") else file

    return ByFile(config, log)


class _SkipWithoutTorch:
    """Finds no module; skips the test, or the file, in which our code asks for torch or its like.

    Other libraries that try to import torch go on without it as they always do.
    """

    names = ("torch", "torchvision", "transformers", "facenet_pytorch", "torch_fidelity", "lpips")

    def find_spec(
        self,
        name: str,
        path: Sequence[str] | None = None,
        target: ModuleType | None = None,
    ) -> ModuleSpec | None:
        if name.partition(".")[0] not in self.names:
            return None
        asking = [file for file in _files_of_the_stack() if "importlib" not in str(file)]
        if asking and asking[0].is_relative_to(ROOT) and "site-packages" not in asking[0].parts:
            tests = [f.relative_to(ROOT) for f in asking if f.name.startswith("test_")]
            where = tests[-1] if tests else asking[0].relative_to(ROOT)
            pytest.skip(f"{where}: needs {name.partition('.')[0]}", allow_module_level=True)
        return None


def _files_of_the_stack() -> Iterator[Path]:
    """Where the caller's caller is, innermost first."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        yield Path(frame.f_code.co_filename)
        frame = frame.f_back


# .ci/run sets it where the newest Python of a machine has no torch that is worth its download.
# Otherwise a missing torch is an error like any other.
if os.environ.get("DINOGEN_TESTS_WITHOUT_TORCH") == "1":
    assert importlib.util.find_spec("torch") is None, "torch is here: run the tests with it"
    sys.meta_path.append(_SkipWithoutTorch())


@pytest.fixture(autouse=True)
def logging_as_imported() -> Iterator[None]:
    """A command sets up the log of its process: no test has its level, nor a handler whose stream
    is closed. Cleared before as well, for a fixture of a whole file may have run a command."""
    _clear_logging()
    yield
    _clear_logging()


def _clear_logging() -> None:
    root = logging.getLogger()
    root.handlers[:] = [handler for handler in root.handlers if _is_pytests(handler)]
    for name in ("dinogen", "shards", "launch"):
        logging.getLogger(name).setLevel(logging.NOTSET)


def _is_pytests(handler: logging.Handler) -> bool:
    return type(handler).__module__.startswith("_pytest")
