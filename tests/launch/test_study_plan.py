"""The file of a study: which runs it comes to, what is left of each, and what that will take."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from dinogen.config import ConfigError
from launch.cli.main import app
from launch.study.cost import cost_of, duration
from launch.study.plan import open_study
from launch.study.runs import steps_left
from tests.families.tiny import pack_discs
from tests.launch.studies import Player, write, write_study
from tests.launch.study_words import rows

ROOT = Path(__file__).parents[2]


def change(path: Path, **keys) -> Path:
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | keys))
    return path


def study(*words):
    return CliRunner().invoke(app, ["study", *map(str, words)], terminal_width=240)


@pytest.fixture(autouse=True)
def wide(monkeypatch):
    monkeypatch.setenv("COLUMNS", "240")


def ids(study):
    return [run.id for track in study.tracks.values() for run in track]


def test_each_config_is_a_run_with_each_seed(tmp_path):
    path = write_study(tmp_path, overrides=["stages.0.batch=4"])
    opened = open_study(path)
    assert ids(opened) == [
        "gan/a-seed0",
        "gan/a-seed1",
        "gan/b-seed0",
        "gan/b-seed1",
        "vae/c-seed0",
        "vae/dd-seed0",
    ]
    run = opened.tracks["gan"][3]
    assert run.config.seed == 1 and run.config.family.name == "wgan_gp"
    assert run.config.stages[0].batch == 4
    assert run.folder == tmp_path / "study" / "gan" / "b-seed1"
    assert run.outside == tmp_path / "outside" / "b"


def test_changes_of_study_track_and_config_in_this_order(tmp_path):
    tracks = {
        "gan": {
            "configs": [{"config": "a.yaml", "overrides": ["stages.0.lr=3"]}, "b.yaml"],
            "overrides": ["stages.0.lr=2", "stages.0.batch=2"],
        }
    }
    path = write_study(tmp_path, tracks=tracks, overrides=["stages.0.lr=1", "stages.0.kimg=1"])
    stages = [run.config.stages[0] for run in open_study(path).tracks["gan"]]
    assert [(one.lr, one.batch, one.kimg) for one in stages] == [(3, 2, 1), (2, 2, 1)]


def test_the_final_shares_its_epochs_out_over_the_stages(tmp_path):
    path = write_study(tmp_path, final={"epochs": 200, "seeds": [3, 4]})
    change(
        tmp_path / "a.yaml",
        stages=[{"resolution": 8, "kimg": 50}, {"resolution": 16, "kimg": 150, "fade_kimg": 9}],
    )
    change(tmp_path / "c.yaml", stages=[{"resolution": 16, "epochs": 30}])
    opened = open_study(path)
    runs = opened.final_runs({"gan": "a", "vae": "c"})
    assert [run.id for run in runs] == [
        "final/gan-a-seed3",
        "final/gan-a-seed4",
        "final/vae-c-seed3",
        "final/vae-c-seed4",
    ]
    lengths = [[(s.kimg, s.epochs) for s in run.config.stages] for run in runs]
    assert lengths == [[(None, 50), (None, 150)]] * 2 + [[(None, 200)]] * 2
    assert runs[0].config.stages[1].fade_kimg == 9
    assert opened.final_runs({"gan": "b"})[0].config.stages[0].epochs == 200


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ({"metirc": "fid"}, "unknown key 'metirc': did you mean 'metric'?"),
        ({"final": {"epcohs": 2}}, "unknown key 'final.epcohs': did you mean 'epochs'?"),
        ({"tracks": {"gan": {"config": ["a.yaml"]}}}, "did you mean 'configs'?"),
        ({"tracks": {"gan": {"configs": ["e.yaml"]}}}, "e.yaml: no such config file"),
        ({"tracks": {"gan": {"configs": ["a.yaml", "a.yaml"]}}}, "'a' occurs twice"),
        ({"tracks": {"report": {"configs": ["a.yaml"]}}}, "a folder of this name"),
        ({"tracks": {"g/n": {"configs": ["a.yaml"]}}}, "cannot be a folder name"),
        ({"final": {"tracks": ["ddpm"]}}, "there is no track 'ddpm'"),
        ({"final": {"seeds": []}}, "final.seeds"),
        ({"final": {"overrides": ["stages.1.epochs=2"]}}, "stages has items 0 to 0"),
        ({"overrides": ["run=elsewhere"]}, "the study sets the folder and the seed of each run"),
        ({"overrides": ["stages.0.kimgs=2"]}, "did you mean 'kimg'"),
        ({"overrides": ["metrics.names=[kid]"]}, "metrics.names: lacks fid"),
    ],
)
def test_mistakes_are_named_before_anything_begins(tmp_path, keys, told):
    path = write_study(tmp_path, **keys)
    with pytest.raises(ConfigError, match=re.escape(told)):
        open_study(path)


def test_lengths_of_both_kinds_cannot_be_shared_out(tmp_path):
    path = write_study(tmp_path, final={"epochs": 9})
    change(
        tmp_path / "a.yaml",
        stages=[{"resolution": 8, "kimg": 50}, {"resolution": 16, "epochs": 150}],
    )
    with pytest.raises(ConfigError, match=r"final\.epochs: a\.yaml: some of its stages"):
        open_study(path)


@pytest.mark.parametrize("command", ["run", "plan"])
@pytest.mark.parametrize(
    ("metric", "told"), [("fdi", "did you mean fid"), ("memorisation", "no better or worse")]
)
def test_a_metric_that_cannot_decide_is_refused(tmp_path, command, metric, told):
    result = study(command, write_study(tmp_path, metric=metric))
    assert isinstance(result.exception, ConfigError) and told in str(result.exception)


def test_what_is_left_is_read_from_the_runs_files(tmp_path):
    path = write_study(tmp_path)
    player = Player(path)
    opened = open_study(path)
    run = opened.tracks["vae"][0]
    copy = opened.copy_of(run)
    copy.parent.mkdir(parents=True)
    copy.write_text((tmp_path / "c.yaml").read_text())
    assert steps_left(run, "fid") == ["train", "evaluate", "look"]
    player.play(run.id, "train")
    assert steps_left(run, "fid") == ["evaluate", "look"]
    player.metric_values[run.id] = "no weights"
    player.play(run.id, "evaluate")
    assert steps_left(run, "fid") == ["evaluate", "look"]
    player.metric_values[run.id] = 3.0
    player.play(run.id, "evaluate")
    assert steps_left(run, "kid") == ["evaluate", "look"]
    player.play(run.id, "look")
    assert steps_left(run, "fid") == []
    result = run.folder / "16x16" / "result.json"
    write(result, json.loads(result.read_text()) | {"nimg": 2008})  # trained on since
    assert steps_left(run, "fid") == ["evaluate", "look"]


def test_costs_come_from_the_nearest_measured_speed(tmp_path):
    path = write_study(tmp_path)
    opened = open_study(path)
    runs = [run for track in opened.tracks.values() for run in track]
    a0, a1, b0 = runs[:3]
    cost = cost_of(a1, runs)
    assert (cost.num_images, cost.seconds) == (2000, None)
    assert cost.why == "no dcgan was trained at 16x16 yet"

    def result(folder, speed, **more):
        facts = {"family": "dcgan", "images_per_s": speed, "device": "cpu", "world_size": 2}
        write(folder / "16x16" / "result.json", facts | {"nimg": 2000} | more)

    # b is of another family until its file says otherwise
    result(b0.outside, 10)
    assert cost_of(b0, runs).seconds is None
    change(tmp_path / "b.yaml", family={"name": "dcgan"})
    runs = [run for track in open_study(path).tracks.values() for run in track]
    a0, a1, b0 = runs[:3]
    cost = cost_of(a1, runs)
    assert (cost.seconds, cost.processor_s, cost.speeds[0].same) == (200, 400, False)
    result(a1.outside, 20)
    assert cost_of(a1, runs).seconds == 100
    result(a0.folder, 40)
    cost = cost_of(a1, runs)
    assert (cost.seconds, cost.speeds[0].where) == (50, a0.folder / "16x16")
    assert cost_of(a0, runs).num_images == 0
    log = a1.folder / "16x16" / "stats.jsonl"
    log.parent.mkdir(parents=True)
    log.write_text('{"nimg": 400, "images_per_s": 4}\n{"nimg": 1600, "images_per_s": 8}\n')
    cost = cost_of(a1, runs)
    assert (cost.num_images, cost.seconds, cost.processor_s) == (400, 400 / 6, None)


def test_epochs_cost_what_the_data_hold(tmp_path):
    pack_discs(tmp_path / "discs")
    path = write_study(tmp_path, tmp_path / "discs")
    change(tmp_path / "a.yaml", stages=[{"resolution": 16, "epochs": 5}])
    run = open_study(path).tracks["gan"][0]
    splits = json.loads((tmp_path / "discs" / "manifest.json").read_text())["splits"]
    assert cost_of(run, [run]).num_images == 5 * splits["train"]["num_samples"]
    change(tmp_path / "a.yaml", data={"path": "gone"})
    run = open_study(path).tracks["gan"][0]
    assert cost_of(run, [run]).num_images is None


def test_the_plan_in_words(tmp_path):
    path = write_study(tmp_path, final={"tracks": ["gan"]})
    result = study("plan", path)
    assert result.exit_code == 0, result.output
    assert "left to train: 0 s; unknown for 6 runs" in result.output
    assert "the final waits for 4 runs of gan" in result.output
    change(tmp_path / "c.yaml", data={"path": "gone"})
    state, *_, why = rows(study("plan", path))["vae/c-seed0"]
    assert state == "no data" and f"dinogen prepare PHOTOS gone -c {tmp_path}/c.yaml" in why
    assert [duration(s) for s in (3, 300, 7200, 3e5)] == ["3 s", "5 min", "2 h", "3.47 days"]


def test_the_study_of_the_repository_is_whole(monkeypatch):
    monkeypatch.chdir(ROOT)
    opened = open_study(Path("configs/study.yaml"))
    runs = [run for track in opened.tracks.values() for run in track]
    named = {str(run.source.relative_to("configs")) for run in runs}
    ablations = {f"ablations/{path.name}" for path in Path("configs/ablations").glob("*.yaml")}
    at_64 = {path.name for path in Path("configs").glob("*_64.yaml") if "cats" not in path.name}
    hypothesis = open_study(Path("configs/hypothesis.yaml"))
    guided = {run.source.name for track in hypothesis.tracks.values() for run in track}
    today = open_study(Path("configs/today.yaml"))
    compared = {run.source.name for run in today.runs}
    # what other configs are trained on, and what needs captions
    apart = {"guided_text_64.yaml", "vae_latent_64.yaml"}
    assert named | guided | compared == ablations | at_64 - apart
    assert len(guided) >= 8 and len(compared) >= 10 and "flow_dit_repa_64.yaml" in compared
    assert opened.plan.final_tracks == ("gan", "vae", "diffusion", "guided")
    best = {track: opened.plan.tracks[track].configs[0].label for track in opened.tracks}
    final = opened.final_runs(best)
    assert len(final) == 4 * len(opened.plan.final.seeds) >= 8
    for run in final:
        assert sum(stage.epochs for stage in run.config.stages) == pytest.approx(200)
        assert run.config.stages[-1].resolution == 64
    page = (ROOT / "docs" / "study.md").read_text()
    text = re.findall(r"```yaml\n(.*?)```", page, re.S)[0]
    assert set(yaml.safe_load(text)) == set(type(opened.plan).model_fields)


@pytest.mark.parametrize("name", ["today", "today_fast"])
def test_todays_generators_are_compared_on_equal_terms(monkeypatch, name):
    monkeypatch.chdir(ROOT)
    opened = open_study(Path(f"configs/{name}.yaml"))
    tracks = {key: {run.name for run in runs} for key, runs in opened.tracks.items()}
    assert tracks["images"] == tracks["minutes"] and len(tracks["images"]) == 9
    assert len({run.config.data.path for run in opened.runs}) == 1
    assert {run.config.augment.flip for run in opened.runs} == {0}
    assert {run.config.seed for run in opened.runs} == {0, 1}
    assert len({run.config.eval.generated for run in opened.runs}) == 1
    images = [run for run in opened.runs if run.track == "images"]
    total = {round(sum(stage.kimg for stage in run.config.stages), 6) for run in images}
    assert total == {opened.plan.tracks["images"].kimg}
    points = {round(run.config.eval.every_kimg, 6) for run in images}
    assert points == {next(iter(total)) / opened.plan.tracks["images"].measurements}
    assert all(run.unmeasured for run in opened.runs if run.track == "minutes")


def test_plan_names_the_run_that_cannot_work(tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    path = write_study(tmp_path / "place")
    config = yaml.safe_load((path.parent / "a.yaml").read_text())
    config["stages"] = [{"resolution": 32, "kimg": 2}]  # the data are 16x16
    (path.parent / "a.yaml").write_text(yaml.safe_dump(config))
    result = CliRunner().invoke(app, ["study", "plan", str(path)])
    lines = rows(result)
    assert "cannot work here: stages: stage 32 is larger" in lines["gan/a-seed0"][-1]
    assert "cannot work" not in lines["gan/b-seed0"][-1]
