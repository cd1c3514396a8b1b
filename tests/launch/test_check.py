"""What a job would refuse is refused before it is queued or started."""

from __future__ import annotations

import shutil

import pytest
import torch
import yaml
from typer.testing import CliRunner

from dinogen.config import load_config, parse_config
from dinogen.errors import UserError
from dinogen.families.registry import family_names
from launch import check
from launch.check import check_run_here
from launch.cli.main import app
from tests.families.tiny import TINY, pack_discs
from tests.features.autoencoders import write_ours
from tests.launch.played_slurm import submitted
from tests.training.conftest import data_folder, guide_folder  # noqa: F401

GUIDED = ("family.name=guided", "family.z_dim=8", "family.channel_base=64", "family.channel_max=8")


def launch(folder, *words):
    return CliRunner().invoke(app, ["launch", str(folder / "my.yaml"), "--on", "slurm", *words])


def refused(folder, *words):
    """What it says; nothing was submitted, and nothing written."""
    result = launch(folder, *words)
    assert isinstance(result.exception, UserError), result.output
    assert result.exception.exit_code == 2
    assert submitted(folder) == []
    assert not (folder / "run" / "launch" / "jobs.json").exists()
    return str(result.exception)


@pytest.fixture
def guided(played, data_folder, guide_folder):  # noqa: F811
    """A run that reads pyramids, which its guide has made."""
    config = yaml.safe_load((played / "my.yaml").read_text())
    config["data"]["path"] = str(data_folder)
    config["family"] = {"name": "guided", **TINY["guided"]}
    config["guide"] = {"path": str(guide_folder)}
    config["stages"] = [{"resolution": 4, "kimg": 1}, {"resolution": 8, "kimg": 1}]
    (played / "my.yaml").write_text(yaml.safe_dump(config))
    return played


def test_a_run_whose_guide_made_the_data_is_submitted(guided):
    result = launch(guided)
    assert result.exit_code == 0, result.exception
    assert len(submitted(guided)) == 2


def test_another_guide_than_made_the_data(guided):
    words = refused(guided, "guide.name=pixels")
    assert words.startswith("guide: not the one that made the pyramids")
    assert "--unchecked starts without this check" in words


def test_a_guide_that_is_not_there(guided):
    words = refused(guided, f"guide.path={guided / 'gone'}")
    assert words.startswith("guide.path: ") and "gone" in words
    assert launch(guided, f"guide.path={guided / 'gone'}", "--unchecked").exit_code == 0
    assert len(submitted(guided)) == 2


def test_an_autoencoder_that_cannot_encode_the_photos(tmp_path):
    config = {
        "family": {"name": "dcgan"},
        "prepare": {"latents": {"path": "gone.safetensors"}},
        "stages": [{"resolution": 32, "kimg": 1}],
    }
    with pytest.raises(UserError, match=r"^prepare\.latents\.path: there is no file gone"):
        check._check_makers(parse_config(config))
    file, _ = write_ours(tmp_path / "vae.safetensors")
    found = [f"prepare.latents.path={file}"]
    check._check_makers(parse_config(config, found))
    with pytest.raises(UserError, match=r"prepare\.faces\.size: 30 is not a multiple of 4"):
        check._check_makers(parse_config(config, [*found, "prepare.faces.size=30"]))


def test_levels_that_the_data_lack(guided):
    words = refused(guided, f"data.path={guided / 'data'}")
    assert "stage 4 reads the level" in words and "the shards have none" in words


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("cluster.stages=[{resolution: 4, nodes: 9}]", "stages.0.batch=8"), "number of ranks 9"),
        (("metrics.names=[fdi]",), "did you mean fid?"),
        (("eval.every_kimg=1", "eval.generated=[fid]", "eval.metric=fid"), "eval.metric: fid"),
        (("data.split=test",), "no samples in split test"),
        (("stages=[{resolution: 32, kimg: 1}]",), "larger than the images"),
    ],
)
def test_each_fault_is_one_error(played, monkeypatch, words, told):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("torch.hub.get_dir", lambda: str(played / "hub"))
    assert told in refused(played, *words)


def test_a_shard_that_is_missing_or_short(played):
    shard = sorted((played / "data").glob("*.tar"))[0]
    data = shard.read_bytes()
    shard.write_bytes(data[:-512])
    assert f"{shard} has {len(data) - 512:,} bytes" in refused(played)
    shard.unlink()
    assert f"{shard} is missing" in refused(played)
    assert launch(played, "data.on_error=skip").exit_code == 0


def test_a_dry_run_is_refused_too(played):
    shutil.rmtree(played / "data")
    pack_discs(played / "data", val_fraction=0)
    words = ("eval.every_kimg=1", "eval.generated=[spectrum]", "eval.metric=spectrum")
    assert "eval.metric: spectrum is not available" in refused(played, *words, "--dry-run")


def test_on_this_machine_nothing_starts(played, monkeypatch):
    def start(*words):
        raise AssertionError("started")

    monkeypatch.setattr("os.execve", start)
    words = ["launch", str(played / "my.yaml"), "--gpus", "9", "stages.1.batch=8"]
    result = CliRunner().invoke(app, words)
    assert "batch 8 of stage 8 is smaller than the number of ranks 9" in str(result.exception)
    result = CliRunner().invoke(app, [*words, "--unchecked"])
    assert str(result.exception) == "started"


@pytest.mark.parametrize("family", [name for name in family_names() if name != "guided"])
def test_no_family_needs_its_networks(played, family):
    options = [f"family.{key}={value}" for key, value in TINY[family].items()]
    changes = [f"family={{name: {family}}}", "stages=[{resolution: 16, kimg: 1, batch: 8}]"]
    config = load_config(played / "my.yaml", [*changes, *options])
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("launch.check.log.warning", pytest.fail)
        check_run_here(config, {16: 2})
    assert not torch.cuda.is_initialized()
