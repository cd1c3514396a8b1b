"""`dinogen export --format`: what it writes, what it says, what it refuses."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from typer.testing import CliRunner

from dinogen.config import ConfigError
from dinogen.families.dcgan import Dcgan
from dinogen.formats import export as exports
from dinogen.training.checkpointing.export import load_generator
from dinogen.training.run import train
from launch.cli.main import app
from tests.families.conftest import disc_data  # noqa: F401 - a fixture
from tests.families.tiny import tiny_config

ROOT = Path(__file__).parents[2]


def trained(family, data, folder, *overrides):
    config = tiny_config(family, data, folder / "run", "stages.0.kimg=0.008", *overrides)
    train(config)
    return config.run


@pytest.fixture(scope="module")
def run(disc_data, tmp_path_factory):  # noqa: F811
    return trained("dcgan", disc_data, tmp_path_factory.mktemp("dcgan"))


@pytest.fixture(scope="module")
def guided(disc_data, tmp_path_factory):  # noqa: F811
    return trained("guided", disc_data, tmp_path_factory.mktemp("guided"))


def command(*args, cwd=ROOT):
    """The command as a user runs it: exit code, lines of stdout, and stderr."""
    path = [str(ROOT), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "launch.cli", *map(str, args)],
        cwd=cwd,
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout.splitlines(), done.stderr


@pytest.mark.parametrize(("kind", "name"), [("onnx", "G.onnx"), ("torch-export", "G.pt2")])
def test_a_user_sees_one_line_and_that_the_guide_was_random(guided, tmp_path, kind, name):
    code, lines, stderr = command("export", guided, tmp_path / name, "--format", kind)
    assert code == 0, stderr
    (line,) = lines
    assert re.search(
        r"G\.\w+: ProgressiveGenerator of stage 16x16 at 8 images, [\d,]+ parameters, guide: "
        r"RANDOM guide \(dinov2\), within \d\.\de[-+]\d\d of the network$",
        line,
    )
    assert len(stderr.splitlines()) == 1 and "RANDOM GUIDE" in stderr
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_the_card_is_that_of_safetensors(run, tmp_path):
    own = {"licence": "CC0", "intended_use": "a test"}
    first = exports.export(run, tmp_path / "G.safetensors", **own)
    assert first.difference is None
    with safe_open(first.path, "pt") as file:
        held = json.loads(file.metadata()["dinogen"])
    assert held["card"].items() >= own.items()
    extra = {"dinogen.json": ""}
    for source in (run, first.path):  # an exported file brings its card along
        own = own if source == run else {}
        done = exports.export(source, tmp_path / "G.pt2", "torch-export", **own)
        torch.export.load(done.path, extra_files=extra)
        found = json.loads(extra["dinogen.json"])
        assert found.pop("graph")["output"] == "images"
        assert found == held
        assert done.difference < 1e-6
    again = exports.export(first.path, tmp_path / "again.safetensors", licence="CC-BY")
    assert again.info["card"] == held["card"] | {"licence": "CC-BY"}
    images = [load_generator(path).sample(2, seed=3) for path in (run, first.path, again.path)]
    assert torch.equal(images[0], images[1]) and torch.equal(images[0], images[2])


def test_a_name_that_does_not_fit_is_one_clear_error(run, tmp_path):
    for args, message in [
        (("G.onnx",), r"G.onnx does not end in .safetensors: .* or give --format onnx$"),
        (("G.pt2",), r"or give --format torch-export$"),
        (("G", "--format", "onnx"), r"does not end in .onnx: name it .*/G.onnx$"),
        (("G.pt", "--format", "torch-export"), r"does not end in .pt2: name it .*/G.pt.pt2$"),
        (("G.safetensors", "--format", "onnx"), r"or give --format safetensors$"),
        ((".", "--format", "onnx"), r"is a folder: name a file, such as .*/G.onnx$"),
        (("G.onnx", "--format", "ONNX2"), r"--format ONNX2: choose from safetensors, torch-exp"),
    ]:
        out = str(tmp_path / args[0])
        result = CliRunner().invoke(app, ["export", str(run), out, *args[1:]])
        assert isinstance(result.exception, ConfigError), (args, result.output)
        assert re.search(message, str(result.exception)), result.exception
    assert list(tmp_path.iterdir()) == []


def test_a_family_that_decodes_in_its_own_way_has_no_graph(run, tmp_path, monkeypatch):
    def decode(self, networks, latents, indices, seed, psi=1.0):
        return networks["G"](latents).clamp(-0.5, 0.5)

    monkeypatch.setattr(Dcgan, "decode", decode)
    with pytest.raises(ConfigError, match=r"family dcgan .* as onnx: give --format safetensors$"):
        exports.export(run, tmp_path / "G.onnx", "onnx")
    assert list(tmp_path.iterdir()) == []
