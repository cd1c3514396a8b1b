"""A folder of faces: made again only what is missing is done, and it is read back."""

import io
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from dinogen.config import FacesConfig
from dinogen.prepare.faces import stream
from dinogen.prepare.faces.folder import Crop, PrepareError, iter_faces, read_faces, write_faces
from dinogen.prepare.photos.find import find_photos, photo_key
from tests.prepare.face_folders import FACE, files, rejected, save

pytestmark = pytest.mark.usefixtures("one_torch_thread")


def test_a_rerun_does_only_what_is_missing(photos, tmp_path, monkeypatch):
    out = tmp_path / "faces"
    config = FacesConfig(size=64)
    write_faces(photos, out, config, device="cpu")
    before = files(out)
    (out / "1.jpg").unlink()
    seen = []
    original = stream.read_and_cut
    monkeypatch.setattr(
        stream, "read_and_cut", lambda p, *a: seen.append(p.source) or original(p, *a)
    )
    summary = write_faces(photos, out, config, device="cpu")
    # the one that is gone, and the rejected one in case it was fixed
    assert sorted(seen) == ["1.jpg", "wall.png"]  # in two threads: either may come first
    assert (summary.num_skipped, summary.num_new, summary.num_crops) == (5, 1, 6)
    after = files(out)
    assert before.keys() == after.keys()
    assert {k: v for k, v in before.items() if k != "summary.json"} == {
        k: v for k, v in after.items() if k != "summary.json"
    }


def test_a_rerun_knows_the_duplicates_of_what_is_there(tmp_path, noise):
    src, out = tmp_path / "src", tmp_path / "faces"
    large = np.kron(noise, np.ones((8, 8, 1), np.uint8))
    save(src / "a.png", large)
    save(src / "b.jpg", large)
    save(src / "c.jpg", large[::-1])
    config = FacesConfig(detect="none", size=64, max_duplicate_distance=4)
    first = write_faces(src, out, config)
    assert rejected(out)[0][:2] == ("b.jpg", "duplicate")
    (out / "c.jpg").unlink()
    second = write_faces(src, out, config)
    assert (second.num_crops, second.rejected) == (first.num_crops, first.rejected)
    assert sorted(path.stem for path in out.glob("*.jpg")) == sorted([photo_key("a.png"), "c"])


def test_a_repaired_photo_is_taken_up(photos, tmp_path):
    out = tmp_path / "faces"
    write_faces(photos, out, FacesConfig(size=32), device="cpu")
    (photos / "wall.png").write_bytes((photos / "0.jpg").read_bytes())
    summary = write_faces(photos, out, FacesConfig(size=32), device="cpu")
    assert (summary.num_new, summary.rejected) == (1, {})
    assert rejected(out) == []


def test_a_killed_run_is_completed_by_the_same_call(tmp_path, noise):
    src, out, whole = tmp_path / "src", tmp_path / "faces", tmp_path / "whole"
    rng = np.random.default_rng(0)
    for number in range(40):
        save(src / f"{number:03}.png", rng.integers(0, 256, (64, 64, 3), np.uint8))
    code = (
        "import sys, time\n"
        "from pathlib import Path\n"
        "from dinogen.config import FacesConfig\n"
        "from dinogen.prepare.faces.folder import write_faces\n"
        "print('start', flush=True)\n"
        # it waits there for its end, so that it cannot finish before
        "told = lambda done, total: (print(done, flush=True), time.sleep(600 * (done == 17)))\n"
        "write_faces(Path(sys.argv[1]), Path(sys.argv[2]), FacesConfig(detect='none', size=64),\n"
        "            progress=told)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(src), str(out)], stdout=subprocess.PIPE, text=True
    )
    for line in process.stdout:
        if line.strip() == "17":
            break
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert 17 <= len(list(out.glob("*.jpg"))) < 40
    config = FacesConfig(detect="none", size=64)
    summary = write_faces(src, out, config)
    assert summary.num_skipped >= 17
    assert summary.num_crops == 40
    write_faces(src, whole, config)
    names = {name for name in files(whole) if name not in ("summary.json", "settings.json")}
    assert {name: files(out)[name] for name in names} == {
        name: files(whole)[name] for name in names
    }
    assert all(name.endswith((".jpg", ".json", ".csv")) or ".tmp" in name for name in files(out))


def test_partly_written_faces_of_a_photo_are_done_again(tmp_path, astronaut):
    pair = np.concatenate([astronaut[FACE], astronaut[FACE][:, ::-1]], axis=1)
    save(tmp_path / "src" / "pair.jpg", pair)
    out = tmp_path / "faces"
    config = FacesConfig(which="all", size=32)
    write_faces(tmp_path / "src", out, config, device="cpu")
    assert (out / "pair_1.jpg").exists()
    before = files(out)
    (out / "pair_1.jpg").unlink()
    summary = write_faces(tmp_path / "src", out, config, device="cpu")
    assert summary.num_crops == 2
    assert files(out)["pair_1.jpg"] == before["pair_1.jpg"]


def test_other_settings_photos_or_contents_are_refused(photos, tmp_path):
    out = tmp_path / "faces"
    write_faces(photos, out, FacesConfig(detect="none", size=32))
    before = files(out)
    with pytest.raises(PrepareError, match="size 32 is now 48"):
        write_faces(photos, out, FacesConfig(detect="none", size=48))
    other = tmp_path / "other"
    save(other / "0.jpg", np.zeros((9, 9, 3), np.uint8))
    with pytest.raises(PrepareError, match="other photos"):
        write_faces(other, out, FacesConfig(detect="none", size=32))
    assert files(out) == before
    write_faces(photos, out, FacesConfig(detect="none", size=32, batch=3, num_threads=1))
    with pytest.raises(PrepareError, match="not empty"):
        write_faces(photos, other, FacesConfig(detect="none"))
    with pytest.raises(PrepareError, match="outside"):
        write_faces(photos, photos / "faces", FacesConfig(detect="none"))
    (tmp_path / "plain").touch()
    with pytest.raises(PrepareError, match="is a file"):
        write_faces(photos, tmp_path / "plain", FacesConfig(detect="none"))


def test_missing_and_empty_folders_are_errors_before_anything_is_written(tmp_path):
    with pytest.raises(PrepareError, match="does not exist"):
        write_faces(tmp_path / "absent", tmp_path / "out", FacesConfig())
    (tmp_path / "empty").mkdir()
    with pytest.raises(PrepareError, match="no photo below"):
        write_faces(tmp_path / "empty", tmp_path / "out", FacesConfig())
    assert not (tmp_path / "out").exists()


def test_faces_are_read_back(photos, tmp_path):
    out = tmp_path / "faces"
    config = FacesConfig(size=64, format="png")
    written = [
        i for i in iter_faces(find_photos(photos), config, device="cpu") if isinstance(i, Crop)
    ]
    write_faces(photos, out, config, device="cpu")
    assert list(read_faces(out)) == sorted(written, key=lambda crop: crop.key)


def test_plain_folders_are_read_too(tmp_path, noise):
    save(tmp_path / "a" / "x.jpg", noise)
    save(tmp_path / "b" / "x.webp", noise, lossless=True)
    exif = Image.Exif()
    exif[0x0112] = 6
    save(tmp_path / "turned.png", noise, exif=exif)
    save(tmp_path / "y.png", noise)
    crops = {crop.key: crop for crop in read_faces(tmp_path)}
    assert list(crops) == sorted(
        photo_key(n) for n in ("a/x.jpg", "b/x.webp", "turned.png", "y.png")
    )
    assert crops[photo_key("a/x.jpg")].image == (tmp_path / "a" / "x.jpg").read_bytes()
    assert crops[photo_key("y.png")].image_format == "png"
    for name, expected in (("b/x.webp", noise), ("turned.png", np.rot90(noise, -1))):
        crop = crops[photo_key(name)]
        assert crop.image_format == "png"
        np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(crop.image))), expected)
    (tmp_path / "z.jpg").write_text("no")
    with pytest.raises(PrepareError, match=r"z\.jpg: not_an_image"):
        list(read_faces(tmp_path))
