"""What a study says of data that are missing: one preparation, if one serves all that read it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from launch.study.data import lacking
from launch.study.plan import open_study

ROOT = Path(__file__).parents[2]
DRIFT = {
    "family": {"name": "guided", "grids": {"main": [4]}, "objectives": [{"name": "drift"}]},
    "prepare": {"pyramids": {"grids": [4], "kinds": ["pooled"]}},
    "guide": {"name": "onet"},
}


def told(folder: Path, **configs) -> set[str | None]:
    """What is said of the runs of a study of these configs, on data that are not there."""
    base = {"data": {"path": "nowhere"}, "stages": [{"resolution": 32, "kimg": 1, "batch": 8}]}
    for name, changes in configs.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(base | changes))
    plan = {
        "folder": str(folder / "study"),
        "metric": "spectrum",
        "tracks": {"all": {"configs": [f"{name}.yaml" for name in configs]}},
    }
    (folder / "study.yaml").write_text(yaml.safe_dump(plan))
    study = open_study(folder / "study.yaml")
    return {lacking(study, run) for run in study.runs}


@pytest.mark.parametrize("plan", ["today_fast", "today"])
def test_the_preparation_that_a_study_names_serves_all_its_runs(plan):
    study = open_study(ROOT / "configs" / f"{plan}.yaml")
    head = (ROOT / "configs" / f"{plan}.yaml").read_text()
    (shown,) = re.findall(r"dinogen prepare PHOTOS (\S+) -c (\S+)", head)
    found = {lacking(study, run) for run in study.runs}
    wanted = f"dinogen prepare PHOTOS {shown[0]} -c {ROOT / shown[1]}"
    assert found == {f"data.path: {shown[0]} holds no packed data: {wanted}"}


def test_a_config_that_makes_less_is_not_named(tmp_path):
    plain = {"family": {"name": "dcgan", "ngf": 8}}
    (said,) = told(tmp_path, a=plain, b=DRIFT, c=plain)
    assert said is not None and said.endswith(f"-c {tmp_path / 'b.yaml'}")


def test_more_levels_win_then_the_order_of_the_plan(tmp_path):
    more = DRIFT | {"prepare": {"pyramids": {"grids": [4], "kinds": ["pooled"], "flips": True}}}
    (said,) = told(tmp_path, a=DRIFT, b=more, c=more)
    assert said is not None and said.endswith(f"-c {tmp_path / 'b.yaml'}")


def test_where_no_preparation_serves_all_the_keys_are_named(tmp_path):
    other = DRIFT | {"guide": {"name": "onet", "layer": "conv1"}}
    larger = {"family": {"name": "dcgan", "ngf": 8}, "prepare": {"faces": {"size": 16}}}
    (said,) = told(tmp_path, a=DRIFT, b=other, c=larger)
    assert said is not None and "no config of the study prepares them for all" in said
    named = f"{tmp_path / 'a.yaml'} lacks guide, prepare.pyramids.grids (p4) for"
    assert f"{named} {tmp_path / 'b.yaml'}: add these to it" in said
