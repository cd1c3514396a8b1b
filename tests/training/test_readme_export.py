"""What the README says of an exported file, run as it stands there, for every family."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dinogen.training.checkpointing.export import export, load_generator
from dinogen.training.checkpointing.snapshot import load_snapshot
from dinogen.training.run import train
from tests.families.conftest import disc_data  # noqa: F401 - a fixture
from tests.families.tiny import BATCH, RESOLUTION, TINY, tiny_config

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
(SNIPPET,) = [
    block
    for block in re.findall(r"^```python\n(.*?)^```", TEXT, re.M | re.S)
    if "first.safetensors" in block
]


@pytest.mark.parametrize("family", TINY)
def test_the_snippet_runs_outside_the_clone(family, disc_data, tmp_path):  # noqa: F811
    """In another folder, without the run, its data and its guide."""
    config = tiny_config(family, disc_data, tmp_path / "run", "stages.0.kimg=0.008")
    train(config)
    place = tmp_path / "elsewhere"
    place.mkdir()
    export(config.run, place / "first.safetensors")
    expected = load_snapshot(config.run).sample(3, seed=5)
    (tmp_path / "run").rename(tmp_path / "gone")
    path = [str(ROOT), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", SNIPPET],
        cwd=place,
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert f"torch.Size([4, 3, {RESOLUTION}, {RESOLUTION}]) {BATCH}" in done.stdout
    found = load_generator(place / "first.safetensors").sample(3, seed=5)
    assert torch.equal(found, expected)
