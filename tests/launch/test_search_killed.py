"""A search of three real trials: killed in their midst, it comes to the same result."""

from __future__ import annotations

import json
import time

import pytest
import torch
import yaml

from dinogen.config import load_config
from dinogen.runs.run import Run
from dinogen.training.run import train
from tests.families.tiny import TINY, pack_discs
from tests.launch.studies import kill_all, start_study

TRIALS = ["dcgan-000-lr0.001", "dcgan-001-lr1e-08", "dcgan-002-lr0.002"]


def sweep(folder, data):
    folder.mkdir()
    config = {
        "run": str(folder / "outside"),
        "data": {"path": str(data), "num_threads": 0},
        "family": {"name": "dcgan", **TINY["dcgan"]},
        "stages": [{"resolution": 16, "kimg": 1.2, "batch": 8}],
        "log": {"every_kimg": 0.4, "probe_kimg": 1, "samples_kimg": 1, "num_samples": 4},
        "checkpoint": {"every_kimg": 0.16},
        "eval": {"every_kimg": 0.2, "generated": ["spectrum"], "num_generated": 16},
        "metrics": {"names": ["spectrum"], "num_samples": 16, "cache": str(folder / "cache")},
    }
    (folder / "dcgan.yaml").write_text(yaml.safe_dump(config))
    plan = {
        "folder": str(folder / "study"),
        "metric": "spectrum",
        "tracks": {"gan": {"configs": ["dcgan.yaml"]}},
        "search": {
            "over": "dcgan",
            "method": "grid",
            "parameters": {"stages.0.lr": [1e-3, 1e-8, 2e-3]},
            "prune": {"method": "successive_halving", "at_kimg": [0.6], "min_trials": 1},
        },
    }
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump(plan))
    return path


@pytest.fixture
def started():
    """Processes of a test; none of them stays, nor one that they have started."""
    processes = []
    yield processes
    for process in processes:
        if process.is_alive():
            kill_all(process.pid)


def trials_of(folder):
    return json.loads((folder / "study" / "gan" / "dcgan-trials.json").read_text())["trials"]


def weights(run):
    """Of the newest checkpoint, and how many images it has seen."""
    from safetensors.torch import load_file

    newest = Run(run).stage(16).checkpoints.folders[-1]
    files = sorted(newest.glob("*.safetensors"))
    return newest.name, {
        f"{file.name} {k}": v for file in files for k, v in load_file(file).items()
    }


@pytest.mark.timeout(600)
def test_killed_in_the_middle_it_comes_to_the_same_result(tmp_path, started):
    data = tmp_path / "discs"
    pack_discs(data)
    whole, broken = sweep(tmp_path / "whole", data), sweep(tmp_path / "broken", data)

    def begin(path):
        process = start_study(path, path.with_name("said"))
        started.append(process)
        return process

    def finish(path):
        process = begin(path)
        process.join(200)
        assert process.exitcode == 0, path.with_name("said").read_text()[-3000:]

    finish(whole)
    for trial in (TRIALS[0], TRIALS[2]):
        process = begin(broken)
        deadline = time.monotonic() + 100
        checkpoints = broken.parent / "study" / "gan" / trial / "16x16" / "checkpoints"
        while not any(checkpoints.glob("0*")):
            assert process.is_alive() and time.monotonic() < deadline
            time.sleep(0.01)
        kill_all(process.pid)
        process.join()
        assert not (checkpoints.parent / "result.json").exists()
    finish(broken)

    found, expected = (trials_of(path.parent) for path in (broken, whole))
    assert found == expected
    assert [one["state"] for one in found] == ["done", "pruned", "done"]
    record = json.loads((broken.parent / "study" / "study.json").read_text())["runs"]
    steps = [one["step"] for one in record[f"gan/{TRIALS[0]}"]]
    assert steps == ["train", "train", "evaluate", "look"]  # the first was killed
    assert [one["code"] for one in record[f"gan/{TRIALS[1]}"]] in ([75], [0])
    log = broken.parent / "study" / "logs" / "gan" / f"{TRIALS[2]}.log"
    assert log.read_text().count("resumed from") == 1

    # a trial is the run that its config gives when it is trained by hand
    config = load_config(whole.parent / "study" / "configs" / "gan" / f"{TRIALS[0]}.yaml")
    by_hand = config.model_copy(update={"run": tmp_path / "by_hand"})
    train(by_hand)
    name, expected = weights(tmp_path / "by_hand")
    for path in (whole, broken):
        same, found = weights(path.parent / "study" / "gan" / TRIALS[0])
        assert (same, found.keys()) == (name, expected.keys())
        assert all(torch.equal(found[key], expected[key]) for key in expected)

    # a pruned trial has a checkpoint where it stopped, and goes on from there if it is asked to
    pruned = load_config(broken.parent / "study" / "configs" / "gan" / f"{TRIALS[1]}.yaml")
    assert 600 <= int(weights(pruned.run)[0]) <= 1200
    assert train(pruned)[0]["nimg"] == 1200
    finish(broken)
    assert trials_of(broken.parent)[1]["state"] == "pruned"
    summary = (broken.parent / "study" / "report" / "study.md").read_text()
    assert "| pruned | after 0.6 kimg its spectrum was" in summary
