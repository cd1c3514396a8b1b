"""Checkpoints of an older dinogen: added defaults are fine, contradictions name the key."""

import json
import shutil

import pytest
import torch
import yaml
from safetensors.torch import load_file

from dinogen.config import ConfigError, dump_config, load_config, parse_config
from dinogen.evaluation.evaluate import evaluate
from dinogen.families.registry import resolve
from dinogen.runs.run import Run
from dinogen.training.checkpointing.checkpoint import load_checkpoint
from dinogen.training.checkpointing.export import export
from dinogen.training.checkpointing.snapshot import load_snapshot
from dinogen.training.run import train

from .helpers import stage, weights

HALF = "stages.0.kimg=0.04"
NEW = ("cluster", "engine.zero", "data.cache_gb", "family.probe_samples", "optim.eps")
NEW_SECTIONS = ("cluster", "engine", "ema", "prepare")


def edit(config, change):
    """Change the config in every checkpoint of the run and beside them."""
    files = [
        (path, json.loads, json.dumps) for path in config.run.glob("*/checkpoints/*/state.json")
    ]
    assert files
    for path, read, write in files:
        state = read(path.read_text())
        change(state["config"])
        path.write_text(write(state))
    beside = yaml.safe_load((config.run / "config.yaml").read_text())
    change(beside)
    (config.run / "config.yaml").write_text(yaml.safe_dump(beside))


def place(config, key):
    """(the mapping or list that holds a dotted key, its last part)."""
    *parents, last = key.split(".")
    for part in parents:
        config = config[int(part) if part.isdigit() else part]
    return config, int(last) if last.isdigit() else last


def without(*keys):
    def change(config):
        for key in keys:
            holder, last = place(config, key)
            del holder[last]

    return change


def setting(key, value):
    def change(config):
        holder, last = place(config, key)
        holder[last] = value

    return change


@pytest.mark.parametrize("keys", [NEW, NEW_SECTIONS])
def test_keys_that_the_older_one_lacks_are_defaults(make_config, tmp_path, place_of_both, keys):
    # probe_samples is no default in the other tests, so that this run agrees with what is dropped
    config = make_config("family.probe_samples=64", run=str(place_of_both / "whole"))
    half = make_config("family.probe_samples=64", HALF, run=str(place_of_both / "half"))
    if not half.run.exists():
        train(config)
        train(half, 4)
    older = make_config("family.probe_samples=64", run="older")
    shutil.copytree(half.run, older.run)
    edit(older, without(*keys))

    images = load_snapshot(older.run).sample(2, 0)
    assert evaluate(older.run, split="train")["nimg"] == 40
    path = export(older.run, tmp_path / "G.safetensors").path
    found = load_checkpoint(stage(older, 4) / "checkpoints" / "000000040")
    averages = found.tensors("G.ema")
    assert all(torch.equal(v, averages[k]) for k, v in load_file(path).items())
    assert images.shape == (2, 3, 4, 4)

    train(older)
    for resolution in (4, 8):
        mine, theirs = weights(older, resolution), weights(config, resolution)
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[k], theirs[k]) for k in mine)


def test_a_key_that_was_not_there_counts_by_its_default(half_trained):
    make, _ = half_trained
    edit(make(), without("engine.clip_grad_norm", "ema"))
    with pytest.raises(ConfigError, match=r"engine.clip_grad_norm: .* trained with None, .*says 1"):
        train(make("engine.clip_grad_norm=1"), 4)
    with pytest.raises(ConfigError, match=r"ema.halflife_kimg: .* trained with 10.0, .*says 3"):
        train(make("ema.halflife_kimg=3"), 4)
    train(make(), 4)


@pytest.mark.parametrize(
    ("key", "value", "named"),
    [
        ("engine.warp", 9, "unknown key 'engine.warp'"),
        ("stages.0.sharpness", 1, "unknown key 'stages.0.sharpness'"),
        ("extra", {"a": 1}, "unknown key 'extra'"),
        ("family.depth", 3, "unknown key 'depth'"),
        ("optim.name", "sgd", "optim.name"),
        ("family.name", "guidance", "family.name: unknown family 'guidance'"),
        ("family.z_dim", 0, "z_dim"),
    ],
)
def test_what_today_does_not_know_is_one_clear_error(half_trained, tmp_path, key, value, named):
    make, _ = half_trained
    config = make()
    today = (config.run / "config.yaml").read_text()
    edit(config, setting(key, value))
    uses = {
        "train": lambda: train(make(), 4),
        "sample": lambda: load_snapshot(config.run),
        "export": lambda: export(config.run, tmp_path / "G.safetensors"),
        "evaluate": lambda: evaluate(config.run, split="train"),
    }
    for beside in ("older", "today's"):
        if beside == "today's":
            (config.run / "config.yaml").write_text(today)
        for name, use in uses.items():
            with pytest.raises(ConfigError) as error:
                use()
            text = str(error.value)
            assert named in text, (name, text)
            assert "validation error" not in text and "pydantic" not in text
            if beside == "today's":
                assert "state.json" in text and "written by dinogen 0" in text
    assert not (tmp_path / "G.safetensors").exists()


@pytest.mark.parametrize(
    "change",
    [
        "seed=5",
        "guide.layer=1",
        "data.num_lanes=8",
        "data.window_shards=1",
        "data.on_error=skip",
        "data.split=val",
        "family.z_dim=9",
        "family.channel_max=12",
        "family.pyramid=pooled",
        "optim.name=adamw",
        "optim.betas=[0, 0.99]",
        "optim.eps=1.0e-7",
        "optim.weight_decay=0.1",
        "engine.clip_grad_norm=1",
        "ema.halflife_kimg=3",
        "ema.rampup=0.1",
        "stages.0.batch=4",
        "stages.0.lr=0.02",
    ],
)
def test_a_contradiction_is_refused_with_its_key(half_trained, change):
    make, files = half_trained
    key = change.partition("=")[0]
    with pytest.raises(ConfigError) as error:
        train(make(change), 4)
    text = str(error.value)
    assert text.startswith(f"{key}: ") and "000000040" in text
    assert {path: path.read_bytes() for path in files} == files  # nothing was written


def test_the_fade_in_of_a_trained_stage_is_refused_that_of_a_later_one_is_not(make_config):
    train(make_config(), 4)
    change = "stages.1.fade_kimg=0.04"
    train(make_config(change))
    with pytest.raises(ConfigError, match=r"^stages.1.fade_kimg: .* 0.04, the config says 0.08"):
        train(make_config())


def test_what_changes_no_step_may_change(half_trained, tmp_path, data_folder):
    make, _ = half_trained
    moved = tmp_path / "moved"
    shutil.copytree(data_folder, moved)
    (result,) = train(
        make(
            "stages.0.kimg=0.048",
            "prepare.faces.size=64",
            "log.every_kimg=0.008",
            "log.num_samples=2",
            "checkpoint.every_kimg=0.008",
            "checkpoint.keep_last=5",
            "checkpoint.keep_every_kimg=1",
            "engine.name=single",
            "engine.zero=2",
            "engine.precision=fp32",
            "engine.micro_batch=3",
            "engine.max_nonfinite=7",
            "cluster={}",
            f"data.path={moved}",
            "data.num_threads=1",
            f"data.cache_dir={tmp_path / 'cache'}",
            "data.cache_gb=2",
            "guide.revision=main",
        ),
        4,
    )
    assert result["nimg"] == 48


def test_a_run_whose_data_moved_is_read_where_its_config_says(half_trained, tmp_path, data_folder):
    make, _ = half_trained
    run, moved = make().run, tmp_path / "elsewhere"
    shutil.copytree(data_folder, moved)
    edit(make(), setting("data.path", "/gone"))
    config = load_config(run / "config.yaml", [f"data.path={moved}"])
    (run / "config.yaml").write_text(dump_config(config))
    assert evaluate(run, split="train")["num_samples"] == 40


@pytest.fixture(scope="module")
def place_of_both(tmp_path_factory):
    """Where a whole and a half-trained run lie, once they are trained."""
    return tmp_path_factory.mktemp("both")


@pytest.fixture(scope="module")
def trained_once(tmp_path_factory):
    return tmp_path_factory.mktemp("half") / "run"


@pytest.fixture
def half_trained(make_config, trained_once):
    """(config of a run whose first stage was trained for 40 images, its files and their bytes)."""
    if not trained_once.exists():
        train(make_config(HALF, run=str(trained_once)), 4)
    config = make_config()
    shutil.copytree(trained_once, config.run)
    files = [path for path in config.run.rglob("*") if path.is_file() and path.name != ".lock"]
    return make_config, {path: path.read_bytes() for path in files}


def test_a_run_that_spells_no_objective_was_trained_with_mse_and_goes_on_with_it(make_config):
    """The default of family guided was ``mse`` before it was ``drift``."""
    config = make_config("stages.0.kimg=0.04")
    train(config, 4)
    edit(config, without("family.objectives"))
    beside = load_config(config.run / "config.yaml", ["stages.0.kimg=0.08"])
    assert beside.family.options["objectives"] == [{"name": "mse"}]
    assert Run(config.run).config.family.options["objectives"] == [{"name": "mse"}]
    checkpoint = load_checkpoint(stage(config, 4) / "checkpoints" / "000000040")
    assert checkpoint.config.family.options["objectives"][0]["name"] == "mse"
    (result,) = train(beside, 4)
    assert result["nimg"] == 80 and result["floor"] is not None
    today = resolve(parse_config({"family": {"name": "guided"}}))
    assert today.family.options["objectives"][0]["name"] == "drift"
    with pytest.raises(ConfigError, match=r"family\.objectives: .*'mse'.*'drift'"):
        train(make_config("family.objectives=[{name: drift}]"), 4)


def test_the_time_of_steps_stays_unknown_where_an_earlier_version_did_not_count_it(make_config):
    """It measured while it trained: that time is not told apart any more."""
    train(make_config(HALF))
    for path in make_config().run.glob("*/checkpoints/*/state.json"):
        state = json.loads(path.read_text())
        del state["progress"]["measuring_s"]
        path.write_text(json.dumps(state))
    config = make_config()
    train(config)
    first, second = Run.of(config).planned
    assert first.result["training_s"] is None and first.result["seconds"] > 0
    assert first.stats[-1]["training_s"] is None
    assert second.result["training_s"] > 0
