"""What an earlier version began goes on as it was begun, alike in all samples, and says so.

Earlier versions put landmarks half a pixel too far right and down, and enlarged images for a guide
without antialias. Neither stood in their settings, so here it is taken out of today's.
"""

from __future__ import annotations

import json
import logging
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from dinogen.config import FacesConfig, GuideConfig
from dinogen.features import load_guide, native_pyramid
from dinogen.guidance.guides import GuideSet, load_guides
from dinogen.prepare import join
from dinogen.prepare.faces.detect import FaceDetector
from dinogen.prepare.faces.folder import write_faces
from dinogen.prepare.parts import PartFiles, write_pyramids
from dinogen.prepare.photos.read import PrepareError
from dinogen.prepare.pyramid import PyramidMaker
from shards import open_dataset
from shards.read.mixture import MixedDataset
from tests.families.tiny import tiny_config
from tests.prepare.face_folders import FACE, files, save
from tests.prepare.pipelines import CPU, fill, run, settings

pytestmark = pytest.mark.usefixtures("one_torch_thread")


@pytest.fixture(scope="module")
def guide(checkpoint):
    return load_guide(GuideConfig(path=str(checkpoint)), CPU)


def as_earlier(path, *ways):
    """Take facts out of a file of JSON; each way is the keys that lead to one."""
    value = json.loads(path.read_bytes())
    for *outer, fact in ways:
        section = value
        for name in outer:
            section = section[name]
        del section[fact]
    path.write_text(json.dumps(value))


class Killed(BaseException):
    pass


def killed_after(num):
    def progress(done, total):
        if done > num:
            raise Killed

    return progress


# -- landmarks


def landmarks(folder, key):
    return np.array(json.loads((folder / f"{key}.json").read_text())["landmarks"])


@pytest.mark.parametrize("begun", ["earlier", "today"])
def test_a_folder_of_faces_goes_on(begun, photos, tmp_path, astronaut, caplog):
    out = tmp_path / "faces"
    config = FacesConfig(size=64)
    write_faces(photos, out, config, device="cpu")
    assert json.loads((out / "settings.json").read_text())["faces"]["landmark_offset"] == 0
    if begun == "earlier":
        as_earlier(out / "settings.json", ("faces", "landmark_offset"))
    said = (out / "settings.json").read_bytes()
    kept = (out / "0.jpg").read_bytes()
    (out / "1.jpg").unlink()
    save(photos / "new.png", astronaut[FACE][:, 3:])
    caplog.set_level(logging.WARNING)
    summary = write_faces(photos, out, config, device="cpu")
    assert summary.num_new == 2
    assert ("0.5 px too far right" in caplog.text) == (begun == "earlier")
    assert (out / "settings.json").read_bytes() == said and (out / "0.jpg").read_bytes() == kept
    right = FaceDetector("cpu").detect([np.asarray(Image.open(photos / "1.jpg"))])[0][0]
    moved = landmarks(out, "1") - np.array(right.landmarks)
    np.testing.assert_allclose(moved, 0.5 if begun == "earlier" else 0, atol=1e-3)


def test_a_folder_of_faces_with_none_in_it_begins_today(photos, tmp_path, caplog):
    out = tmp_path / "faces"
    out.mkdir()
    write_faces(photos, out, FacesConfig(size=32), device="cpu")
    as_earlier(out / "settings.json", ("faces", "landmark_offset"))
    for path in [*out.glob("*.jpg"), *out.glob("*.png")]:
        path.unlink()
    write_faces(photos, out, FacesConfig(size=32), device="cpu")
    assert json.loads((out / "settings.json").read_text())["faces"]["landmark_offset"] == 0
    assert not caplog.records


def test_other_settings_are_still_refused(photos, tmp_path):
    out = tmp_path / "faces"
    write_faces(photos, out, FacesConfig(size=32), device="cpu")
    as_earlier(out / "settings.json", ("faces", "landmark_offset"))
    with pytest.raises(PrepareError, match=r"other settings .*size 32 is now 64") as refused:
        write_faces(photos, out, FacesConfig(size=64), device="cpu")
    assert "landmark_offset" not in str(refused.value)


def test_photos_as_they_are_have_no_landmarks(photos, tmp_path, caplog):
    out = tmp_path / "faces"
    for _ in range(2):
        write_faces(photos, out, FacesConfig(detect="none", size=32))
    assert "landmark_offset" not in json.loads((out / "settings.json").read_text())["faces"]
    assert not caplog.records


@pytest.mark.parametrize("finished", [True, False])
def test_one_pass_goes_on_with_faces(finished, photos, tmp_path, caplog):
    config = settings(
        faces={"detect": "mtcnn", "max_duplicate_distance": -1}, pack={"val_fraction": 0}
    )
    run_plain = lambda data, **more: run(photos, data, None, config, **more)  # noqa: E731
    run_plain(tmp_path / "today")
    data = tmp_path / "data"
    holder = ("prepare", "faces", "landmark_offset")
    if finished:
        run_plain(data)
        as_earlier(data / "manifest.json", holder)
    else:
        with pytest.raises(Killed):
            run_plain(data, progress=killed_after(4))
        as_earlier(data / "packing.json", ("settings", *holder))
    before = files(data)
    caplog.set_level(logging.WARNING)
    _, manifest = run_plain(data)
    assert "landmark_offset" not in manifest.prepare["faces"]
    assert ("0.5 px too far right" in caplog.text) != finished
    if finished:
        assert files(data) == before
        return
    today, earlier = open_dataset(tmp_path / "today"), open_dataset(data)
    moved = [
        np.subtract(earlier.sample(i).meta["landmarks"], today.sample(i).meta["landmarks"]).mean()
        for i in range(6)
    ]
    np.testing.assert_allclose(moved, [0, 0, 0, 0.5, 0.5, 0.5], atol=1e-3)  # by shards of three


# -- images enlarged for a guide


def native(guide, sample, antialias):
    pixels = np.asarray(Image.open(sample)) if not isinstance(sample, np.ndarray) else sample
    images = torch.from_numpy(pixels.astype(np.float32)).permute(2, 0, 1)[None] / 127.5 - 1
    with torch.inference_mode():
        return native_pyramid(guide, images, (8,), antialias)[8][0].numpy()


def test_pyramids_in_parts_go_on(guide, tmp_path, caplog):
    faces, out, today = (tmp_path / name for name in ("faces", "parts", "today"))
    config = settings()
    write_faces(fill(tmp_path / "photos"), faces, config.faces)
    write_pyramids(faces, today, PyramidMaker(guide, config.pyramids, CPU))
    maker = PyramidMaker(guide, config.pyramids, CPU)
    maker.antialias = False
    assert "resize" not in maker.settings()
    out.mkdir()
    earlier = out / "part-00001.safetensors"
    # one part of it, as an earlier version wrote it
    shutil.copytree(today, tmp_path / "copy")
    rewrite_header(tmp_path / "copy" / earlier.name, earlier)
    caplog.set_level(logging.WARNING)
    write_pyramids(faces, out, PyramidMaker(guide, config.pyramids, CPU))
    assert "begun by an earlier version" in caplog.text
    parts = PartFiles(out)
    assert "resize" not in parts.settings
    assert PartFiles(today).settings["resize"] == "bicubic antialias"
    key = min(parts.keys())  # in the first part, which was missing
    found = parts.levels(key)["n8"]
    photo = faces / f"{key}.jpg"
    np.testing.assert_allclose(found, native(guide, photo, False), atol=2e-3)
    assert np.abs(found - native(guide, photo, True)).max() > 0.01
    source = join.open_pyramids(out)
    data = tmp_path / "data"
    manifest = join.pack_faces(faces, source, data, config.pack, join.guide_of(source, None))
    assert "resize" not in manifest.prepare["pyramids"]
    caplog.clear()
    write_pyramids(faces, today, PyramidMaker(guide, config.pyramids, CPU))
    assert not caplog.records


def rewrite_header(path, out):
    from safetensors import safe_open
    from safetensors.numpy import load_file, save_file

    with safe_open(path, "numpy") as file:
        header = json.loads(file.metadata()["dinogen"])
    del header["settings"]["resize"]
    save_file(load_file(path), out, {"dinogen": json.dumps(header)})


@pytest.fixture(scope="module")
def datasets(tmp_path_factory, guide):
    """The same photos prepared today, and as an earlier version would have."""
    folder = tmp_path_factory.mktemp("datasets")
    photos = fill(folder / "photos")
    run(photos, folder / "today", guide)
    with pytest.raises(Killed):
        run(photos, folder / "earlier", guide, progress=killed_after(0))
    as_earlier(folder / "earlier" / "packing.json", ("settings", "prepare", "pyramids", "resize"))
    run(photos, folder / "earlier", guide)
    return folder


def test_one_pass_goes_on_with_pyramids(datasets, guide):
    for name, antialias in (("today", True), ("earlier", False)):
        data = open_dataset(datasets / name)
        assert ("resize" in data.manifest.prepare["pyramids"]) == antialias
        sample = data.sample(0)
        features = native(guide, decoded(sample), antialias)
        np.testing.assert_allclose(sample.levels["n8"], features, atol=2e-3)
    before = files(datasets / "earlier")
    run(datasets / "photos", datasets / "earlier", guide)  # finished, and left as it is
    assert files(datasets / "earlier") == before


def decoded(sample):
    import io

    return np.asarray(Image.open(io.BytesIO(sample.image)))


@pytest.mark.parametrize("name", ["today", "earlier"])
def test_generated_images_are_enlarged_as_the_real_ones_were(name, datasets, checkpoint, caplog):
    """A generator that makes the real image, shrunk, has the real image's features."""
    data = open_dataset(datasets / name)
    config = tiny_config("guided", datasets / name, datasets / "run", f"guide.path={checkpoint}")
    caplog.set_level(logging.WARNING)
    guides = GuideSet(load_guides(config, ("n8",), CPU), data, ("n8",), normalize=False)
    assert ("earlier version" in caplog.text) == (name == "earlier")
    batch = data.read([0, 1], image_size=8, levels=["n8"])
    with torch.inference_mode():
        features = guides(batch["image"])["n8"]
    apart = (features - batch["pyramid"][8].float()).abs()
    guides.antialias = not guides.antialias
    with torch.inference_mode():
        others = (guides(batch["image"])["n8"] - batch["pyramid"][8].float()).abs()
    assert apart.mean() < 0.5 * others.mean()


@pytest.mark.parametrize("names", [("today", "earlier"), ("earlier", "today")])
def test_a_mix_of_both_says_so_and_follows_the_first(names, datasets, checkpoint, caplog):
    from fractions import Fraction

    caplog.set_level(logging.WARNING)
    mix = MixedDataset([open_dataset(datasets / name) for name in names], [Fraction(1)] * 2)
    assert "images were resized for the guides in different ways" in caplog.text
    config = tiny_config("guided", datasets / "today", datasets / "run", f"guide.path={checkpoint}")
    guides = GuideSet(load_guides(config, ("n8",), CPU), mix, ("n8",))
    assert guides.antialias == (names[0] == "today")
    caplog.clear()
    MixedDataset([open_dataset(datasets / names[0])] * 2, [Fraction(1)] * 2)
    assert not caplog.records
