"""A lost manifest comes back with guide and prepare, from the file of statistics."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from typer.testing import CliRunner

from launch.cli.shards import app
from shards import open_dataset
from shards.check.repair import rebuild_indexes, repair
from shards.check.verify import verify
from shards.errors import ManifestError

GUIDE, PREPARE = {"name": "noise", "random": True}, {"detect": "none"}


def test_a_lost_manifest_comes_back_with_its_guide(copy: Path):
    before = open_dataset(copy).manifest
    statistics = (copy / "stats.safetensors").read_bytes()
    (copy / "manifest.json").unlink()
    said = CliRunner().invoke(app, ["index", str(copy)]).output
    assert "guide and prepare taken from stats.safetensors" in said
    data = open_dataset(copy)
    assert (data.manifest.guide, data.manifest.prepare) == (GUIDE, PREPARE)
    assert (data.manifest.shards, data.manifest.levels) == (before.shards, before.levels)
    assert (copy / "stats.safetensors").read_bytes() == statistics
    assert verify(data) == []


def test_it_comes_back_though_a_shard_is_lost_as_well(copy: Path):
    (copy / "manifest.json").unlink()
    (copy / "train-00002.tar").unlink()
    repair(copy)
    assert open_dataset(copy).manifest.guide == GUIDE
    # And again, from the file that was measured again.
    (copy / "manifest.json").unlink()
    rebuild_indexes(copy)
    assert open_dataset(copy).manifest.prepare == PREPARE


@pytest.mark.parametrize("change", ["missing", "rubbish", "untold", "wrong", "levels", "features"])
def test_a_guide_is_not_guessed(copy: Path, change: str):
    path = copy / "stats.safetensors"
    arrays = load_file(path)
    with safe_open(path, "numpy") as file:
        metadata = file.metadata()
    assert json.loads(metadata["dinogen"]) == {"guide": GUIDE, "prepare": PREPARE}
    if change == "missing":
        path.unlink()
    elif change == "rubbish":
        path.write_bytes(b"rubbish")
    elif change == "untold":
        save_file(arrays, path)
    elif change == "wrong":
        save_file(arrays, path, {"dinogen": '{"guide": 3, "prepare": {}}'})
    elif change == "levels":
        save_file({k: v for k, v in arrays.items() if not k.startswith("p8")}, path, metadata)
    else:
        spread = np.sqrt(arrays["p8.var"].mean())
        save_file({**arrays, "p8.mean": arrays["p8.mean"] + 1.1 * spread}, path, metadata)
    (copy / "manifest.json").unlink()
    assert any("guide is empty" in line for line in rebuild_indexes(copy))
    assert open_dataset(copy).manifest.guide == {}


@pytest.mark.parametrize("name", ["../stats", "/etc/passwd", "..", "", "a\\b", "train-00000.tar"])
def test_a_manifest_names_plain_files_only(copy: Path, name: str):
    path = copy / "manifest.json"
    manifest = json.loads(path.read_bytes())
    manifest["statistics"]["file"] = name
    path.write_text(json.dumps(manifest))
    with pytest.raises(ManifestError, match=r"manifest\.json: .*statistics\.file"):
        open_dataset(copy)
