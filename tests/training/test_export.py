"""`dinogen export`: one plain file that equals what training held, and gives the same images."""

import hashlib
import json
import re
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from dinogen.config import ConfigError
from dinogen.features.load import load_guide as real_load_guide
from dinogen.guidance import guides
from dinogen.networks.progressive import ProgressiveGenerator
from dinogen.training.checkpointing import snapshot
from dinogen.training.checkpointing.export import export, load_exported
from dinogen.training.checkpointing.snapshot import load_snapshot
from dinogen.training.run import train
from launch.cli.main import app

from .helpers import stage

# Loads with nothing of ours; prints the hash of all tensors' bytes and what the metadata says.
ALONE = """
import hashlib, json, sys
from safetensors import safe_open
from safetensors.torch import load_file
digest = hashlib.sha256()
for name, value in sorted(load_file(sys.argv[1]).items()):
    digest.update(name.encode() + value.numpy().tobytes())
with safe_open(sys.argv[1], "pt") as file:
    metadata = file.metadata()
ours = [name for name in sys.modules if name.partition(".")[0] in ("dinogen", "shards", "launch")]
print(json.dumps([digest.hexdigest(), metadata, ours]))
"""


@pytest.fixture
def held(monkeypatch):
    """What training holds in memory: {images of the stage: {name: tensor}} after each step."""
    steps = {}
    update = snapshot.Ema.update

    def recorded(self, batch, nimg):
        update(self, batch, nimg)
        (network,) = self.networks.values()
        steps[network.resolution, nimg] = {k: v.clone() for k, v in network.state_dict().items()}

    monkeypatch.setattr(snapshot.Ema, "update", recorded)
    return steps


def same(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


def test_it_equals_bit_for_bit_what_training_held(make_config, held, tmp_path):
    config = make_config("checkpoint.keep_last=100", "checkpoint.every_kimg=0.024")
    train(config)

    done = export(config.run, tmp_path / "end.safetensors")
    assert same(load_file(done.path), held[8, 160])
    assert (done.info["nimg"], done.info["resolution"], done.info["alpha"]) == (240, 8, 1.0)

    kept = sorted(p.name for p in (stage(config, 8) / "checkpoints").iterdir())
    amid = export(config.run, tmp_path / "fading.safetensors", nimg=120)
    assert "000000120" in kept
    assert same(load_file(amid.path), held[8, 40])
    assert (amid.info["alpha"], amid.info["fading"]) == (0.5, True)

    first = export(config.run, tmp_path / "first.safetensors", resolution=4)
    assert same(load_file(first.path), held[4, 80])
    assert not same(load_file(done.path), load_file(amid.path))

    # without --stage all stages are looked through
    early = export(config.run, tmp_path / "early.safetensors", nimg=48)
    assert same(load_file(early.path), held[4, 48])


def test_it_loads_with_torch_and_safetensors_alone(make_config, held, tmp_path):
    config = make_config()
    train(config, 4)
    path = export(config.run, tmp_path / "G.safetensors").path
    digest = hashlib.sha256()
    for name, value in sorted(held[4, 80].items()):
        digest.update(name.encode() + value.numpy().tobytes())
    done = subprocess.run(
        [sys.executable, "-c", ALONE, path],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    found, metadata, ours = json.loads(done.stdout)
    assert found == digest.hexdigest()
    assert ours == []
    info = json.loads(metadata["dinogen"])
    assert metadata["dinogen"].startswith('{"random_guide": true, ')
    assert info["guide_label"] == "RANDOM guide (dinov2)"
    assert info["config"]["seed"] == 0 and info["config"]["family"]["z_dim"] == 8
    assert set(info["versions"]) >= {"dinogen", "torch"}

    # as the README does it
    G = ProgressiveGenerator(**info["network"]["arguments"])
    G.load_state_dict(load_file(path))
    assert info["network"]["class"] == f"{type(G).__module__}.{type(G).__name__}"


@pytest.mark.parametrize("nimg", [120, None])
def test_the_rebuilt_generator_gives_the_images_of_sample(make_config, tmp_path, nimg):
    config = make_config("checkpoint.keep_last=100")
    train(config)
    snapshot = load_snapshot(config.run, nimg=nimg)
    path = export(config.run, tmp_path / "G.safetensors", nimg=nimg).path
    network, info = load_exported(path)
    assert not network.training and not any(p.requires_grad for p in network.parameters())
    images = torch.cat(
        [
            snapshot.family.sample({"G": network}, torch.tensor([n]), seed=7)  # as sample does
            for n in range(3)
        ]
    )
    assert torch.equal(images, snapshot.sample(3, seed=7))
    assert info["nimg"] == snapshot.nimg


def test_a_guide_that_was_taught_is_not_called_random(make_config, tmp_path, monkeypatch, caplog):
    def taught(config, device):
        guide = real_load_guide(config, device)
        guide.info = replace(guide.info, random=False)
        return guide

    monkeypatch.setattr(guides, "load_guide", taught)
    config = make_config()
    train(config, 4)
    caplog.clear()
    path = export(config.run, tmp_path / "G.safetensors").path
    assert load_exported(path)[1]["random_guide"] is False
    assert "RANDOM" not in caplog.text


def test_the_command(make_config, tmp_path, caplog):
    config = make_config("checkpoint.keep_last=100")
    train(config)

    def command(*args):
        return CliRunner().invoke(app, ["export", str(config.run), *map(str, args)])

    out = tmp_path / "deep" / "G.safetensors"
    caplog.clear()
    result = command(out, "--stage", 4, "--nimg", 48)
    assert result.exit_code == 0, result.output
    assert "stage 4x4 at 48 images" in result.stdout and "RANDOM guide" in result.stdout
    assert "RANDOM GUIDE" in caplog.text + result.stderr
    before = out.read_bytes()
    assert command(out, "--stage", 4, "--nimg", 48).exit_code == 0
    assert out.read_bytes() == before

    for args, message in [
        ((out, "--nimg", 81), r"no checkpoint at 81 images; there are 4x4: 24, .*80; 8x8: .*240"),
        ((out, "--stage", 4, "--nimg", 240), r"no checkpoint at 240 images; there are 4x4: .*80$"),
        ((out, "--stage", 16), "stage 16 is not in the config"),
        ((tmp_path,), r"is a folder: name a file, such as .*/G.safetensors"),
        ((tmp_path / "G",), r"name it .*/G.safetensors"),
        ((tmp_path / "G.pt",), r"does not end in .safetensors"),
    ]:
        result = command(*args)
        assert isinstance(result.exception, ConfigError), (args, result.output)
        assert re.search(message, str(result.exception)), result.exception
    assert out.read_bytes() == before
    assert [p.name for p in out.parent.iterdir()] == ["G.safetensors"]


def test_a_broken_checkpoint_is_not_exported(make_config, tmp_path):
    config = make_config("checkpoint.keep_last=100")
    train(config, 4)
    weights = stage(config, 4) / "checkpoints" / "000000048" / "G.ema.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"?")
    with pytest.raises(ConfigError, match=r"G.ema.safetensors is cut off or changed"):
        export(config.run, tmp_path / "G.safetensors", nimg=48)
    assert not (tmp_path / "G.safetensors").exists()


def test_what_is_no_export_is_one_clear_error(make_config, tmp_path):
    (tmp_path / "text.safetensors").write_text("no tensors")
    save_file({"a": torch.ones(1)}, tmp_path / "other.safetensors")
    for name, message in [
        ("none.safetensors", "cannot be read"),
        (".", "no run here"),
        ("text.safetensors", "cannot be read as safetensors"),
        ("other.safetensors", "no generator of dinogen"),
    ]:
        with pytest.raises(ConfigError, match=message):
            load_exported(tmp_path / name)

    config = make_config()
    train(config, 4)
    path = export(config.run, tmp_path / "G.safetensors").path
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    info = json.loads(metadata["dinogen"])
    info["config"]["engine"]["warp"] = 9
    save_file(tensors, path, metadata | {"dinogen": json.dumps(info)})
    with pytest.raises(ConfigError, match=r"unknown key 'engine.warp'.*\n.*dinogen 0"):
        load_exported(path)
    for key in ("resolution", "nimg", "alpha", "fading", "config", "versions", "network"):
        for wrong in ({}, {key: []}, {key: "x"}, {key: None}):
            told = {k: v for k, v in json.loads(metadata["dinogen"]).items() if k != key} | wrong
            save_file(tensors, path, metadata | {"dinogen": json.dumps(told)})
            with pytest.raises(ConfigError, match=r"G\.safetensors: no generator of dinogen"):
                load_exported(path)
    save_file({"dense.bias": tensors["dense.bias"]}, path, metadata)
    with pytest.raises(ConfigError, match="its tensors do not fit"):
        load_exported(path)
