"""What docs/weights.md says of exported files, run as it stands there."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from dinogen.families.registry import family_names
from dinogen.formats.export import FORMATS
from dinogen.formats.traced import write_onnx
from dinogen.training.checkpointing.snapshot import load_snapshot
from dinogen.training.run import train
from launch.cli.main import app
from tests.families.conftest import disc_data  # noqa: F401 - a fixture
from tests.families.tiny import RESOLUTION, tiny_config
from tests.formats.test_traced import make_generator

TEXT = (Path(__file__).parents[2] / "docs" / "weights.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(bash|python)\n(.*?)^```", TEXT, re.M | re.S)


def python(word):
    """The one block of Python that has the word."""
    (found,) = [code for kind, code in BLOCKS if kind == "python" and word in code]
    return found


@pytest.fixture(scope="module")
def place(disc_data, tmp_path_factory):  # noqa: F811
    """Where every command of the page was run, one after the other."""
    folder = tmp_path_factory.mktemp("weights")
    train(tiny_config("dcgan", disc_data, folder / "runs/first", "stages.0.kimg=0.008"))
    before = Path.cwd()
    os.chdir(folder)
    try:
        for kind, block in BLOCKS:
            for line in block.splitlines() if kind == "bash" else ():
                program, *args = shlex.split(line)
                assert program == "dinogen"
                result = CliRunner().invoke(app, args)
                assert result.exit_code == 0, result.output
    finally:
        os.chdir(before)
    return folder


@pytest.mark.parametrize("name", ["first.onnx", "first.pt2"])
def test_a_snippet_draws_images_with_nothing_of_ours(place, name):
    code = python(name) + "\nimport sys\nprint(tuple(images.shape), images.dtype)\n"
    code += "print(abs(images).max() <= 1, {'dinogen', 'shards'} & set(sys.modules))\n"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=place,
        env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    shape, rest = done.stdout.splitlines()
    assert shape.startswith(f"(4, 3, {RESOLUTION}, {RESOLUTION}) ") and shape.endswith("float32")
    assert rest in ("True set()", "tensor(True) set()")


def test_the_weights_alone_give_the_images_of_sample(place, monkeypatch):
    monkeypatch.chdir(place)
    found = {}
    exec(compile(python("first.safetensors"), "docs/weights.md", "exec"), found)
    assert torch.equal(found["images"], load_snapshot(place / "runs/first").sample(4, seed=0))


def test_the_walk_of_ddpm_gives_the_images_of_sample(tmp_path, monkeypatch):
    small = ["stages.0.resolution=8", "family.attention_resolutions=[4]"]
    generator = make_generator("ddpm", small, tmp_path)
    write_onnx(generator, tmp_path / "diffusion.onnx")
    monkeypatch.chdir(tmp_path)
    found = {}
    exec(compile(python("diffusion.onnx"), "docs/weights.md", "exec"), found)
    noise = np.random.default_rng(0).standard_normal(found["images"].shape, np.float32)
    networks = {"G": generator.network}
    expected = generator.family.decode(networks, torch.from_numpy(noise), torch.arange(4), 0)
    assert np.abs(found["images"] - expected.numpy()).max() < 1e-5
    assert expected.std() > 0.1


def test_the_walk_of_flow_gives_the_images_of_sample(tmp_path, monkeypatch):
    small = ["stages.0.resolution=8", "family.attention_resolutions=[4]"]
    generator = make_generator("flow", small, tmp_path)
    write_onnx(generator, tmp_path / "flow.onnx")
    monkeypatch.chdir(tmp_path)
    found = {}
    exec(compile(python("flow.onnx"), "docs/weights.md", "exec"), found)
    noise = np.random.default_rng(0).standard_normal(found["images"].shape, np.float32)
    networks = {"G": generator.network}
    expected = generator.family.decode(networks, torch.from_numpy(noise), torch.arange(4), 0)
    assert np.abs(found["images"] - expected.numpy()).max() < 1e-5
    assert expected.std() > 0.1


def test_the_tables_name_every_family_and_format():
    rows = re.findall(r"^\| (`[^|]*) \|", TEXT, re.M)
    named = [word for row in rows for word in re.findall(r"`(.*?)`", row)]
    assert {*named} >= {*FORMATS}
    assert {*named} >= {*family_names()}
