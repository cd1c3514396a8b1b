"""From photos to a resumed run under guides that are tiny checkpoints of other networks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import typer
from safetensors.torch import load_file
from typer.testing import CliRunner

import dinogen
from dinogen.config import ConfigError, GuideConfig, parse_config
from dinogen.features import native_pyramid, pooled_pyramid
from dinogen.training.run import train
from launch.cli import prepare as commands
from tests.prepare.several_guides import NUM, fill
from tests.tiny_guides import HIDDEN, KINDS, write

EXAMPLE = Path(__file__).parents[2] / "examples" / "edges.py"


def guide_of(kind, folder):
    if kind == "edges":
        return {"file": str(EXAMPLE)}
    return {"name": KINDS[kind][0], "path": str(folder / kind)}


def settings(kind, folder, *further):
    return [
        f"guide={json.dumps(guide_of(kind, folder))}",
        "prepare.faces.detect=none",
        "prepare.faces.size=32",
        "prepare.pyramids.grids=[4, 8]",
        "prepare.pyramids.base_grid=8",
        *further,
    ]


def config_of(kind, folder, run, kimg):
    base = {
        "run": str(folder / run),
        "seed": 3,
        "data": {"path": str(folder / "data"), "num_threads": 0},
        "family": {
            "name": "guided",
            "z_dim": 8,
            "channel_base": 64,
            "channel_max": 8,
            "probe_samples": 4,
            "objectives": [{"name": "energy"}],
        },
        "stages": [{"resolution": 8, "kimg": kimg, "batch": 4, "lr": 0.01}],
        "metrics": {"num_samples": 8, "num_bootstrap": 2},
        "log": {"every_kimg": 0.004},
    }
    return parse_config(base, settings(kind, folder))


def tensors(run):
    newest = max((run / "8x8" / "checkpoints").iterdir())
    found = {}
    for file in sorted(newest.glob("*.safetensors")):
        found |= {f"{file.stem}/{name}": value for name, value in load_file(file).items()}
    return found


@pytest.mark.parametrize("kind", ["dinov3", "siglip", "timm_dinov3", "edges"])
def test_prepared_trained_and_resumed(kind, tmp_path):
    if kind != "edges":
        write(kind, tmp_path / kind)
    app = typer.Typer()
    commands.register(app)
    words = ["prepare", str(fill(tmp_path / "photos")), str(tmp_path / "data")]
    done = CliRunner().invoke(app, [*words, *settings(kind, tmp_path)])
    assert done.exit_code == 0, done.output

    data = dinogen.open_dataset(tmp_path / "data")
    guide = dinogen.load_guide(GuideConfig(**guide_of(kind, tmp_path)))
    assert data.manifest.guide == guide.info.to_dict() and data.num_samples() == NUM
    batch = data.read(range(2), levels=["p4"], image_size=32)
    pooled = pooled_pyramid(guide, batch["image"], (4,), base_grid=8)[4]
    assert pooled.shape == (2, 16, 3 if kind == "edges" else HIDDEN)
    assert (batch["pyramid"][4] - pooled).norm() < 0.01 * pooled.norm()  # stored in float16
    native = native_pyramid(guide, batch["image"], (8,))[8]
    stored = data.read(range(2), levels=["n8"])["pyramid"][8]
    assert (stored - native).norm() < 0.01 * native.norm()

    train(config_of(kind, tmp_path, "whole", 0.012))
    train(config_of(kind, tmp_path, "parts", 0.004))
    begun = tensors(tmp_path / "parts")
    train(config_of(kind, tmp_path, "parts", 0.012))
    whole, parts = tensors(tmp_path / "whole"), tensors(tmp_path / "parts")
    assert whole.keys() == parts.keys()
    assert [name for name in whole if not torch.equal(whole[name], parts[name])] == []
    moved = [name for name in whole if name.startswith("G/") and not name.endswith("steps")]
    assert moved and any(not torch.equal(whole[name], begun[name]) for name in moved)

    if kind == "edges":
        return
    (tmp_path / kind).rename(tmp_path / "before")
    write(kind, tmp_path / kind, seed=1)
    with pytest.raises(ConfigError, match=r"guide: not the one that made"):
        train(config_of(kind, tmp_path, "other", 0.004))
