"""Folders of photos become folders of faces, in any batch alike, and nothing bad is lost."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dinogen.config import FacesConfig
from dinogen.prepare.faces import detect, stream
from dinogen.prepare.faces.crop import Duplicates
from dinogen.prepare.faces.detect import FaceDetector
from dinogen.prepare.faces.folder import Crop, Rejection, iter_faces, write_faces
from dinogen.prepare.photos.find import find_photos, photo_key
from tests.prepare.face_folders import FACE, rejected, save

pytestmark = pytest.mark.usefixtures("one_torch_thread")


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
    # With some room around it: MTCNN squeezes what it looks at where that sticks out of a photo.
    room = 64
    padded = np.pad(pixels, ((room, room), (room, room), (0, 0)), mode="edge")
    (face,) = FaceDetector("cpu").detect([padded])[0]
    points = np.array(face.landmarks) - room
    assert "landmarks" in crop.meta
    if align == "landmarks":
        expected = np.array([(38, 51), (90, 51), (64, 71), (45, 95), (83, 95)]) * 2
        # A second look at the face moves its points by some pixels itself.
        assert np.abs(points - expected).mean() < 8
    if align in ("landmarks", "ffhq"):
        assert abs(points[0, 1] - points[1, 1]) < 0.08 * (points[1, 0] - points[0, 0])
        assert abs(points[:2, 0].mean() - 128) < 12
    if align == "box":
        left, top, right, bottom = np.array(face.box) - room
        assert abs((left + right) / 2 - 128) < 10
        assert abs((top + bottom) / 2 - 128) < 10


@pytest.mark.parametrize("fit", ["crop", "resize"])
def test_photos_as_they_are(tmp_path, fit):
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
    (photos / "text.jpg").write_text("not a photo")
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
        ("link.jpg", "unreadable"),
        ("nothing.png", "empty"),
        ("text.jpg", "not_an_image"),
        ("wall.png", "no_face"),
    ]
    assert all(detail for *_, detail in rejected(out))
    assert summary.num_photos == 13
    assert summary.num_crops == 7
    assert (summary.num_used, summary.num_rejected, summary.num_sidecars) == (7, 6, 1)
    assert summary.num_files == 14 and summary.left_out == {}
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
