"""Folders of photos become folders of faces; nothing bad is lost, and nothing is done twice."""

import csv
import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dinogen.config_prepare import FacesConfig
from dinogen.prepare import detect, stream
from dinogen.prepare.curate import Duplicates
from dinogen.prepare.detect import FaceDetector
from dinogen.prepare.faces import (
    Crop,
    PrepareError,
    Rejection,
    iter_faces,
    read_faces,
    write_faces,
)
from dinogen.prepare.read import find_photos, photo_key

pytestmark = pytest.mark.usefixtures("one_torch_thread")

# The astronaut's head
FACE = (slice(20, 240), slice(110, 330))


def save(path, pixels, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.ascontiguousarray(pixels)).save(path, **options)


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def rejected(out):
    with (out / "rejected.csv").open(encoding="utf-8", newline="") as file:
        return [tuple(row.values()) for row in csv.DictReader(file)]


@pytest.fixture
def photos(tmp_path, astronaut):
    """Six photos with a face, of three sizes, and one without."""
    src = tmp_path / "photos"
    face = astronaut[FACE]
    for number in range(3):
        save(src / f"{number}.jpg", np.roll(face, 3 * number, axis=1), quality=95)
    save(src / "album" / "0.jpg", face[:, ::-1], quality=95)
    save(src / "album" / "wide.png", np.pad(face, ((0, 0), (40, 60), (0, 0)), mode="edge"))
    save(src / "Zoë und Ann.png", face[5:, 5:])
    save(src / "wall.png", np.full((220, 220, 3), 90, np.uint8))
    return src


def test_a_folder_of_faces(photos, tmp_path):
    out = tmp_path / "faces"
    calls = []
    summary = write_faces(
        photos, out, FacesConfig(size=64), device="cpu", progress=lambda *a: calls.append(a)
    )
    sources = ["0.jpg", "1.jpg", "2.jpg", "Zoë und Ann.png", "album/0.jpg", "album/wide.png"]
    assert (summary.num_photos, summary.num_crops, summary.num_new) == (7, 6, 6)
    assert summary.rejected == {"no_face": 1}
    assert rejected(out) == [("wall.png", "no_face", "no face found")]
    assert json.loads((out / "summary.json").read_text())["num_crops"] == 6
    assert calls == [(n, 7) for n in range(8)]
    metas = [json.loads((out / f"{photo_key(source)}.json").read_text()) for source in sources]
    assert [meta["source"] for meta in metas] == sources
    assert metas[5]["original_size"] == [320, 220]
    for source, meta in zip(sources, metas, strict=True):
        with Image.open(out / f"{photo_key(source)}.jpg") as image:
            assert image.size == (64, 64)
            assert image.mode == "RGB"
            # 4:4:4, so that no colour is thrown away
            assert [component[1:3] for component in image.layer] == [(1, 1)] * 3
        assert meta["probability"] > 0.95
        assert np.shape(meta["landmarks"]) == (5, 2)
        assert meta["box"][0] < meta["landmarks"][0][0] < meta["landmarks"][1][0] < meta["box"][2]


@pytest.mark.parametrize("align", ["landmarks", "ffhq", "box"])
def test_every_alignment_shows_the_face(photos, tmp_path, align, astronaut):
    """Detected again in the crop, the eyes are level and the face is centred."""
    (crop,) = [
        item
        for item in iter_faces(find_photos(photos), FacesConfig(align=align), device="cpu")
        if isinstance(item, Crop) and item.key == "0"
    ]
    assert crop.meta["align"] == align
    pixels = np.asarray(Image.open(io.BytesIO(crop.image)))
    (face,) = FaceDetector("cpu").detect([pixels])[0]
    points = np.array(face.landmarks)
    assert "landmarks" in crop.meta
    if align == "landmarks":
        expected = np.array([(38, 51), (90, 51), (64, 71), (45, 95), (83, 95)]) * 2
        # A second look at the face moves its points by some pixels itself.
        assert np.abs(points - expected).mean() < 8
    if align in ("landmarks", "ffhq"):
        assert abs(points[0, 1] - points[1, 1]) < 0.08 * (points[1, 0] - points[0, 0])
        assert abs(points[:2, 0].mean() - 128) < 12
    if align == "box":
        left, top, right, bottom = face.box
        assert abs((left + right) / 2 - 128) < 10
        assert abs((top + bottom) / 2 - 128) < 10


@pytest.mark.parametrize("fit", ["crop", "resize"])
def test_pictures_as_they_are(tmp_path, fit):
    """A photo of four quarters, twice as wide as high: its middle, or all of it squeezed."""
    quarters = np.repeat(np.array([[0, 80, 160, 240]], np.uint8), 40, axis=0)
    pixels = np.repeat(np.repeat(quarters, 20, axis=1)[..., None], 3, axis=2)
    save(tmp_path / "src" / "a.png", pixels)
    config = FacesConfig(detect="none", fit=fit, size=32, format="png")
    (crop,) = iter_faces(find_photos(tmp_path / "src"), config)
    assert crop.meta["fit"] == fit and not {"align", "landmarks", "box"} & set(crop.meta)
    row = np.asarray(Image.open(io.BytesIO(crop.image)))[16, :, 0].astype(int)
    places = [8, 24] if fit == "crop" else [4, 12, 20, 28]
    wanted = [80, 160] if fit == "crop" else [0, 80, 160, 240]
    assert np.abs(row[places] - wanted).max() <= 2
    if fit == "crop":
        assert row.min() > 40 and row.max() < 200


def test_every_bad_input_has_its_line(photos, tmp_path, write_bomb):
    whole = (photos / "0.jpg").read_bytes()
    (photos / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (photos / "text.jpg").write_text("not a picture")
    (photos / "nothing.png").touch()
    write_bomb(photos / "bomb.png")
    (photos / "folder.jpg").mkdir()
    (photos / "folder.jpg" / "inside é.jpg").write_bytes(whole)
    (photos / "link.jpg").symlink_to("nowhere")
    (photos / "notes.txt").write_text("ignored")
    out = tmp_path / "faces"
    summary = write_faces(photos, out, FacesConfig(size=32), device="cpu")
    assert [(source, reason) for source, reason, _ in rejected(out)] == [
        ("bomb.png", "too_large"),
        ("cut.jpg", "truncated"),
        ("folder.jpg", "unreadable"),
        ("link.jpg", "unreadable"),
        ("nothing.png", "empty"),
        ("text.jpg", "not_an_image"),
        ("wall.png", "no_face"),
    ]
    assert all(detail for *_, detail in rejected(out))
    assert summary.num_photos == 14
    assert summary.num_crops == 7
    assert summary.num_ignored == 1
    assert len(list(out.glob("*.jpg"))) == 7


def test_a_file_without_permission_has_its_line(photos, tmp_path, monkeypatch):
    stat = Path.stat

    def refuse(self, **options):
        if self.name == "1.jpg":
            raise PermissionError(13, "Permission denied", str(self))
        return stat(self, **options)

    monkeypatch.setattr(Path, "stat", refuse)
    items = list(iter_faces(find_photos(photos), FacesConfig(detect="none", size=32)))
    assert [item for item in items if isinstance(item, Rejection)] == [
        Rejection("1.jpg", "unreadable", "Permission denied")
    ]
    assert len(items) == 7


def test_the_output_does_not_depend_on_batch_threads_or_groups(photos, tmp_path, monkeypatch):
    results = []
    for batch, num_threads, group in ((16, 2, 64), (1, 1, 64), (3, 3, 2)):
        monkeypatch.setattr(stream, "_GROUP_PHOTOS", group)
        config = FacesConfig(size=64, batch=batch, num_threads=num_threads)
        results.append(list(iter_faces(find_photos(photos), config, device="cpu")))
    assert results[0] == results[1] == results[2]


def test_photos_detected_together_give_the_same_faces(photos, monkeypatch):
    """The way of a GPU, where one thread detects batches of equal size, walked on a CPU."""

    def faces():
        items = iter_faces(find_photos(photos), FacesConfig(size=64, batch=4), device="cpu")
        return [i if isinstance(i, Rejection) else (i.key, i.meta["landmarks"]) for i in items]

    class BatchedDetector(FaceDetector):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            self.prefers_batches = True

        def _cascade(self, pixels):
            batches.append(len(pixels))
            return super()._cascade(pixels)

    (photos / "cut.jpg").write_bytes((photos / "0.jpg").read_bytes()[:900])
    alone = faces()
    batches = []
    monkeypatch.setattr(detect, "FaceDetector", BatchedDetector)
    together = faces()
    assert sorted(batches) == [1, 1, 1, 4]  # of 220x220 there are five
    assert len(together) == len(alone) == 8
    for a, b in zip(alone, together, strict=True):
        if isinstance(a, Rejection):
            assert a == b
        else:
            assert a[0] == b[0]
            np.testing.assert_allclose(a[1], b[1], atol=2e-3)


def test_all_faces_of_a_photo(tmp_path, astronaut):
    face = Image.fromarray(np.ascontiguousarray(astronaut[FACE]))
    sheet = Image.new("RGB", (700, 320), "gray")
    sheet.paste(face.resize((300, 300)), (10, 10))
    sheet.paste(face, (330, 60))
    sheet.paste(face.resize((60, 60)), (600, 100))
    save(tmp_path / "src" / "party.jpg", np.asarray(sheet))
    every = FacesConfig(which="all", size=64, min_face=40)
    items = list(iter_faces(find_photos(tmp_path / "src"), every, device="cpu"))
    crops = [item for item in items if isinstance(item, Crop)]
    assert [crop.key for crop in crops] == ["party", "party_1"]
    widths = [crop.meta["box"][2] - crop.meta["box"][0] for crop in crops]
    assert widths[0] > widths[1] > 40
    small = [item for item in items if isinstance(item, Rejection) and item.reason == "small_face"]
    assert len(small) == 1
    assert ["small_face", small[0].detail] in crops[0].meta["rejected"]
    (largest,) = iter_faces(find_photos(tmp_path / "src"), FacesConfig(size=64), device="cpu")
    assert largest.image == crops[0].image


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"min_face": 150}, "small_face"),
        ({"min_probability": 1.0}, "low_probability"),
        ({"min_blur": 1e6}, "blurred"),
    ],
)
def test_thresholds(photos, options, reason):
    (photos / "wall.png").unlink()
    items = list(iter_faces(find_photos(photos), FacesConfig(size=64, **options), device="cpu"))
    reasons = {item.reason for item in items if isinstance(item, Rejection)}
    assert reason in reasons
    if reason != "low_probability":  # some faces have a probability of exactly 1
        assert reasons == {reason}
        assert len(items) == 6


def test_the_first_of_near_duplicates_stays(tmp_path, astronaut, noise):
    src = tmp_path / "src"
    save(src / "a.jpg", astronaut, quality=90)
    save(src / "b.jpg", astronaut, quality=40)
    save(src / "c.png", np.kron(noise, np.ones((8, 8, 1), np.uint8)))
    save(src / "d.png", astronaut)
    config = FacesConfig(detect="none", size=64, max_duplicate_distance=6)
    items = list(iter_faces(find_photos(src), config))
    assert [i.key if isinstance(i, Crop) else (i.source, i.reason) for i in items] == [
        "a",
        ("b.jpg", "duplicate"),
        photo_key("c.png"),
        ("d.png", "duplicate"),
    ]
    assert "differs from a in" in items[1].detail
    known = Duplicates(6)
    known.add("a", int(items[0].meta["phash"], 16))
    again = list(
        iter_faces(find_photos(src), config, skip=lambda key: key == "a", duplicates=known)
    )
    assert again == items[1:]


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
    # the one that is gone, and the rejected one in case it was mended
    assert seen == ["1.jpg", "wall.png"]
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


def test_a_mended_photo_is_taken_up(photos, tmp_path):
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
        "from dinogen.config_prepare import FacesConfig\n"
        "from dinogen.prepare.faces import write_faces\n"
        "print('start', flush=True)\n"
        "slow = lambda done, total: (print(done, flush=True), time.sleep(0.02))\n"
        "write_faces(Path(sys.argv[1]), Path(sys.argv[2]), FacesConfig(detect='none', size=64),\n"
        "            progress=slow)\n"
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


def test_missing_and_empty_folders_are_told_before_anything_is_written(tmp_path):
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


def test_torch_keeps_its_threads(photos):
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    items = iter_faces(find_photos(photos), FacesConfig(size=32, num_threads=3), device="cpu")
    next(items)
    assert torch.get_num_threads() == 2
    items.close()
    assert torch.get_num_threads() == 2
    torch.set_num_threads(before)


def test_memory_stays_bounded(tmp_path, monkeypatch):
    """At most two groups are read before their crops are taken."""
    for number in range(12):
        save(tmp_path / "src" / f"{number:02}.png", np.zeros((50, 50, 3), np.uint8))
    monkeypatch.setattr(stream, "_GROUP_PIXELS", 2 * 2500)
    started = []
    original = stream.read_and_cut
    monkeypatch.setattr(
        stream, "read_and_cut", lambda p, *a: started.append(p.source) or original(p, *a)
    )
    for number, _ in enumerate(
        iter_faces(find_photos(tmp_path / "src"), FacesConfig(detect="none", size=16))
    ):
        assert len(started) <= number + 1 + 4
    assert len(started) == 12


def test_the_real_portraits(assets, tmp_path):
    """Some of the 700: nearly all give a face."""
    src = tmp_path / "src"
    src.mkdir()
    for path in sorted((assets / "faces").glob("*.jpg"))[::20]:
        (src / path.name).symlink_to(path)
    summary = write_faces(src, tmp_path / "faces", FacesConfig(size=64), device="cpu")
    assert summary.num_photos == 35
    assert summary.num_crops >= 34
