"""Folders as classes: alike through one pass and three steps; what makes no classes is named."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import typer
from PIL import Image
from typer.testing import CliRunner

from dinogen.config import GuideConfig, parse_config
from dinogen.features import load_guide
from dinogen.features.dinov2 import make_random_dinov2
from dinogen.prepare import join, pipeline
from dinogen.prepare.faces.folder import read_rejected, write_faces
from dinogen.prepare.parts import write_pyramids
from dinogen.prepare.photos.read import PrepareError, class_names, label_of
from dinogen.prepare.photos.summary import account
from dinogen.prepare.pyramid import PyramidMaker
from launch.cli import prepare as commands
from shards import ShardsError, open_dataset

CPU = torch.device("cpu")
# Names are sorted as such: the photos' own order would have the folder `a b` before `a/`.
NAMES = {"Zebra": 3, "a": 4, "a b": 2, "über": 5}
SETTINGS = {
    "faces": {"size": 32, "detect": "none", "classes": "folders"},
    "pyramids": {"batch": 4, "grids": [4], "kinds": ["pooled"]},
    "pack": {"shard_size": 4},
}


def random_photo(seed):
    pixels = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((48, 40), Image.Resampling.BICUBIC)


@pytest.fixture
def photos(tmp_path):
    src = tmp_path / "photos"
    for name, count in NAMES.items():
        for number in range(count):
            path = src / name / ("deep/er" if number % 2 else "") / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            random_photo(10 * len(name) + number).save(path)
    (src / "nothing in it").mkdir()
    (src / "a" / "notes.txt").write_text("no photo")
    return src


@pytest.fixture
def maker(tmp_path):
    folder = tmp_path / "tiny"
    make_random_dinov2(folder, seed=3, hidden_size=16, num_layers=1, num_heads=2, image_size=56)
    guide = load_guide(GuideConfig(path=str(folder)), CPU)
    return PyramidMaker(guide, settings().pyramids, CPU)


def settings(**faces):
    return parse_config({"prepare": SETTINGS | {"faces": SETTINGS["faces"] | faces}}).prepare


def dinogen(*arguments):
    app = typer.Typer()
    commands.register(app)
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def tars(data):
    names = [*data.glob("*.tar"), data / "manifest.json"]
    return {path.name: path.read_bytes() for path in names}


def test_names_and_labels():
    names = class_names(Path("src"), ["b/x.jpg", "a/c/y.jpg", "B/z.jpg", "a/x.jpg"])
    assert names == ("B", "a", "b")
    assert [label_of(source, names) for source in ("B/z.jpg", "a/c/y.jpg", "b/b/b.jpg")] == [
        0,
        1,
        2,
    ]
    assert label_of("B/z.jpg", ()) is None


def test_both_ways_give_the_same_labels(photos, maker, tmp_path):
    config = settings()
    once, faces, parts, steps = (tmp_path / name for name in ("once", "faces", "parts", "steps"))
    pipeline.prepare(photos, once, config, maker)
    write_faces(photos, faces, config.faces)
    write_pyramids(faces, parts, maker)
    source = join.open_pyramids(parts)
    join.pack_faces(faces, source, steps, config.pack, join.guide_of(source, None))
    assert tars(once) == tars(steps)
    data = open_dataset(once)
    assert data.manifest.classes == ("Zebra", "a", "a b", "über")
    assert data.manifest.has_labels
    for number in range(data.num_samples()):
        sample = data.sample(number)
        folder = sample.meta["source"].split("/")[0]
        assert data.manifest.classes[sample.label] == folder
    labels = data.read(range(data.num_samples()))["label"].tolist()
    assert [labels.count(label) for label in range(4)] == [3, 4, 2, 5]
    # finished: skipped, unless the classes have changed
    pipeline.prepare(photos, once, config, maker)
    with pytest.raises(PrepareError, match=r"classes: Zebra, a, a b, über, now none"):
        pipeline.prepare(photos, once, settings(classes="none"), maker)
    (photos / "Zebra").rename(photos / "zebra")
    with pytest.raises(PrepareError, match=r"classes: .*, now a, a b, zebra, über"):
        pipeline.prepare(photos, once, config, maker)
    with pytest.raises(PrepareError, match="classes of the photos"):
        write_faces(photos, faces, config.faces)


def test_a_new_class_in_the_middle_of_the_work_is_refused(photos, maker, tmp_path):
    class Killed(BaseException):
        pass

    def kill(done, total):
        if done > 9:
            raise Killed

    with pytest.raises(Killed):
        pipeline.prepare(photos, tmp_path / "data", settings(), maker, progress=kill)
    (photos / "b").mkdir()
    random_photo(1).save(photos / "b" / "x.png")
    with pytest.raises(ShardsError, match=r"other settings \(classes\)"):
        pipeline.prepare(photos, tmp_path / "data", settings(), maker)
    shutil.rmtree(photos / "b")
    _, manifest = pipeline.prepare(photos, tmp_path / "data", settings(), maker)
    assert manifest.classes == ("Zebra", "a", "a b", "über")


def test_a_photo_in_no_class_is_rejected_and_stops_nothing(photos, tmp_path):
    config = settings()
    (photos / "loose.jpg").write_bytes((photos / "Zebra" / "0.png").read_bytes())
    summary, manifest = pipeline.prepare(photos, tmp_path / "data", config, None)
    write_faces(photos, tmp_path / "faces", config.faces)
    assert manifest.classes == ("Zebra", "a", "a b", "über") and manifest.has_labels
    assert summary.num_files == 16
    assert (summary.num_used, summary.num_rejected, summary.num_sidecars) == (14, 1, 1)
    assert "  no_class: 1 photo outside the class folders: move it into one" in account(summary)
    for folder in ("data", "faces"):
        (line,) = read_rejected(tmp_path / folder / "rejected.csv")
        assert (line.source, line.reason) == ("loose.jpg", "no_class")
    join.pack_faces(tmp_path / "faces", None, tmp_path / "steps", config.pack, {})
    assert tars(tmp_path / "steps") == tars(tmp_path / "data")


def test_what_makes_no_classes_is_named(photos, tmp_path):
    with pytest.raises(PrepareError, match="a: only one class, deep"):
        class_names(photos / "a", ["deep/er/1.png"])
    # without the key such folders are no matter
    _, manifest = pipeline.prepare(photos, tmp_path / "data", settings(classes="none"), None)
    assert manifest.classes == () and not manifest.has_labels


def test_photos_that_lie_there_are_packed_with_their_classes(tmp_path):
    for number, name in enumerate(["dog/1.png", "cat/1.png", "dog/2.png", "loose.png"]):
        path = tmp_path / "plain" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        random_photo(number).resize((32, 32)).save(path)
    done = dinogen("pack", tmp_path / "plain", tmp_path / "data", "prepare.faces.classes=folders")
    assert done.exit_code == 0, done.output
    manifest = open_dataset(tmp_path / "data").manifest
    assert manifest.classes == ("cat", "dog")
    assert sum(split.num_samples for split in manifest.splits.values()) == 3
    (line,) = read_rejected(tmp_path / "data" / "rejected.csv")
    assert (line.source, line.reason) == ("loose.png", "no_class")
    assert json.loads((tmp_path / "data" / "manifest.json").read_text())["has_labels"]
    faces = tmp_path / "faces"
    write_faces(tmp_path / "plain", faces, settings(classes="none").faces)
    done = dinogen("pack", faces, tmp_path / "other", "prepare.faces.classes=folders")
    assert "was made without classes" in str(done.exception)
