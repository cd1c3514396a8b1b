"""Kills in the middle, and two runs on one folder at once: the old or the new, never neither."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import subprocess
import sys
import time

import pytest

from dinogen.config import FacesConfig
from dinogen.prepare import earlier as repack_module
from dinogen.prepare import written
from dinogen.prepare.faces.folder import write_faces
from dinogen.prepare.photos.read import PrepareError
from shards import open_dataset
from tests.prepare.face_folders import files
from tests.prepare.pipelines import dinogen, random_photo

CONFIG = FacesConfig(detect="none", size=32)
WORDS = ("prepare.faces.detect=none", "prepare.faces.size=32", "prepare.pyramids.make=never")


class Killed(BaseException):
    """What no handler of errors catches."""


@pytest.fixture
def src(tmp_path):
    for seed, name in enumerate(["a.jpg", "b.jpg", "c.jpg"]):
        path = tmp_path / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        random_photo(seed).save(path)
    return tmp_path / "photos"


@pytest.mark.parametrize(
    ("num_writes", "earlier"), [(0, False), (1, False), (0, True), (1, True), (2, True)]
)
def test_a_replaced_photo_keeps_its_crop_until_the_new_one_is_there(
    src, tmp_path, monkeypatch, num_writes, earlier
):
    out = tmp_path / "faces"
    write_faces(src, out, CONFIG)
    if earlier:  # a folder of a version that did not write what tells a file from another
        meta = json.loads((out / "a.json").read_bytes())
        del meta["file"]
        (out / "a.json").write_text(json.dumps(meta))
    old = (out / "a.jpg").read_bytes()
    random_photo(9).save(src / "a.jpg")
    write_faces(src, tmp_path / "fresh", CONFIG)
    new = (tmp_path / "fresh" / "a.jpg").read_bytes()
    left = [num_writes]

    def counting(write):
        def wrapped(path, *args):
            if path.parent == out and path.stem == "a":
                if not left[0]:
                    raise Killed
                left[0] -= 1
            write(path, *args)

        return wrapped

    with monkeypatch.context() as patched:
        for name in ("write_bytes", "write_json", "write_text"):
            patched.setattr(written, name, counting(getattr(written, name)))
        with pytest.raises(Killed):
            write_faces(src, out, CONFIG)
    assert (out / "a.jpg").read_bytes() in (old, new)
    assert write_faces(src, out, CONFIG).num_crops == 3
    assert (out / "a.jpg").read_bytes() == new
    found = [json.loads((folder / "a.json").read_bytes()) for folder in (out, tmp_path / "fresh")]
    assert found[0] == found[1]
    assert write_faces(src, out, CONFIG).num_replaced == 0


def test_a_replaced_photo_without_a_face_loses_its_crop(src, tmp_path):
    out = tmp_path / "faces"
    config = CONFIG.model_copy(update={"min_blur": 1.0})
    write_faces(src, out, config)
    random_photo(9).resize((1, 1)).resize((64, 64)).save(src / "a.jpg")
    summary = write_faces(src, out, config)
    assert (summary.num_used, summary.num_rejected, summary.num_crops) == (2, 1, 2)
    assert not list(out.glob("a.*"))


def test_settings_are_written_only_when_nothing_refuses(src, tmp_path):
    out = tmp_path / "faces"
    write_faces(src, out, CONFIG)
    for path in out.glob("*.jpg"):
        path.unlink()  # so that other settings would do
    before = (out / "settings.json").read_bytes()
    for path in src.glob("*.jpg"):
        path.rename(path.with_name(f"other-{path.name}"))
    with pytest.raises(PrepareError, match="--withdraw"):
        write_faces(src, out, CONFIG.model_copy(update={"size": 64}))
    assert (out / "settings.json").read_bytes() == before


def test_a_second_run_on_one_folder_is_refused_and_a_killed_one_leaves_no_lock(src, tmp_path):
    out = tmp_path / "faces"
    out.mkdir()
    holder = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import fcntl, sys, time; f = open(sys.argv[1], 'w'); fcntl.flock(f, fcntl.LOCK_EX); "
            "print('held', flush=True); time.sleep(600)",
            out / ".faces.lock",
        ],
        stdout=subprocess.PIPE,
    )
    assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
    try:
        with pytest.raises(PrepareError, match=f"{out}: another `dinogen faces`"):
            write_faces(src, out, CONFIG)
        assert not (out / "settings.json").exists()
    finally:
        holder.kill()
        holder.wait()
    assert write_faces(src, out, CONFIG).num_crops == 3


def test_pyramids_and_repack_are_alone_too(src, tmp_path):
    faces, data = tmp_path / "faces", tmp_path / "data"
    write_faces(src, faces, CONFIG)
    assert dinogen("prepare", src, data, *WORDS).exit_code == 0
    for path, command in (
        (tmp_path / "parts" / ".pyramids.lock", ("pyramids", faces, tmp_path / "parts")),
        (tmp_path / ".data.repack.lock", ("prepare", src, data, *WORDS, "--repack")),
    ):
        path.parent.mkdir(exist_ok=True)
        words = command if command[0] == "prepare" else (*command, "guide.name=pixels")
        with path.open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            refused = dinogen(*words)
        assert refused.exit_code != 0 and "another " in str(refused.exception), refused.output
        assert dinogen(*words).exit_code == 0


def test_a_stale_repack_that_does_not_fit_is_removed_and_said(src, tmp_path):
    data = tmp_path / "data"
    assert dinogen("prepare", src, data, *WORDS).exit_code == 0
    stale = tmp_path / ".data.repack"
    shutil.copytree(data, stale)  # finished, but not in its place, and of photos that changed
    random_photo(7).save(src / "d.jpg")
    finished = dinogen("prepare", src, tmp_path / "data", *WORDS)
    assert finished.exit_code != 0 and "--repack" in str(finished.exception)
    assert "left by an interrupted --repack" in finished.output
    again = dinogen("prepare", src, data, *WORDS, "--repack")
    assert again.exit_code == 0
    assert "continuing an earlier --repack" in again.output
    assert "does not fit any more" in again.output
    assert open_dataset(data).manifest.splits["train"].num_samples == 4
    assert sorted(p.name for p in tmp_path.iterdir()) == ["data", "photos"]


def test_where_out_cannot_be_renamed_nothing_is_lost(src, tmp_path, monkeypatch):
    data = tmp_path / "data"
    assert dinogen("prepare", src, data, *WORDS).exit_code == 0
    before = files(data)
    random_photo(7).save(src / "d.jpg")
    with monkeypatch.context() as patched:
        patched.setattr(repack_module, "_is_mounted", lambda folder: folder == data.resolve())
        refused = dinogen("prepare", src, data, *WORDS, "--repack")
    assert "is a mount point" in str(refused.exception)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["data", "photos"]
    rename = type(data).rename

    def busy(self, target):
        if self.name == "data":
            raise OSError(16, "Device or resource busy")
        return rename(self, target)

    with monkeypatch.context() as patched:
        patched.setattr(type(data), "rename", busy)
        refused = dinogen("prepare", src, data, *WORDS, "--repack")
    assert "cannot be renamed (Device or resource busy)" in str(refused.exception)
    assert files(data) == before
    assert open_dataset(tmp_path / ".data.repack").manifest.splits["train"].num_samples == 4
    assert dinogen("prepare", src, data, *WORDS, "--repack").exit_code == 0
    assert open_dataset(data).manifest.splits["train"].num_samples == 4


def test_touched_photos_of_an_earlier_version_are_not_made_again(src, tmp_path):
    out = tmp_path / "faces"
    write_faces(src, out, CONFIG)
    for path in out.glob("?.json"):
        meta = json.loads(path.read_bytes())
        del meta["file"]
        path.write_text(json.dumps(meta))
    random_photo(9).save(src / "a.jpg")
    later = time.time() + 100
    for path in src.iterdir():
        os.utime(path, (later, later))
    summary = write_faces(src, out, CONFIG)
    assert (summary.num_replaced, summary.num_skipped, summary.num_new) == (1, 2, 1)
    assert all("file" in json.loads(path.read_bytes()) for path in out.glob("?.json"))
