"""What is taken out of the photos' folder, or replaced in it, is so in faces and datasets too."""

from __future__ import annotations

import json
import os
import shutil
import time

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from dinogen.config import FacesConfig, GuideConfig, PackConfig
from dinogen.features import load_guide
from dinogen.prepare import join, pipeline
from dinogen.prepare.faces.folder import write_faces
from dinogen.prepare.parts import write_pyramids
from dinogen.prepare.photos.changed import looks_like_an_accident
from dinogen.prepare.photos.find import photo_key
from dinogen.prepare.photos.read import PrepareError
from dinogen.prepare.pyramid import PyramidMaker
from launch.cli import prepare as faces_command
from shards import open_dataset
from tests.prepare.face_folders import FACE, files, rejected, save
from tests.prepare.pipelines import CPU, dinogen, random_photo, settings

CONFIG = FacesConfig(detect="none", size=32)
WORDS = ("prepare.faces.detect=none", "prepare.faces.size=32", "prepare.pyramids.make=never")
NAMES = ["a.jpg", "A.jpg", "b/a.jpg", "c.png", "é.jpg"]


@pytest.fixture
def src(tmp_path):
    for seed, name in enumerate(NAMES):
        path = tmp_path / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        random_photo(seed).save(path)
    return tmp_path / "photos"


def crops(out):
    """Crops but for what tells the file, which differs from folder to folder."""
    found = {name: data for name, data in files(out).items() if name not in STATE}
    for name in [name for name in found if name.endswith(".json")]:
        meta = json.loads(found[name])
        assert meta.pop("file")["sha256"]
        found[name] = meta
    return found


STATE = ("summary.json", "settings.json")


def test_what_was_withdrawn_is_gone_and_what_was_replaced_is_made_again(src, tmp_path, caplog):
    out = tmp_path / "faces"
    write_faces(src, out, CONFIG)
    (src / "a.jpg").unlink()
    random_photo(50).save(src / "c.png")
    random_photo(51).save(src / "new.jpg")
    summary = write_faces(src, out, CONFIG)
    assert (summary.num_withdrawn, summary.num_removed, summary.num_replaced) == (1, 1, 1)
    assert (summary.num_new, summary.num_crops, summary.num_skipped) == (2, 5, 3)
    assert "1 photo was removed: its 1 crop was removed too (a.jpg)" in caplog.text
    assert "1 photo was replaced: its crops are made again (c.png)" in caplog.text
    written = json.loads((out / "summary.json").read_text())
    assert (written["num_withdrawn"], written["num_replaced"]) == (1, 1)
    write_faces(src, tmp_path / "fresh", CONFIG)
    assert crops(out) == crops(tmp_path / "fresh")
    again = write_faces(src, out, CONFIG)
    assert (again.num_new, again.num_withdrawn, again.num_replaced) == (0, 0, 0)


def test_a_photo_that_was_only_touched_or_copied_is_the_same(src, tmp_path):
    out = tmp_path / "faces"
    write_faces(src, out, CONFIG)
    times = {path: path.stat().st_mtime_ns for path in out.glob("*.jpg")}
    for path in src.rglob("*.*"):
        os.utime(path, (1, 1) if path.name == "c.png" else None)
    summary = write_faces(src, out, CONFIG)
    assert (summary.num_skipped, summary.num_replaced) == (len(NAMES), 0)
    assert times == {path: path.stat().st_mtime_ns for path in out.glob("*.jpg")}


def test_a_replacement_with_the_old_time_is_noticed_by_its_size(src, tmp_path):
    out = tmp_path / "faces"
    write_faces(src, out, CONFIG)
    old = (src / "a.jpg").stat()
    random_photo(60).resize((90, 90)).save(src / "a.jpg")
    assert (src / "a.jpg").stat().st_size != old.st_size
    os.utime(src / "a.jpg", ns=(old.st_atime_ns, old.st_mtime_ns))
    assert write_faces(src, out, CONFIG).num_replaced == 1


def test_a_photo_with_fewer_faces_than_before_leaves_none_behind(tmp_path, astronaut):
    src, out = tmp_path / "src", tmp_path / "faces"
    face = astronaut[FACE]
    save(src / "pair.jpg", np.concatenate([face, face[:, ::-1]], axis=1))
    config = FacesConfig(which="all", size=32)
    assert write_faces(src, out, config, device="cpu").num_crops == 2
    save(src / "pair.jpg", face)
    assert write_faces(src, out, config, device="cpu").num_crops == 1
    assert sorted(path.name for path in out.glob("pair*")) == ["pair.jpg", "pair.json"]


def test_an_unmounted_or_other_folder_removes_nothing(src, tmp_path):
    out = tmp_path / "faces"
    write_faces(src, out, CONFIG)
    before = files(out)
    shutil.move(src, tmp_path / "elsewhere")
    src.mkdir()
    with pytest.raises(PrepareError, match=r"no photo .* still holds crops .* delete .*faces"):
        write_faces(src, out, CONFIG)
    random_photo(70).save(src / "x.jpg")
    with pytest.raises(PrepareError, match=r"5 of the 5 photos .* Nothing was removed.*--withdraw"):
        write_faces(src, out, CONFIG)
    assert files(out) == before
    done = dinogen_faces("faces", src, out, *WORDS[:2], "--withdraw")
    assert (
        done.exit_code == 0
        and "5 photos were removed: their 5 crops were removed too" in done.output
    )
    assert sorted(path.name for path in out.glob("*.jpg")) == ["x.jpg"]


def dinogen_faces(*words):
    app = typer.Typer()
    faces_command.register(app)
    return CliRunner().invoke(app, [str(word) for word in words])


def test_what_cannot_be_listed_now_is_not_gone(src, tmp_path, monkeypatch):
    out = tmp_path / "faces"
    write_faces(src, out, CONFIG)
    before = files(out)
    scandir = os.scandir

    def refuse(path="."):
        if os.fspath(path).endswith("photos/b"):
            raise PermissionError(13, "Permission denied", os.fspath(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    summary = write_faces(src, out, CONFIG)
    assert summary.num_withdrawn == 0 and summary.rejected == {"unreadable": 1}
    crops_of_b = {name for name in before if name.startswith(photo_key("b/a.jpg"))}
    assert len(crops_of_b) == 2 and crops_of_b <= files(out).keys()


def test_what_counts_as_an_accident():
    assert not looks_like_an_accident(0, 0)
    assert not looks_like_an_accident(2, 3)
    assert looks_like_an_accident(3, 3)
    assert looks_like_an_accident(11, 20) and not looks_like_an_accident(11, 22)


def test_faces_of_an_older_version_are_kept_and_then_followed(src, tmp_path):
    out = tmp_path / "faces"
    write_faces(src, out, CONFIG)
    whole = crops(out)
    for path in out.glob("*.json"):
        if path.name not in STATE:
            meta = json.loads(path.read_text())
            del meta["file"]
            path.write_text(json.dumps(meta, indent=2) + "\n")
    summary = write_faces(src, out, CONFIG)
    assert (summary.num_skipped, summary.num_replaced) == (len(NAMES), 0)
    assert crops(out) == whole
    random_photo(80).save(src / "a.jpg")
    assert write_faces(src, out, CONFIG).num_replaced == 1


def test_one_damaged_json_is_made_again(src, tmp_path, caplog):
    out = tmp_path / "faces"
    write_faces(src, out, CONFIG)
    whole = crops(out)
    (out / "a.json").write_bytes(b'{"key": "a')
    assert write_faces(src, out, CONFIG).num_new == 1
    assert "a.json: damaged" in caplog.text and crops(out) == whole


def test_where_upper_and_lower_case_are_the_same_no_crop_replaces_another(
    src, tmp_path, monkeypatch
):
    out = tmp_path / "faces"
    out.mkdir()
    write_faces(src, out, CONFIG)
    (out / "SETTINGS.JSON").write_text("as such a file system shows it")
    (tmp_path / "folding").mkdir()
    shutil.copy(out / "settings.json", tmp_path / "folding")
    shutil.copy(out / "settings.json", tmp_path / "folding" / "SETTINGS.JSON")
    summary = write_faces(src, tmp_path / "folding", CONFIG)
    names = [path.name.lower() for path in (tmp_path / "folding").glob("*.jpg")]
    assert summary.num_crops == len(set(names)) == len(NAMES)


def tars(data):
    return {path.name: path.read_bytes() for path in data.iterdir() if path.suffix == ".tar"}


@pytest.mark.parametrize("way", ["prepare", "pack"])
def test_a_finished_dataset_says_what_has_changed_and_is_made_again_when_asked(src, tmp_path, way):
    faces, data = tmp_path / "faces", tmp_path / "data"

    def run(out, *words):
        if way == "prepare":
            return dinogen("prepare", src, out, *WORDS, *words)
        write_faces(src, faces, CONFIG)
        return dinogen("pack", faces, out, *words)

    first = run(data)
    assert first.exit_code == 0, first.output
    (data / "notes of mine.md").write_text("kept")
    for path in src.rglob("*.*"):
        path.touch()
    assert run(data).stdout.startswith("already finished")
    before = tars(data)
    (src / "a.jpg").unlink()
    random_photo(50).save(src / "c.png")
    random_photo(51).save(src / "new.jpg")
    told = run(data)
    gone = "1 removed (a.jpg), 1 replaced (c.png), 1 added (new.jpg)"
    if way == "pack":
        gone = f"1 removed (a), 1 replaced ({photo_key('c.png')}), 1 new (new)"
    assert f"have changed: {gone}): add --repack" in str(told.exception)
    assert tars(data) == before
    again = run(data, "--repack")
    assert again.exit_code == 0, again.output
    assert run(tmp_path / "fresh").exit_code == 0
    assert tars(data) == tars(tmp_path / "fresh") != before
    assert (data / "notes of mine.md").read_text() == "kept"
    assert sorted(path.name for path in tmp_path.iterdir() if "data" in path.name) == ["data"]
    assert run(data).stdout.startswith("already finished")


def test_a_dataset_that_does_not_know_its_photos_warns_of_newer_ones(src, tmp_path, caplog):
    """As versions before packed it."""
    data = tmp_path / "data"
    assert dinogen("prepare", src, data, *WORDS).exit_code == 0
    (data / "photos.csv").unlink()
    assert dinogen("prepare", src, data, *WORDS).stdout.startswith("already finished")
    time.sleep(0.01)
    random_photo(50).save(src / "a.jpg")
    done = dinogen("prepare", src, data, *WORDS)
    assert "1 photo is newer than the dataset" in done.output and done.exit_code == 0


def test_repack_keeps_the_dataset_whose_samples_are_mostly_gone(src, tmp_path, caplog):
    data = tmp_path / "data"
    assert dinogen("prepare", src, data, *WORDS).exit_code == 0
    before = tars(data)
    shutil.rmtree(src)
    src.mkdir()
    random_photo(90).save(src / "z.jpg")
    assert dinogen("prepare", src, data, *WORDS, "--repack").exit_code == 0
    assert open_dataset(data).keys() == ["z"]
    assert tars(tmp_path / "data.before-repack") == before
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "train-00000.tar").write_bytes(b"of somebody else")
    refused = dinogen("prepare", src, foreign, *WORDS, "--repack")
    assert "was not packed from photos" in str(refused.exception)
    assert (foreign / "train-00000.tar").exists()


class Killed(BaseException):
    pass


@pytest.mark.parametrize("change", ["withdrawn", "replaced"])
def test_an_unfinished_dataset_does_not_keep_what_has_changed(tmp_path, change):
    src, faces = tmp_path / "photos", tmp_path / "faces"
    for number in range(6):
        src.mkdir(exist_ok=True)
        random_photo(number).save(src / f"{number}.jpg")

    def kill(done, total):
        if done == 5:
            raise Killed

    config = settings(faces={"max_duplicate_distance": -1}, pack={"val_fraction": 0.0})
    with pytest.raises(Killed):
        pipeline.prepare(src, tmp_path / "once", config, None, progress=kill)
    write_faces(src, faces, config.faces)
    with pytest.raises(Killed):
        join.pack_faces(faces, None, tmp_path / "data", config.pack, {}, progress=kill)
    assert tars(tmp_path / "data") and tars(tmp_path / "once")
    if change == "withdrawn":
        (src / "1.jpg").unlink()
    else:
        random_photo(50).save(src / "1.jpg")
    write_faces(src, faces, config.faces)
    with pytest.raises(PrepareError, match=r"the photo of 1, .* is gone or changed: .*delete"):
        pipeline.prepare(src, tmp_path / "once", config, None)
    with pytest.raises(PrepareError, match=r"holds an unfinished dataset .*1.*: delete it"):
        join.pack_faces(faces, None, tmp_path / "data", config.pack, {})


def test_pyramids_of_a_face_that_was_replaced_are_not_packed(src, tmp_path):
    """Same key, another image: the levels on disk are those of the old one."""
    faces, parts = tmp_path / "faces", tmp_path / "parts"
    maker = PyramidMaker(load_guide(GuideConfig(name="pixels"), CPU), settings().pyramids, CPU)
    write_faces(src, faces, CONFIG)
    write_pyramids(faces, parts, maker)
    random_photo(50).save(src / "a.jpg")
    write_faces(src, faces, CONFIG)
    with pytest.raises(PrepareError, match="a has changed since its pyramid was made: run"):
        join.pack_faces(faces, join.open_pyramids(parts), tmp_path / "data", PackConfig(), {})
    write_pyramids(faces, parts, maker)
    join.pack_faces(faces, join.open_pyramids(parts), tmp_path / "data", PackConfig(), {})
    assert rejected(faces) == []
