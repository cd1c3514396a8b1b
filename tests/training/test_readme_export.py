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


@pytest.fixture(scope="module")
def printed(disc_data, tmp_path_factory):  # noqa: F811
    """By family, what the snippet prints, and the folder that it ran in, outside the clone.

    The run is gone by then. One interpreter runs all of them, for it takes seconds to start.
    """
    places = {}
    for family in TINY:
        folder = tmp_path_factory.mktemp(family)
        config = tiny_config(family, disc_data, folder / "run", "stages.0.kimg=0.008")
        train(config)
        (folder / "elsewhere").mkdir()
        export(config.run, folder / "elsewhere" / "first.safetensors")
        torch.save(load_snapshot(config.run).sample(3, seed=5), folder / "expected.pt")
        (folder / "run").rename(folder / "gone")
        places[family] = folder / "elsewhere"
    script = tmp_path_factory.mktemp("snippet") / "all.py"
    script.write_text(
        "import os, sys\n"
        "for folder in sys.argv[1:]:\n"
        "    os.chdir(folder)\n"
        f"    exec(compile({SNIPPET!r}, 'README.md', 'exec'), {{}})\n"
    )
    path = [str(ROOT), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(script), *map(str, places.values())],
        cwd=script.parent,
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return dict(
        zip(places, zip(done.stdout.splitlines(), places.values(), strict=True), strict=True)
    )


@pytest.mark.parametrize("family", TINY)
def test_the_snippet_runs_outside_the_clone(family, printed):
    """In another folder, without the run, its data and its guide."""
    line, place = printed[family]
    assert line == f"torch.Size([4, 3, {RESOLUTION}, {RESOLUTION}]) {BATCH}"
    found = load_generator(place / "first.safetensors").sample(3, seed=5)
    assert torch.equal(found, torch.load(place.parent / "expected.pt", weights_only=True))
