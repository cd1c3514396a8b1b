"""What docs/flow.md shows of rectified flow, EDM and min-SNR, as it stands there."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import torch
import yaml
from typer.testing import CliRunner

from dinogen.config import parse_config
from dinogen.families.registry import family_class, resolve
from dinogen.training.run import train
from launch.cli.main import app
from tests.families.tiny import tiny_config

PAGE = (Path(__file__).parents[2] / "docs" / "flow.md").read_text(encoding="utf-8")
TEXT, _ = PAGE.split("## The diffusion transformer")
CONFIGS = re.findall(r"^```yaml\n(.*?)^```", TEXT, re.M | re.S)
COMMANDS = "".join(re.findall(r"^```bash\n(.*?)^```", TEXT, re.M | re.S)).splitlines()


@pytest.mark.parametrize("text", CONFIGS)
def test_every_config_is_one_that_a_family_is_built_from(text):
    config = parse_config(yaml.safe_load(text) | {"stages": [{"resolution": 64, "kimg": 1}]}, ())
    resolved = resolve(config)
    family_class(resolved.family)(resolved, resolved.stages[0], torch.device("meta"))


def test_every_command(disc_data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train(tiny_config("flow", disc_data, Path("runs/flow"), "stages.0.kimg=0.008"))
    for line in COMMANDS:
        program, *args = shlex.split(line)
        assert program == "dinogen"
        result = CliRunner().invoke(app, args)
        assert result.exit_code == 0, result.output
    assert len(list(Path("flow10").rglob("0*.png"))) == 4
