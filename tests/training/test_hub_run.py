"""Runs whose data, guide and first weights are on the hub: those of local files, and pinned."""

from __future__ import annotations

import json
import logging

import pytest
import torch

from dinogen.config import ConfigError, GuideConfig, dump_config, load_config
from dinogen.evaluation.evaluate import evaluate
from dinogen.features import GuideError
from dinogen.features.load import layer_channels, load_guide
from dinogen.hub import HubError
from dinogen.training.checkpointing.checkpoint import newest_checkpoint
from dinogen.training.run import train
from dinogen.visualize.look import write_visualizations
from launch.compare import sort_words
from shards import FetchError, open_dataset
from shards.errors import ManifestError
from tests.hub_server import hub_server, use_hub
from tests.training.helpers import curve, weights


def files_of(folder, below=""):
    found = (path for path in folder.rglob("*") if path.is_file())
    return {f"{below}{path.relative_to(folder)}": path.read_bytes() for path in found}


@pytest.fixture
def hub(tmp_path, monkeypatch, guide_folder, data_folder):
    """A hub with the tiny guide and the discs."""
    with hub_server() as server:
        use_hub(monkeypatch, server, tmp_path / "home")
        server.add("someone/tiny", files_of(guide_folder, "small/"))
        server.add("datasets/someone/discs", files_of(data_folder, "64/"))
        yield server


def on_hub(tmp_path):
    return [
        "guide.path=hf://someone/tiny/small",
        "data.path=hf://datasets/someone/discs/64",
        f"data.cache_dir={tmp_path / 'shards'}",
    ]


def assert_same(one, other, stages=(4, 8)):
    for resolution in stages:
        left, right = weights(one, resolution), weights(other, resolution)
        assert left.keys() == right.keys()
        assert [name for name in left if not torch.equal(left[name], right[name])] == []
        assert curve(one, resolution) == curve(other, resolution)


def test_a_run_from_the_hub_is_that_of_local_files_and_goes_on_after_branches_move(
    make_config, hub, tmp_path, caplog, data_folder
):
    caplog.set_level(logging.INFO)
    local = make_config(run="local")
    train(local)
    config = make_config(*on_hub(tmp_path), run="remote")
    guide, data = (one.branches["main"] for one in hub.repositories.values())
    train(config, 4)
    # Both branches move: to a guide that is none, and to other data.
    hub.add("someone/tiny", {"small/config.json": b"{}"})
    hub.add("datasets/someone/discs", {"64/manifest.json": b"{}"})
    train(config)
    assert_same(config, local)
    assert f"guide.path: hf://someone/tiny/small stays at commit {guide}" in caplog.text
    written = load_config(config.run / "config.yaml")
    assert written.guide.path == f"hf://someone/tiny@{guide}/small"
    assert written.data.path == f"hf://datasets/someone/discs@{data}/64"
    state = newest_checkpoint(config.run / "8x8" / "checkpoints").state
    assert state["config"]["data"]["path"] == written.data.path
    assert state["facts"]["guide"]["revision"] == guide


def test_a_run_begins_with_weights_from_the_hub(make_config, hub, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    first = make_config(run="first")
    train(first, 4)
    hub.add("someone/run", files_of(first.run))
    short = ["stages.0.kimg=0.016", "checkpoint.every_kimg=0.008"]
    here = make_config("init_from=" + str(first.run), *short, run="here")
    there = make_config("init_from=hf://someone/run", *short, run="there")
    train(here, 4)
    train(there, 4)
    assert_same(here, there, (4,))
    # The commit is part of the run, so the same command goes on.
    commit = hub.repositories["models/someone/run"].branches["main"]
    assert load_config(there.run / "config.yaml").init_from == f"hf://someone/run@{commit}"
    hub.add("someone/run", {})
    longer = make_config("init_from=hf://someone/run", "stages.0.kimg=0.024", run="there")
    train(longer, 4)
    with pytest.raises(ConfigError, match="init_from: the checkpoint"):
        train(make_config("init_from=hf://someone/run@main", *short, run="there"), 4)
    with pytest.raises(HubError, match="holds no generator of dinogen"):
        train(make_config("init_from=hf://someone/tiny", *short, run="none"), 4)


def test_ranks_fetch_each_file_once(make_config, hub, tmp_path):
    config = make_config(*on_hub(tmp_path), "stages.0.kimg=0.016", run="ranks")
    config.run.mkdir(parents=True)
    path = config.run.with_suffix(".yaml")
    path.write_text(dump_config(config))
    # Not forked: huggingface_hub reads the environment when it is imported.
    done = hub.python(
        *("-m", "launch.local.torchrun", "--standalone", "--nproc-per-node", 2),
        *("-m", "launch.cli", "train", path, "--stage", 4),
        home=tmp_path / "home",
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    fetched = [one for one in hub.requests if one.startswith("GET") and "/resolve/" in one]
    shards = [one for one in fetched if one.endswith((".tar", ".npz", ".safetensors"))]
    assert len(shards) == len(set(shards)) >= 6


def test_guides_by_address(hub, guide_folder):
    commit = hub.repositories["models/someone/tiny"].branches["main"]
    local = load_guide(GuideConfig(path=str(guide_folder)))
    found = load_guide("dinov2", path="hf://someone/tiny/small")
    assert found.info.revision == commit
    assert found.info.path == "hf://someone/tiny/small"
    assert found.info.weights_sha256 == local.info.weights_sha256
    assert layer_channels(GuideConfig(path="hf://someone/tiny/small")) == (32,)
    again = load_guide("dinov2", path="hf://someone/tiny/small", revision=commit[:40])
    assert again.info.revision == commit
    for path, said in {
        "hf://someone/tiny": r"guide\.path: hf://someone/tiny lacks config\.json or \*\.safetens",
        "hf://someone/tiny/large": r"lacks config\.json",
        "hf://someone/none": r"guide\.path: hf://someone/none: no such repository",
        "hf://tiny": r"guide\.path: hf://tiny: not an address of the hub",
    }.items():
        with pytest.raises(GuideError, match=said):
            load_guide("dinov2", path=path)
    with pytest.raises(GuideError, match=r"no file or folder"):
        load_guide("inception", path="hf://someone/tiny/pt_inception.pth")


def test_data_by_address(hub, tmp_path, data_folder):
    commit = hub.repositories["datasets/someone/discs"].branches["main"]
    data = open_dataset(f"hf://datasets/someone/discs@{commit}/64", tmp_path / "cache")
    local = open_dataset(str(data_folder))
    assert data.read([3, 7])["key"] == local.read([3, 7])["key"]
    with pytest.raises(ManifestError, match=r"has no manifest\.json"):
        open_dataset("hf://datasets/someone/discs", tmp_path / "cache")
    hub.repositories["datasets/someone/discs"].private = True
    hub.fault = lambda request: 403
    with pytest.raises(FetchError, match="for hf `hf auth login` or HF_TOKEN"):
        open_dataset("hf://datasets/someone/discs/64", tmp_path / "cache")


def test_results_of_a_run_on_the_hub_go_to_the_current_folder(
    make_config, hub, tmp_path, monkeypatch
):
    config = make_config(run="first")
    train(config, 4)
    commit = hub.add("someone/run", files_of(config.run))
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    index = write_visualizations("hf://someone/run")
    folder = tmp_path / "cwd" / f"someone--run-{commit[:7]}"
    assert index.resolve().is_relative_to(folder)
    assert json.loads(index.read_text())
    result = evaluate("hf://someone/run", names=["sharpness"])
    assert result["measured"]["sharpness"]["command"].startswith("dinogen evaluate someone--run-")
    assert (folder / "4x4" / "evaluation.json").is_file()
    cached = tmp_path / "home" / "hub" / "models--someone--run"
    assert not list(cached.rglob("visualizations*"))
    assert not list(cached.rglob("evaluation.json"))
    paths, _ = sort_words(["hf://someone/run"])
    assert paths[0].resolve() == folder
