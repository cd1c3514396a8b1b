"""The worked example of docs/study.md: it is the shipped plan, and its commands run."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from tests.families.tiny import TINY, pack_discs
from tests.launch.studies import start_study
from tests.launch.study_words import study

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "study.md").read_text(encoding="utf-8")
SECTION = PAGE[PAGE.index("## Searching") : PAGE.index("## A folder of configs")]
# what makes the example small enough for a test
SMALL = {
    "eval.every_kimg": 0.08,
    "eval.num_generated": 16,
    "metrics.num_samples": 16,
    "stages.0.resolution": 16,
    "stages.0.kimg": 0.32,
    "checkpoint.every_kimg": 0.16,
    "log.num_samples": 4,
    "device": "cpu",
    **{f"family.{key}": value for key, value in TINY["dcgan"].items()},
}


def test_it_is_the_plan_that_is_shipped():
    (text,) = re.findall(r"```yaml\n(.*?)```", SECTION, re.S)
    assert (ROOT / "configs" / "search_fast.yaml").read_text(encoding="utf-8").endswith(text)
    commands = re.findall(r"^dinogen (study \w+ \S+)$", SECTION, re.M)
    plan = "configs/search_fast.yaml"
    assert commands == [f"study {one} {plan}" for one in ("plan", "run", "status", "report")]


@pytest.mark.timeout(300)
def test_its_commands_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    pack_discs(tmp_path / "data" / "faces")
    (tmp_path / "configs").mkdir()
    plan = yaml.safe_load(re.findall(r"```yaml\n(.*?)```", SECTION, re.S)[0])
    (tmp_path / "configs" / "dcgan_fast.yaml").write_bytes(
        (ROOT / "configs" / "dcgan_fast.yaml").read_bytes()
    )
    plan["overrides"] += [f"{key}={value}" for key, value in SMALL.items()]
    plan["search"]["num_trials"], plan["search"]["prune"]["min_trials"] = 3, 1
    plan["final"]["seeds"] = [1]
    path = tmp_path / "configs" / "search_fast.yaml"
    path.write_text(yaml.safe_dump(plan, sort_keys=False))

    before = study("plan", "configs/search_fast.yaml")
    assert before.exit_code == 0, before.output
    assert "dcgan_fast-002-lr" in before.output and "pruned trials take less" in before.output
    process = start_study(path, tmp_path / "said")
    process.join(250)
    assert process.exitcode == 0, (tmp_path / "said").read_text()[-3000:]
    status = study("status", "configs/search_fast.yaml")
    assert status.exit_code == 0
    assert "gan/dcgan_fast: 3 trials" in status.output and "best: trial" in status.output
    assert "final/gan-dcgan_fast-00" in status.output
    report = study("report", "configs/search_fast.yaml")
    assert report.exit_code == 0
    assert (tmp_path / "runs/search_fast/report/index.html").is_file()
    assert (tmp_path / "runs/search_fast/gan/dcgan_fast-trials.json").is_file()
    summary = (tmp_path / "runs/search_fast/report/study.md").read_text()
    assert "| trial | stages.0.lr | stages.0.batch | ema.halflife_kimg | kd_onet |" in summary
