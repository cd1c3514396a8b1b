"""Lengths in images and in minutes: what they come to, and that a study that goes on keeps them.

Speeds are those of a played training that logs as a real one does; one study is of real runs.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml

from dinogen.config import Config, ConfigError, load_config
from dinogen.errors import UserError
from launch.study import run as study_run
from launch.study.budget import fingerprint
from launch.study.plan import open_study
from tests.launch.studies import Player, kill_all, start_study, tiny_study, write_study
from tests.launch.study_words import compared, rows, study

CONFIGS = Path(__file__).parents[2] / "configs"
pytestmark = pytest.mark.usefixtures("calm")


def change(path, **keys):
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | keys))


def tracks(**section):
    """One track of two configs."""
    return {"gan": {"configs": ["a.yaml", "b.yaml"], "seeds": [0, 1]} | section}


def lengths(path, final=None):
    opened = open_study(path)
    runs = opened.final_runs(final) if final else opened.runs
    return {run.id: [stage.kimg for stage in run.config.stages] for run in runs}


@pytest.fixture
def played(tmp_path, monkeypatch):
    """Makes a study whose commands are played."""

    def make(**more):
        path = write_study(tmp_path, **more)
        player = Player(path)
        monkeypatch.setattr(study_run, "start", player.start)
        monkeypatch.setattr("launch.study.status.write_comparison", compared)
        return path, player

    return make


def test_images_are_shared_out_over_the_stages(tmp_path):
    path = write_study(tmp_path, tracks=tracks(kimg=20, measurements=4), final={"seeds": [7]})
    stages = [
        {"resolution": 8, "kimg": 50},
        {"resolution": 16, "kimg": 150, "fade_kimg": 30, "warmup_kimg": 100, "decay_kimg": 50},
    ]
    change(tmp_path / "a.yaml", stages=stages)
    change(tmp_path / "b.yaml", stages=[{"resolution": 16, "epochs": 30}])
    assert lengths(path)["gan/a-seed1"] == [5, 15]
    assert lengths(path)["gan/b-seed0"] == [20]
    config = open_study(path).runs[0].config
    scaled = [getattr(config.stages[1], f"{key}_kimg") for key in ("fade", "warmup", "decay")]
    assert scaled == pytest.approx([3, 10, 5])
    assert config.eval.every_kimg == 5
    # the final trains as its track does, unless it says otherwise
    assert lengths(path, {"gan": "a"}) == {"final/gan-a-seed7": [5, 15]}
    change(path, final={"seeds": [7], "kimg": 40})
    assert lengths(path, {"gan": "a"}) == {"final/gan-a-seed7": [10, 30]}


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ({"tracks": tracks(kimg=1, minutes=1)}, "kimg and minutes both say how long a run is"),
        ({"final": {"epochs": 1, "minutes": 1}}, "minutes and epochs both say"),
        ({"tracks": tracks(minutes=0)}, "tracks.gan.minutes"),
        ({"tracks": tracks(kimg=-1)}, "tracks.gan.kimg"),
        ({"tracks": tracks(minute=1)}, "did you mean 'minutes'?"),
        ({"tracks": tracks(measurements=4)}, "measurements divides a length in images"),
        ({"tracks": {"logs": {"configs": ["a.yaml"]}}}, "a folder of this name"),
    ],
)
def test_mistakes_are_named_before_anything_begins(tmp_path, keys, told):
    with pytest.raises(ConfigError, match=re.escape(told)):
        open_study(write_study(tmp_path, **keys))


@pytest.mark.parametrize(
    ("section", "parameter", "told"),
    [
        ({"minutes": 5}, "stages.0.lr", "tracks.gan.minutes: the speed of a trial depends on"),
        ({"kimg": 5}, "stages.0.kimg", "search.parameters.stages.0.kimg is a length too"),
    ],
)
def test_a_search_has_one_length_and_it_is_in_images(tmp_path, section, parameter, told):
    search = {"over": "a", "method": "grid", "parameters": {parameter: [0.5, 1.5]}}
    path = write_study(tmp_path, tracks=tracks(**section, seeds=[0]), search=search)
    with pytest.raises(ConfigError, match=re.escape(told)):
        open_study(path)


def test_stages_of_both_kinds_cannot_be_shared_out(tmp_path):
    path = write_study(tmp_path, tracks=tracks(minutes=2))
    stages = [{"resolution": 8, "kimg": 50}, {"resolution": 16, "epochs": 150}]
    change(tmp_path / "a.yaml", stages=stages)
    with pytest.raises(ConfigError, match=r"tracks\.gan\.minutes: a\.yaml: some of its stages"):
        open_study(path)


def test_minutes_become_images_once(played, tmp_path):
    path, player = played(tracks=tracks(minutes=2), final={"seeds": [5]})
    stages = [{"resolution": 8, "kimg": 1}, {"resolution": 16, "kimg": 3, "fade_kimg": 1}]
    change(tmp_path / "a.yaml", stages=stages)
    player.speeds = {".speed/gan/a": 40, ".speed/gan/b": 25}
    plan = study("plan", path)
    assert "gan: 2 min" in plan.output and "a not measured yet; b not measured yet" in plan.output
    assert rows(plan)["gan/a-seed0"][1:3] == ["unknown", "2 min"]
    assert study("run", path).exit_code == 0
    # measured before anything is trained, each config once
    assert player.done[:3] == [".speed/gan/a train", ".speed/gan/b train", "gan/a-seed0 train"]
    assert sum(".speed" in one for one in player.done) == 2
    wanted = {"gan/a-seed0": [1.2, 3.6], "gan/a-seed1": [1.2, 3.6]}
    wanted |= {"gan/b-seed0": [3.0], "gan/b-seed1": [3.0]}
    assert lengths(path) == wanted
    assert lengths(path, {"gan": "b"}) == {"final/gan-b-seed5": [3.0]}
    for run, stages in wanted.items():
        last = json.loads((tmp_path / "study" / run / "16x16" / "result.json").read_text())
        assert last["nimg"] == round(1000 * sum(stages))
    # what was thrown away is gone, and what was found stays
    assert not (tmp_path / "study" / ".speed" / "gan" / "a").exists()
    player.done.clear()
    player.speeds = {".speed/gan/a": 4000, ".speed/gan/b": 1}
    assert study("run", path).exit_code == 0 and player.done == []
    told = study("plan", path).output
    assert "a 4.8 k images in 2 minutes, at 40/s, 40/s on 2x cpu" in told
    notes = (tmp_path / "study" / "report" / "notes").read_text()
    assert "gan: 2 minutes each: a 4.8 k images in 2 minutes" in notes


def test_a_track_may_have_any_name_that_it_could_have_before(played):
    path, player = played(tracks={"speed": {"configs": ["a.yaml"], "minutes": 2}})
    assert study("run", path).exit_code == 0
    assert player.done[:2] == [".speed/speed/a train", "speed/a-seed0 train"]


def test_stages_of_different_speeds_take_the_minutes_together(played, tmp_path):
    path, player = played(tracks=tracks(minutes=1))
    change(
        tmp_path / "a.yaml",
        stages=[{"resolution": 8, "kimg": 1}, {"resolution": 16, "kimg": 1, "batch": 32}],
    )
    log = player._log_steps

    def slower(run, config, stage, start):
        player.speeds[run] = 800 / stage.resolution
        log(run, config, stage, start)

    player._log_steps = slower
    assert study("measure", path).exit_code == 0
    assert player.done == [".speed/gan/a train", ".speed/gan/b train"]
    first, second = lengths(path)["gan/a-seed0"]
    assert first == pytest.approx(second)
    assert 1000 * (first / 100 + second / 50) == pytest.approx(60, abs=0.02)
    assert "nothing" not in study("measure", path).output and len(player.done) == 2


def test_a_config_too_fast_to_be_timed_is_measured_over_more_steps(played, tmp_path):
    path, player = played(tracks=tracks(minutes=2))
    player.speeds = {".speed/gan/a": 1280.0, ".speed/gan/b": 25.0}
    seen = []
    log = player._log_steps

    def noted(run, config, stage, start):
        seen.append((run, stage.kimg))
        log(run, config, stage, start)

    player._log_steps = noted
    assert study("measure", path).exit_code == 0
    # lines of 16 steps of 8 images: two take 0.2 s, and 40 of them 4 s
    wanted = [(".speed/gan/a", 0.384), (".speed/gan/a", 41 * 0.128), (".speed/gan/b", 0.384)]
    assert [one for one, _ in seen] == [one for one, _ in wanted]
    assert [kimg for _, kimg in seen] == pytest.approx([kimg for _, kimg in wanted])
    assert lengths(path)["gan/a-seed0"] == [153.6]


def test_a_speed_that_cannot_be_measured_stops_no_other_config(played, tmp_path):
    path, player = played(tracks=tracks(minutes=2))
    player.codes[".speed/gan/a", "train"] = 3
    result = study("run", path)
    assert result.exit_code == 1
    why = "its speed is not measured: train failed (exit code 3): what train says"
    assert why in result.output
    assert [one for one in player.done if one.endswith("train")] == [
        ".speed/gan/a train",
        ".speed/gan/b train",
        "gan/b-seed0 train",
        "gan/b-seed1 train",
    ]
    player.codes.clear()
    player.done.clear()
    assert study("run", path).exit_code == 0
    assert player.done[0] == ".speed/gan/a train" and "gan/b-seed0 train" not in player.done


def test_asked_to_stop_while_it_measures(played):
    path, player = played(tracks=tracks(minutes=2))
    player.codes[".speed/gan/a", "train"] = 75
    assert study("run", path).exit_code == 75
    assert player.done == [".speed/gan/a train"]


def test_slurm_needs_a_speed_of_the_nodes_that_train(played, monkeypatch):
    path, player = played(tracks=tracks(minutes=2))
    result = study("run", path, "--on", "slurm")
    assert result.exit_code == 1
    assert f"dinogen study measure {path}" in result.output
    assert player.done == []


def test_a_lost_or_another_budget_is_refused_once_runs_have_begun(played, tmp_path):
    path, _ = played(tracks=tracks(minutes=2))
    assert study("run", path).exit_code == 0
    file = tmp_path / "study" / "budget.json"
    kept = file.read_text()
    for break_it in (
        file.unlink,
        lambda: change(path, tracks=tracks(minutes=3)),
    ):
        before = {one: one.read_text() for one in (path, tmp_path / "a.yaml")}
        break_it()
        result = study("run", path)
        assert isinstance(result.exception, ConfigError)
        assert "budget.json: holds no speed of gan/a for" in str(result.exception)
        file.write_text(kept)
        for one, text in before.items():
            one.write_text(text)
    for damage in ("{", '{"format": 9}', kept.replace('"kimg"', '"images"')):
        file.write_text(damage)
        result = study("plan", path)
        assert isinstance(result.exception, UserError)
        assert "budget.json: cannot be read" in str(result.exception)
    file.write_text(kept)
    assert study("run", path).exit_code == 0


def test_once_a_run_has_begun_its_length_stays_and_its_config_is_compared(played, tmp_path):
    """Also where the config may change, or a later version would hash it otherwise."""
    path, player = played(tracks=tracks(minutes=2))
    assert study("run", path).exit_code == 0
    file = tmp_path / "study" / "budget.json"
    kept, config, before = file.read_text(), (tmp_path / "a.yaml").read_text(), lengths(path)
    player.done.clear()
    change(tmp_path / "a.yaml", engine={"precision": "fp32", "micro_batch": 4})
    assert study("run", path).exit_code == 0
    (tmp_path / "a.yaml").write_text(config)
    file.write_text(re.sub(r'"config": "[0-9a-f]{64}"', '"config": "of another version"', kept))
    assert study("run", path).exit_code == 0
    assert player.done == [] and lengths(path) == before
    change(tmp_path / "a.yaml", family={"name": "dcgan", "ngf": 16})
    result = study("run", path)
    assert isinstance(result.exception, ConfigError)
    assert "a.yaml: family.ngf: " in str(result.exception)
    change(tmp_path / "a.yaml", stages=[{"resolution": 16, "kimg": 2, "batch": 16}])
    assert isinstance(study("plan", path).exception, ConfigError)


@pytest.mark.parametrize(
    ("same", "changes"),
    [
        (True, ["guide.path=/elsewhere/dinov2", "guide.revision=abc"]),
        (True, ["data.num_threads=3", "engine.max_nonfinite=7", "eval.every_kimg=3"]),
        (True, ["stages.0.kimg=7", "augment.flip=0.0"]),
        (False, ["guide.layer=3"]),
        (False, ["stages.0.batch=7"]),
        (False, ["engine.precision=bf16"]),
        (False, ["family.z_dim=7"]),
    ],
)
def test_what_a_speed_depends_on(same, changes):
    base = CONFIGS / "guided_drift_64.yaml"
    assert (fingerprint(load_config(base, changes)) == fingerprint(load_config(base))) is same


def test_a_key_that_a_later_version_adds_does_not_change_it(monkeypatch):
    base = CONFIGS / "flow_latent_fast.yaml"
    before = fingerprint(load_config(base))
    assert fingerprint(load_config(base, ["family.latent.path=/elsewhere"])) == before

    class Later(Config):
        added: int = 3

    later = Later.model_validate(load_config(base).model_dump())
    assert fingerprint(later) == before


def test_before_any_run_has_begun_another_length_is_measured_again(played, tmp_path):
    path, player = played(tracks=tracks(minutes=2))
    assert study("measure", path).exit_code == 0
    change(path, tracks=tracks(minutes=4))
    assert study("measure", path).exit_code == 0
    assert lengths(path)["gan/a-seed0"] == [12.0]
    assert player.done.count(".speed/gan/a train") == 2


@pytest.mark.timeout(600)
def test_killed_while_it_measures_and_while_it_trains_it_is_the_same_study(tmp_path):
    """Real runs: the weights at the end are those of a study that nobody interrupted."""
    path = tiny_study(tmp_path)
    plan = yaml.safe_load(path.read_text())
    configs = ["vae.yaml", "dcgan.yaml"]
    plan["tracks"] = {"both": {"configs": configs, "minutes": 0.03}}
    plan["final"] = None
    path.write_text(yaml.safe_dump(plan))
    folder, said = tmp_path / "study", tmp_path / "said"

    def wait_for(place, process):
        while not place():
            assert process.is_alive(), said.read_text()[-3000:]

    process = start_study(path, said)
    wait_for(lambda: (folder / "budget.json").exists(), process)
    kill_all(process.pid)
    process.join()
    first = json.loads((folder / "budget.json").read_text())["configs"]
    assert next(iter(first)) == "both/vae"
    process = start_study(path, said)
    checkpoints = folder / "both" / "dcgan-seed0" / "16x16" / "checkpoints"
    wait_for(lambda: any(checkpoints.glob("0*")) or not process.is_alive(), process)
    if process.is_alive():
        kill_all(process.pid)
    process.join()
    process = start_study(path, said)
    process.join(400)
    assert process.exitcode == 0, said.read_text()[-3000:]
    last = json.loads((folder / "budget.json").read_text())["configs"]
    assert first["both/vae"] == last["both/vae"] and set(last) == {"both/vae", "both/dcgan"}
    for name, one in last.items():
        result = json.loads((folder / f"{name}-seed0" / "16x16" / "result.json").read_text())
        assert abs(result["nimg"] - 1000 * one["kimg"]) < 8
        assert one["images_per_s"]["16x16"] * 1.8 / 1000 == pytest.approx(one["kimg"], rel=0.01)

    whole = tmp_path / "whole"
    change(path, folder=str(whole))
    whole.mkdir()
    (whole / "budget.json").write_text((folder / "budget.json").read_text())
    process = start_study(path, said)
    process.join(400)
    assert process.exitcode == 0, said.read_text()[-3000:]
    for name in last:
        stage = f"{name}-seed0/16x16"
        ends = [sorted((one / stage / "checkpoints").glob("0*"))[-1] for one in (folder, whole)]
        weights = [sorted(one.glob("*.safetensors")) for one in ends]
        assert weights[0]
        for one, other in zip(*weights, strict=True):
            assert one.name == other.name and one.read_bytes() == other.read_bytes()
