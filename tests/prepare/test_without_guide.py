"""Data for families that read no pyramids: no guide is asked for, and none is in the shards."""

from __future__ import annotations

import json
from copy import deepcopy

import numpy as np
import pytest
import torch
import typer
import yaml
from PIL import Image
from typer.testing import CliRunner

from dinogen.config import GuideConfig, load_config, parse_config
from dinogen.errors import UserError
from dinogen.features import GuideError, load_guide
from dinogen.features.dinov2 import make_random_dinov2
from dinogen.prepare import pipeline
from dinogen.prepare.faces.folder import write_faces
from dinogen.prepare.photos.read import PrepareError
from dinogen.prepare.pyramid import PyramidMaker
from dinogen.training.data import makes_pyramids, reads_pyramids
from launch.cli import prepare as commands
from shards import open_dataset
from shards.check.repair import rebuild_indexes
from shards.check.verify import verify

FACES = {"size": 32, "detect": "none"}
# A guide that is nowhere: any code that loads it fails.
PLAIN = {
    "guide": {"path": "/nowhere"},
    "family": {"name": "dcgan", "ngf": 8, "ndf": 8},
    "prepare": {"faces": FACES, "pack": {"shard_size": 3, "val_fraction": 0.3}},
    "stages": [{"resolution": 32, "kimg": 1}],
}


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(9):
        pixels = np.random.default_rng(number).integers(0, 256, (6, 7, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((50, 40)).save(folder / f"{number}.png")
    return folder


@pytest.fixture
def plain(tmp_path):
    path = tmp_path / "plain.yaml"
    path.write_text(yaml.safe_dump(PLAIN))
    return path


def dinogen(*arguments):
    app = typer.Typer()
    commands.register(app)
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def tars(data):
    names = [*data.glob("*.tar"), data / "manifest.json"]
    return {path.name: path.read_bytes() for path in names}


def test_the_family_decides_unless_it_is_told():
    guided = {"family": {"name": "guided"}}
    plain = {"family": PLAIN["family"], "stages": PLAIN["stages"]}
    assert makes_pyramids(parse_config({}))
    assert makes_pyramids(parse_config(guided))
    assert not makes_pyramids(parse_config(plain))
    assert makes_pyramids(parse_config(plain, ["prepare.pyramids.make=always"]))
    assert not makes_pyramids(parse_config(guided, ["prepare.pyramids.make=never"]))
    assert reads_pyramids(parse_config(guided, ["prepare.pyramids.make=never"]))


def test_one_pass_and_three_steps_without_a_guide(photos, plain, tmp_path):
    once, faces, steps = (tmp_path / name for name in ("once", "faces", "steps"))
    done = dinogen("prepare", photos, once, "-c", plain)
    assert done.exit_code == 0, done.output
    assert "no pyramids: family dcgan reads none" in done.stdout
    assert "9 photos, 9 images; all used" in done.stdout
    write_faces(photos, faces, load_config(plain).prepare.faces)
    done = dinogen("pack", faces, steps, "-c", plain)
    assert done.exit_code == 0, done.output
    assert tars(once) == tars(steps)
    data = open_dataset(once)
    assert data.manifest.levels == {} and data.manifest.guide == {}
    assert data.manifest.statistics is None
    assert sorted(path.suffix for path in once.iterdir() if "train-00000" in path.name) == [
        ".npz",
        ".tar",
    ]
    assert verify(data) == []
    batch = data.read(range(data.num_samples()), image_size=16)
    assert batch["image"].shape[1:] == (3, 16, 16) and batch["pyramid"] == {}
    # again: skipped
    assert dinogen("prepare", photos, once, "-c", plain).stdout.count("already finished") == 1
    assert dinogen("pack", faces, steps, "-c", plain).stdout.count("already finished") == 1
    (steps / "manifest.json").unlink()
    rebuild_indexes(steps)
    assert open_dataset(steps).num_samples() == data.num_samples()


def test_interrupted_without_a_guide(photos, plain, tmp_path):
    class Killed(BaseException):
        pass

    def kill(done, total):
        if done > 6:
            raise Killed

    config = load_config(plain).prepare
    with pytest.raises(Killed):
        pipeline.prepare(photos, tmp_path / "data", config, None, progress=kill)
    pipeline.prepare(photos, tmp_path / "data", config, None)
    pipeline.prepare(photos, tmp_path / "at once", config, None)
    assert tars(tmp_path / "data") == tars(tmp_path / "at once")


def test_data_with_pyramids_do_as_well_and_not_the_other_way_round(photos, plain, tmp_path):
    folder = tmp_path / "tiny"
    make_random_dinov2(folder, seed=3, hidden_size=16, num_layers=1, num_heads=2, image_size=56)
    guide = load_guide(GuideConfig(path=str(folder)), torch.device("cpu"))
    config = load_config(plain).prepare
    maker = PyramidMaker(guide, config.pyramids, torch.device("cpu"))
    with_them, without = tmp_path / "with", tmp_path / "without"
    pipeline.prepare(photos, with_them, config, maker)
    done = dinogen("prepare", photos, with_them, "-c", plain)
    assert done.exit_code == 0 and "already finished" in done.stdout, done.output
    pipeline.prepare(photos, without, config, None)
    with pytest.raises(PrepareError, match=r"made differently \(prepare\.pyramids: None, now"):
        pipeline.prepare(photos, without, config, maker)
    other = parse_config(deepcopy(PLAIN), ["prepare.faces.fit=resize"]).prepare
    with pytest.raises(PrepareError, match=r"prepare\.faces\.fit: crop, now resize"):
        pipeline.prepare(photos, with_them, other, None)


def test_without_weights_the_way_without_is_named(photos, tmp_path):
    missing = ("guide.path=/nowhere", "prepare.faces.detect=none")
    done = dinogen("prepare", photos, tmp_path / "data", *missing)
    assert isinstance(done.exception, GuideError)
    assert "prepare.pyramids.make=never" in str(done.exception)
    advised = dinogen("prepare", photos, tmp_path / "data", *missing, "prepare.pyramids.make=never")
    assert advised.exit_code == 0, advised.output
    assert open_dataset(tmp_path / "data").num_samples() == 9


def test_pack_says_what_is_missing(photos, plain, tmp_path):
    faces = tmp_path / "faces"
    write_faces(photos, faces, load_config(plain).prepare.faces)
    guided = tmp_path / "guided.yaml"
    guided.write_text("family: {name: guided}\n")
    parts = tmp_path / "parts"
    parts.mkdir()
    (parts / "part-00000.safetensors").write_bytes(b"")
    for words, told in [
        ((tmp_path / "data", "-c", guided), "the family of the config reads pyramids: write"),
        ((parts,), "parts holds pyramids: add the folder of the dataset after it"),
        (("a", "b", "c"), "write dinogen pack FACES [PYRAMIDS] DATA"),
        (("prepare.pack.shard_size=3",), "write dinogen pack FACES [PYRAMIDS] DATA"),
    ]:
        done = dinogen("pack", faces, *words)
        assert isinstance(done.exception, UserError), done.output
        assert told in str(done.exception)
    done = dinogen("pack", faces, tmp_path / "data", "-c", guided, "prepare.pyramids.make=never")
    assert done.exit_code == 0, done.output


def test_what_an_older_version_made_is_known_again(photos, tmp_path):
    """It said `align: none`, and knew no other key for photos as they are."""
    config = parse_config(PLAIN).prepare
    faces, data = tmp_path / "faces", tmp_path / "data"
    write_faces(photos, faces, config.faces)
    pipeline.prepare(photos, data, config, None)
    for path, keys in ((faces / "settings.json", ["faces"]), (data / "manifest.json", ["prepare"])):
        found = json.loads(path.read_text())
        section = found[keys[0]] if path.name == "settings.json" else found["prepare"]["faces"]
        for new in ("detect", "fit", "classes"):
            del section[new]
        section["align"] = "none"
        path.write_text(json.dumps(found))
    assert write_faces(photos, faces, config.faces).num_new == 0
    assert pipeline.prepare(photos, data, config, None)[0].num_new == 0
    assert parse_config({"prepare": {"faces": {"align": "none"}}}).prepare.faces.detect == "none"
