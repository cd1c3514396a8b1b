"""The demo, end to end on real faces with a few steps; then its ways to fail."""

import base64
import json

import numpy as np
import pytest
import skimage
import yaml
from PIL import Image
from typer.testing import CliRunner

from dinogen import demo
from dinogen.config import load_config
from dinogen.errors import UserError
from launch.cli import train
from launch.cli.main import app
from shards import open_dataset

KIMG = (0.064, 0.064, 0.032, 0.032)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """The demo made small."""
    config = yaml.safe_load(demo.CONFIG.read_text(encoding="utf-8"))
    config["family"] |= {"channel_base": 64, "channel_max": 8, "probe_samples": 4}
    config["log"] |= {"every_kimg": 0.016, "num_samples": 4}
    for stage, kimg in zip(config["stages"], KIMG, strict=True):
        stage |= {"kimg": kimg, "batch": 8, "fade_kimg": 0, "warmup_kimg": 0, "decay_kimg": 0}
    path = tmp_path_factory.mktemp("config") / "demo.yaml"
    path.write_text(yaml.safe_dump(config))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "CONFIG", path)
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
    data = open_dataset(out / "data")
    assert data.num_samples() == 202
    assert data.manifest.guide["name"] == "onet"
    total = 0
    for resolution, kimg in zip((4, 8, 16, 32), KIMG, strict=True):
        total += round(kimg * 1000)
        folder = out / "run" / f"{resolution}x{resolution}"
        result = json.loads((folder / "result.json").read_text())
        assert (result["status"], result["nimg"]) == ("finished", total)
        assert any((folder / "tb").iterdir())


def test_its_faces_are_those_of_scikit_image_and_their_mirror_images(made):
    out, _ = made
    data = open_dataset(out / "data")
    keys = data.keys()
    names = [key.partition("-")[0] for key in keys]  # the rest is a hash of the path
    faces = np.load(skimage.data_dir + "/lfw_subset.npy", allow_pickle=False)
    both = [names.index(name) for name in ("lfw_007", "lfw_007_mirrored")]
    stored = (data.read(both, image_size=16)["image"].numpy().mean(axis=1) + 1) / 2
    shrunk = np.asarray(
        Image.fromarray(np.float32(faces[7])).resize((16, 16), Image.Resampling.BOX)
    )
    for image, expected in zip(stored, (shrunk, shrunk[:, ::-1]), strict=True):
        assert np.corrcoef(image.ravel(), expected.ravel())[0, 1] > 0.95
    assert names.count("astronaut") == names.count("astronaut_mirrored") == 1


def test_mse_begins_with_the_same_generator_and_z_and_nothing_else_differs(made):
    out, _ = made
    ours, theirs = (load_config(out / name / "config.yaml") for name in ("run", "run-mse"))
    assert [one["name"] for one in theirs.family.options["objectives"]] == ["mse"]
    options = {**ours.family.options, "objectives": None}
    assert {**theirs.family.options, "objectives": None} == options
    assert (ours.seed, ours.data, ours.guide) == (theirs.seed, theirs.data, theirs.guide)


def test_its_page_opens_with_generated_beside_real_then_those_under_mse(made):
    out, _ = made
    page = (out / "index.html").read_text(encoding="utf-8")
    files = ("run/32x32/final_32x32", "run/32x32/real_32x32", "run-mse/32x32/final_32x32")
    images = [base64.b64encode((out / f"{file}.png").read_bytes()).decode() for file in files]
    places = [page.index(image) for image in images]
    assert places == sorted(places)
    assert places[-1] < page.index("<h2>Generated and real images of the same resolution")
    assert "RANDOM GUIDE" not in page


def test_it_tells_the_time_of_each_step_and_what_comes_next(made):
    out, output = made
    assert "wall time" in output
    for step in ("guide", "faces", "prepare", "train", "mse"):
        assert f"{step} " in output[output.index("wall time") :]
    assert str(out / "index.html") in output
    assert "tensorboard --logdir" in output


def test_next_commands_can_be_pasted_with_and_without_an_activated_environment(
    tmp_path, monkeypatch
):
    scripts = tmp_path / ".venv" / "bin"
    scripts.mkdir(parents=True)
    command = scripts / "dinogen"
    command.write_text("#!/bin/sh\n")
    command.chmod(0o755)
    monkeypatch.setattr("sys.executable", str(scripts / "python"))
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.chdir(tmp_path)
    assert train._folder_of_commands() == ".venv/bin/"
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert train._folder_of_commands() == f"{scripts}/"
    monkeypatch.setenv("PATH", str(scripts))
    assert train._folder_of_commands() == ""


def test_a_second_run_keeps_what_is_there(made):
    out, _ = made
    names = ("data/manifest.json", "run/32x32/result.json", "run-mse/32x32/result.json")
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
    data = open_dataset(tmp_path / "mine" / "data")
    assert data.num_samples() == 3
    assert data.manifest.image_size == 32
    rejected = (tmp_path / "mine" / "data" / "rejected.csv").read_text()
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


def test_a_config_that_is_missing_is_named(tmp_path):
    with pytest.raises(UserError, match=r"demo.yaml: no such config file"):
        demo.run_demo(tmp_path, config_file=tmp_path / "demo.yaml")
