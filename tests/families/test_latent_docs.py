"""Every command of "On latents" in docs/flow.md, at a tiny size, in their order."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import numpy as np
from PIL import Image
from typer.testing import CliRunner

from launch.cli.main import app
from tests.families.tiny import discs

ROOT = Path(__file__).parents[2]
SECTION = (ROOT / "docs/flow.md").read_text().split("\n## On latents\n")[1].split("\n## ")[0]
COMMANDS = [
    line
    for block in re.findall(r"^```sh\n(.*?)^```", SECTION, re.M | re.S)
    for line in block.splitlines()
]
# What would take minutes, made short; discs are no faces.
SHORTER = {
    "prepare": ["prepare.faces.detect=none", "prepare.faces.size=32"],
    "train vae_latent_fast": ["stages.0.kimg=0.016", "log.num_samples=4"],
    "train flow_latent_fast": [
        *("stages.0.kimg=0.016", "stages.0.warmup_kimg=0", "log.num_samples=4"),
        *("family.sample_steps=2", "family.dit.depth=2"),
    ],
    "evaluate": ["--metrics", "spectrum", "--num-samples", "8"],
}


def test_every_command_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("photos").mkdir()
    for number, pixels in enumerate(discs(24, 32)):
        Image.fromarray(pixels).save(f"photos/{number:02d}.png")
    assert len(COMMANDS) == 9
    for line in COMMANDS:
        words = shlex.split(line)
        assert words[0] == "dinogen"
        shorter = SHORTER.get(words[1], SHORTER.get(" ".join(words[1:3]), []))
        done = CliRunner().invoke(app, [*words[1:], *shorter])
        assert done.exit_code == 0, f"{line}\n{done.output}\n{done.exception!r}"
    ours = sorted(Path("runs/flow_latent_fast/samples").glob("*seed0/0*.png"))
    theirs = sorted(Path("flow-exported/samples").glob("*seed0/0*.png"))
    assert len(ours) == len(theirs) == 16
    for one, other in zip(ours, theirs, strict=True):
        pixels, again = (np.asarray(Image.open(path)) for path in (one, other))
        assert pixels.shape == (32, 32, 3) and np.array_equal(pixels, again)
