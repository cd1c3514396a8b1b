"""The demo, end to end on real faces with a tiny guide and a few steps; then its ways to fail."""

import json

import numpy as np
import pytest
import skimage
import yaml
from PIL import Image
from typer.testing import CliRunner

from dinogen import demo
from dinogen.errors import UserError
from launch.cli.main import app
from shards import open_dataset

TINY = {"hidden_size": 32, "num_layers": 1, "num_heads": 2}
KIMG = (0.064, 0.064, 0.032)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """The demo made small, and a machine that cannot have the weights."""
    config = yaml.safe_load(demo.CONFIG.read_text(encoding="utf-8"))
    config["family"] |= {"channel_base": 64, "channel_max": 8, "probe_samples": 4}
    config["log"] |= {"every_kimg": 0.016, "num_samples": 4}
    path = tmp_path_factory.mktemp("config") / "demo.yaml"
    path.write_text(yaml.safe_dump(config))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "CONFIG", path)
        patch.setattr(demo, "RANDOM_SHAPE", TINY)
        patch.setattr(demo, "RANDOM_KIMG", KIMG)
        patch.setattr(demo, "RANDOM_FADE_KIMG", (0.0, 0.032, 0.016))
        patch.setattr("dinogen.features.checkpoint.weights_reachable", lambda *_: None)
        yield


def run(*arguments):
    return CliRunner().invoke(app, ["demo", *map(str, arguments)])


@pytest.fixture(scope="module")
def made(small, tmp_path_factory):
    out = tmp_path_factory.mktemp("made") / "demo"
    result = run("--out", out)
    assert result.exit_code == 0, result.output
    return out, result.output


def test_it_trains_all_stages_on_all_real_faces(made):
    out, _ = made
    data = open_dataset(out / "data.random-guide")
    assert data.num_samples() == 101
    assert {"p4", "n4", "n8", "n16"} <= set(data.manifest.levels)
    total = 0
    for resolution, kimg in zip((4, 8, 16), KIMG, strict=True):
        total += round(kimg * 1000)
        folder = out / "run.random-guide" / f"{resolution}x{resolution}"
        result = json.loads((folder / "result.json").read_text())
        assert (result["status"], result["nimg"]) == ("finished", total)
        assert any((folder / "tb").iterdir())


def test_its_photos_are_those_of_scikit_image(made):
    out, _ = made
    data = open_dataset(out / "data.random-guide")
    keys = data.keys()
    names = [key.partition("-")[0] for key in keys]  # the rest is a hash of the path
    faces = np.load(skimage.data_dir + "/lfw_subset.npy", allow_pickle=False)
    batch = data.read([names.index("lfw_007")], image_size=16)
    stored = (batch["image"][0].numpy().mean(axis=0) + 1) / 2
    shrunk = np.asarray(
        Image.fromarray(np.float32(faces[7])).resize((16, 16), Image.Resampling.BOX)
    )
    assert np.corrcoef(stored.ravel(), shrunk.ravel())[0, 1] > 0.95
    assert names.count("astronaut") == 1


def test_a_random_guide_stands_everywhere(made):
    out, output = made
    assert "RANDOM GUIDE" in output
    manifest = json.loads((out / "data.random-guide" / "manifest.json").read_text())
    assert manifest["guide"]["random"] is True
    run_folder = out / "run.random-guide"
    assert "RANDOM GUIDE" in (run_folder / "index.html").read_text(encoding="utf-8")
    for name in ("final_16x16.random-guide.png", "loss_curve_16x16.random-guide.png"):
        assert (run_folder / "16x16" / name).is_file()


def test_it_tells_the_time_of_each_step_and_what_comes_next(made):
    out, output = made
    assert "wall time" in output
    for step in ("guide", "faces", "prepare", "train"):
        assert f"{step} " in output[output.index("wall time") :]
    assert str(out / "run.random-guide" / "index.html") in output
    assert "tensorboard --logdir" in output


def test_a_second_run_keeps_what_is_there(made):
    out, _ = made
    names = ("data.random-guide/manifest.json", "run.random-guide/16x16/result.json")
    before = [(out / name).stat().st_mtime_ns for name in names]
    result = run("--out", out)
    assert result.exit_code == 0, result.output
    assert [(out / name).stat().st_mtime_ns for name in names] == before


def test_other_photos_do_not_mix_with_it(made, tmp_path):
    out, _ = made
    before = sorted(out.rglob("*"))
    with pytest.raises(UserError, match="choose another folder with --out"):
        demo.run_demo(out, photos=tmp_path)
    assert sorted(out.rglob("*")) == before


def test_own_photos_go_through_detection(small, tmp_path):
    photos = tmp_path / "my photos"
    photos.mkdir()
    with Image.open(skimage.data_dir + "/astronaut.png") as photo:
        for number, quality in enumerate((70, 80, 90)):
            photo.save(photos / f"{number} ü.jpg", quality=quality)
        photo.crop((0, 300, 200, 500)).save(photos / "no face.png")
    result = run("--photos", photos, "--out", tmp_path / "mine")
    assert result.exit_code == 0, result.output
    data = open_dataset(tmp_path / "mine" / "data.random-guide")
    assert data.num_samples() == 3
    assert data.manifest.image_size == 256
    rejected = (tmp_path / "mine" / "data.random-guide" / "rejected.csv").read_text()
    assert "no face.png,no_face" in rejected


@pytest.fixture
def photos(tmp_path):
    """One face, and a photo without any."""
    folder = tmp_path / "photos"
    folder.mkdir()
    with Image.open(skimage.data_dir + "/astronaut.png") as photo:
        photo.save(folder / "one.png")
        photo.crop((0, 300, 200, 500)).save(folder / "none.png")
    return folder


def test_an_unavailable_guide_is_an_error_if_asked_for_and_leaves_nothing(small, tmp_path):
    with pytest.raises(UserError, match=r"guide\.path: .*nothing-here"):
        demo.run_demo(tmp_path / "demo", guide_path=str(tmp_path / "nothing-here"))
    assert not (tmp_path / "demo").exists()


def test_mistyped_photos_are_an_error_before_the_guide_is_loaded_and_leave_nothing(
    small, tmp_path, monkeypatch
):
    monkeypatch.setattr(demo, "load_guide", lambda *_: 1 / 0)
    with pytest.raises(UserError, match="fotos: does not exist"):
        demo.run_demo(tmp_path / "demo", photos=tmp_path / "fotos")
    assert not (tmp_path / "demo").exists()


@pytest.mark.parametrize(("num_faces", "found"), [(1, "1 face"), (0, "no face")])
def test_too_few_faces_are_an_error_before_training_and_leave_nothing(
    small, photos, tmp_path, num_faces, found
):
    if num_faces == 0:
        (photos / "one.png").unlink()
    out = tmp_path / "demo"
    message = rf"photos: {found} found \(rejected: 1 no_face\), .* at least 2 faces"
    with pytest.raises(UserError, match=message):
        demo.run_demo(out, photos=photos)
    assert not out.exists()
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=found):
        demo.run_demo(out, photos=photos)
    assert (out / "notes.txt").read_text() == "mine"


def test_an_interrupted_demo_goes_on(small, photos, tmp_path, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(demo, "_prepare", interrupt)
        with pytest.raises(KeyboardInterrupt):
            demo.run_demo(tmp_path / "demo", photos=photos)
    assert (tmp_path / "demo" / "demo.json").is_file()


def test_without_its_config_it_says_where_it_runs(tmp_path):
    with pytest.raises(UserError, match="runs in a clone"):
        demo.run_demo(tmp_path, config_file=tmp_path / "demo.yaml")
