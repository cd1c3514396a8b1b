"""Every YAML of configs/ is a run that can be built, as large as it says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from dinogen.config import load_config
from dinogen.families.registry import family_class, resolve

FOLDER = Path(__file__).parents[1] / "configs"
FILES = sorted(FOLDER.rglob("*.yaml"))
# a study is a plan of runs, not one of them
RUNS = [path for path in FILES if "stages:" in path.read_text(encoding="utf-8")]


def name_of(path):
    return str(path.relative_to(FOLDER))


def networks_of(path):
    """Networks of a config's last stage, without memory."""
    config = resolve(load_config(path))
    with torch.device("meta"):
        family = family_class(config.family)(config, config.stages[-1], torch.device("meta"))
    return family.networks


@pytest.mark.parametrize("path", RUNS, ids=name_of)
def test_it_has_the_parameters_that_it_says(path):
    (line,) = re.findall(r"^# parameters: (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    said = {
        name: int(number.replace(",", "")) for name, number in re.findall(r"(\w+) ([\d,]*\d)", line)
    }
    found = {
        name: sum(p.numel() for p in net.parameters()) for name, net in networks_of(path).items()
    }
    assert said == found


def test_no_two_runs_share_a_folder():
    runs = [load_config(path).run for path in RUNS]
    assert len(set(runs)) == len(runs)
