"""Runs scripts of benchmarks/ in the process of the tests; their ranks are forked from another."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests import forked

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def benchmark(monkeypatch, capsys) -> Callable[..., str]:
    """Runs a script with its arguments as a command would; gives what it printed."""
    forked.context()  # what it would have its own for: the process that ranks are forked from
    monkeypatch.syspath_prepend(str(FOLDER))
    for name in ("PYTHONPATH", "OMP_NUM_THREADS"):  # it changes them
        monkeypatch.setenv(name, os.environ.get(name, ""))

    def run(script: str, *arguments: str) -> str:
        module = importlib.import_module(script)
        monkeypatch.setattr(sys, "argv", [f"{script}.py", *arguments])
        with pytest.raises(SystemExit) as ended:
            module.main()
        printed = capsys.readouterr().out
        assert not ended.value.code, printed[-8000:]
        return printed

    return run
