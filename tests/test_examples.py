"""examples/: each program run as it stands, on discs and tiny runs; each is shown in the docs."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import dinogen
from dinogen.config import GuideConfig, load_config
from dinogen.training.checkpointing.export import export
from dinogen.training.checkpointing.snapshot import load_snapshot
from dinogen.training.run import train
from tests.families.tiny import RESOLUTION, discs, tiny_config
from tests.training.conftest import data_folder, guide_folder  # noqa: F401 - fixtures

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs an example with its arguments; gives what it printed."""

    def run_it(name, *arguments):
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        torch.manual_seed(0)
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    return run_it


def test_the_loop_of_ones_own_comes_nearer_to_the_data(run, data_folder, guide_folder, tmp_path):  # noqa: F811
    printed = run("own_loop.py", data_folder, guide_folder, tmp_path / "generator.pt", 16)
    energies = [float(found) for found in re.findall(r"energy (\S+)$", printed, re.M)]
    assert len(energies) == 16
    assert np.mean(energies[-3:]) < 0.9 * np.mean(energies[:3])
    weights = torch.load(tmp_path / "generator.pt", weights_only=True)
    assert all(values.isfinite().all() for values in weights.values())


def test_what_is_drawn_is_what_the_run_samples(run, data_folder, tmp_path):  # noqa: F811
    config = tiny_config("dcgan", data_folder, tmp_path / "run", "stages.0.kimg=0.008")
    train(config)
    export(config.run, tmp_path / "G.safetensors")
    sampled = load_snapshot(config.run).sample(16, seed=0).permute(0, 2, 3, 1)
    wanted = (sampled * 127.5 + 127.5).round().byte().numpy()
    for source in ("run", "G.safetensors"):
        printed = run("draw.py", tmp_path / source, tmp_path / "drawn" / source)
        assert f"16 images of {RESOLUTION} pixels" in printed
        files = sorted((tmp_path / "drawn" / source).iterdir())
        assert np.array_equal(np.stack([np.asarray(Image.open(file)) for file in files]), wanted)


def test_a_folder_is_measured_against_shards_and_photos(
    run,
    data_folder,  # noqa: F811
    tmp_path,
    monkeypatch,
):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))  # no weights of Inception
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("drawn", "photos"):
        (tmp_path / name).mkdir()
        for number, pixels in enumerate(discs(24)):
            Image.fromarray(pixels).save(tmp_path / name / f"{number}.png")
    for reference in (data_folder, tmp_path / "photos"):
        printed = run("measure.py", tmp_path / "drawn", reference)
        assert re.search(r"^fd_onet = \S+, lower is better$", printed, re.M)
        assert re.search(r"^fid: not available: .*metrics\.inception", printed, re.M)
    # The same images on both sides.
    assert re.search(r"^coverage_onet = 1, higher", printed, re.M)
    assert re.search(r"^spectrum = 0, lower", printed, re.M)


def test_the_family_of_ones_own_trains(data_folder, tmp_path, monkeypatch):  # noqa: F811
    """tests/families/test_new_family.py has the rest: resumed, exported, its options checked."""
    monkeypatch.chdir(EXAMPLES)
    overrides = [f"run={tmp_path / 'run'}", f"data.path={data_folder}", "data.num_threads=0"]
    overrides += ["stages=[{resolution: 16, kimg: 0.016, batch: 8}]"]
    (result,) = train(load_config("tiny_gan.yaml", overrides))
    assert result["family"] == "tiny_gan"
    assert load_snapshot(tmp_path / "run").sample(2, seed=0).shape == (2, 3, 16, 16)


def test_the_guide_of_ones_own_is_loaded():
    """tests/features/test_new_guide.py has the rest: its features, and other files."""
    guide = dinogen.load_guide(GuideConfig(file=str(EXAMPLES / "edges.py")))
    assert guide(torch.zeros(1, 3, 16, 16)).shape == (1, 3, 4, 4)


def test_each_is_run_above_and_shown_in_the_docs():
    pages = "".join(page.read_text(encoding="utf-8") for page in (ROOT / "docs").glob("*.md"))
    here = Path(__file__).read_text(encoding="utf-8")
    files = [file for file in EXAMPLES.iterdir() if file.is_file()]
    assert len(files) >= 5
    for file in files:
        assert f'--8<-- "examples/{file.name}"' in pages, f"{file.name} is on no page of the docs"
        assert f'"{file.with_suffix(".yaml").name}"' in here or f'"{file.name}"' in here
