"""Photos projected into runs: what is written, read again, skipped and refused."""

from __future__ import annotations

import dataclasses
import json
import logging
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import pytest
import skimage
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from typer.testing import CliRunner

from dinogen.config import FacesConfig, parse_config
from dinogen.errors import UserError
from dinogen.families.base import Family
from dinogen.metrics.extractors.lpips import load_perceptual
from dinogen.prepare.pipeline import NoFaceError
from dinogen.prepare.pipeline import prepare as prepare_data
from dinogen.projection import project as module
from dinogen.projection import show
from dinogen.projection.latents import (
    FILE,
    decode_projected,
    read_projected,
    snapshot_of,
    write_projected,
)
from dinogen.projection.loss import choose_loss
from dinogen.projection.photos import cutting_of, read_targets
from dinogen.projection.project import RESULTS, ProjectionRequest, project
from dinogen.training.checkpointing.export import export
from launch.cli.main import app
from shards.read.dataset import open_dataset
from tests.hub_server import hub_server, use_hub
from tests.metrics.backbones import save_backbone

CPU = torch.device("cpu")


def tiny(run, photos, out, **more):
    given = {"steps": 3, "restarts": 2, "loss": "pixels", "align": False} | more
    return ProjectionRequest(run, (photos,), out=out, **given)


def test_what_a_projection_writes(projected, runs, photos):
    folder = projected("stylegan2_ada")
    names = sorted(path.name for path in folder.iterdir() if path.is_dir())
    assert len(names) == 3 and all(name.startswith("disc") for name in names)
    for name in names:
        found = json.loads((folder / name / RESULTS).read_text())
        files = found["files"]
        assert {path.name for path in (folder / name).iterdir()} == {RESULTS, *files.values()}
        assert found["settings"]["space"] == "w+"
        assert found["settings"]["checkpoint"]["nimg"] == 32
        assert len(found["errors"]) == 4
        assert found["before"]["mean_image"]["rms"] > 0
        assert "dinogen project" in found["command"] and "--no-align" in found["command"]
        with safe_open(folder / name / FILE, "pt") as file:
            info = json.loads(file.metadata()["dinogen_projection"])
            shapes = {key: file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118
        assert shapes == {"w+": [1, 6, 8], "noise": [1, 16 + 2 * 64 + 2 * 256]}
        assert info["name"] == name and info["errors"] == found["errors"]
        assert info["sha256"] == found["sha256"]
        frames = list(imageio_ffmpeg.read_frames(folder / name / files["video"]))
        assert frames[0]["size"] == (384, 192)
        assert len(frames) - 1 == 4 + show.HOLD
    page = (folder / "projections.html").read_text()
    assert all(f"{name}/projection.png" in page for name in names)


def test_latents_give_the_image_whose_error_was_written(projected, runs, photos):
    for family, space in (("stylegan2_ada", "w"), ("dcgan", None), ("vae", None), ("ddpm", None)):
        (one, *_) = read_projected([projected(family, space)])
        snapshot, _ = snapshot_of(runs(family), [one])
        image = decode_projected(snapshot, one, one.latents)
        cutting = cutting_of(snapshot.family.config, align=False)
        targets, _, _ = read_targets([photos], cutting, 16, CPU)
        (wanted,) = [target.image for target in targets if target.name == one.title]
        mse = float((image - wanted).clamp(-2, 2).square().mean())
        assert mse == pytest.approx(one.info["after"]["mse"], rel=0.02, abs=1e-5), family


def test_families_that_invert_do_not_search(projected):
    found = json.loads(next(projected("vae").glob(f"*/{RESULTS}")).read_text())
    assert found["settings"]["how"] == "the mean of the encoder's posterior"
    assert found["files"]["video"] is None and found["errors"] == []
    found = json.loads(next(projected("ddpm").glob(f"*/{RESULTS}")).read_text())
    assert found["settings"]["how"] == "DDIM run backwards in 4 steps"
    assert found["settings"]["sampling"] == {"sampler": "ddim", "steps": 4}


def test_the_same_call_skips_what_is_finished(runs, photos, tmp_path):
    request = tiny(runs("dcgan"), photos, tmp_path / "a")
    assert len(project(request).done) == 3
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "a").rglob(f"*/{RESULTS}")}
    # as an interruption leaves it: results come last
    lost = sorted(before)[1]
    lost.unlink()
    again = project(request)
    assert [one["name"] for one in again.done] == [lost.parent.name]
    assert len(again.skipped) == 2
    assert all(path.stat().st_mtime_ns == t for path, t in before.items() if path != lost)
    other = project(dataclasses.replace(request, steps=2))
    assert not other.done and len(other.rejected) == 3
    assert "other settings (steps)" in other.rejected[0].reason
    assert len(project(dataclasses.replace(request, steps=2, overwrite=True)).done) == 3


def test_the_same_seed_gives_the_same_bytes(runs, photos, tmp_path, monkeypatch):
    for name in "ab":
        project(tiny(runs("dcgan"), photos, tmp_path / name))
    for path in (tmp_path / "a").rglob(FILE):
        assert path.read_bytes() == (tmp_path / "b" / path.relative_to(tmp_path / "a")).read_bytes()
    # one by one: the same up to rounding
    monkeypatch.setattr(module, "PIXELS_AT_ONCE", 1)
    project(tiny(runs("dcgan"), photos, tmp_path / "c"))
    a, c = read_projected([tmp_path / "a"]), read_projected([tmp_path / "c"])
    for one, other in zip(a, c, strict=True):
        assert torch.allclose(one.latents, other.latents, atol=1e-4)


def test_bad_photos_are_named_and_the_others_go_on(runs, photos, tmp_path):
    bad = tmp_path / "bad"
    bad.mkdir()
    (bad / "text.jpg").write_text("no image")
    good = next(photos.iterdir())
    run = runs("dcgan")
    words = ["project", run, good, bad / "text.jpg", bad / "gone.png", good]
    words += ["--no-align", "--steps", 2, "--restarts", 1, "--loss", "pixels"]
    done = CliRunner().invoke(app, [*map(str, words), "--out", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    assert "text.jpg: left out: not_an_image" in done.output
    assert "gone.png: left out: unreadable" in done.output
    assert "1 photo projected, 2 left out" in done.output
    with pytest.raises(NoFaceError, match="1 not_an_image"):
        project(tiny(run, bad / "text.jpg", tmp_path / "none"))


def test_what_a_family_does_not_have_is_refused(runs, photos, tmp_path):
    def refused(family, message, **more):
        with pytest.raises(UserError, match=message):
            project(tiny(runs(family), photos, tmp_path, **more))

    refused("dcgan", "--space w: family dcgan has z", space="w")
    refused("stylegan2_ada", r"--space x: family stylegan2_ada has z, w, w\+", space="x")
    refused("dcgan", "--class 0: family dcgan: it has no classes", label=0)
    refused("dcgan", "--steps 0: family dcgan has no encoder", steps=0)
    refused("dcgan", "--loss nice: choose one of", loss="nice")
    refused("dcgan", "LPIPS", loss="lpips", places=("metrics.lpips_backbone=gone.pth",))
    refused("dcgan", "trained without one", loss="guide")
    with pytest.raises(UserError, match=r"data\.path=/x: is no photo: .* --set data\.path=/x"):
        project(tiny(runs("dcgan"), Path("data.path=/x"), tmp_path))
    assert not list(tmp_path.rglob(FILE))


def test_the_loss_says_why_no_better_one_was_used(runs, photos, tmp_path):
    lines = []
    given = {"loss": "auto", "places": ("metrics.lpips_backbone=gone.pth",)}
    found = project(tiny(runs("dcgan"), photos, tmp_path, **given), tell=lines.append)
    assert "loss: features of O-Net, the face detector's last network, and pixels" in lines
    assert any("a better loss is not available" in line and "gone.pth" in line for line in lines)
    said = found.done[0]["loss"]
    assert len(said["better_not_available"]) == 2
    assert "a better loss is not available" in found.page.read_text()


def test_lpips_is_the_metrics_own_and_has_a_gradient(tmp_path):
    file = save_backbone("squeeze", tmp_path / "squeeze.pth")
    metrics = {"lpips": "squeeze", "lpips_backbone": str(file)}
    config = parse_config({"stages": [{"resolution": 32, "kimg": 1}], "metrics": metrics})
    loss = choose_loss("auto", config, {}, 32, CPU)
    assert (loss.name, loss.what, loss.missing) == ("lpips", "LPIPS (squeeze) and pixels", ())
    pixels = torch.randint(0, 256, (2, 3, 32, 32), generator=torch.Generator().manual_seed(0))
    images = (pixels.float() / 127.5 - 1).requires_grad_()
    _, found = loss.terms(loss.seen(images[:1]), loss.seen(images[1:]))
    expected = load_perceptual("squeeze", str(file), CPU)
    bytes_ = pixels.to(torch.uint8)
    assert torch.allclose(found, expected.distance(bytes_[:1], bytes_[1:]), rtol=1e-3)
    (gradient,) = torch.autograd.grad(found.sum(), images)
    assert gradient.abs().sum() > 0


def test_a_guide_compares_features_of_unit_length(tmp_path):
    config = parse_config({"stages": [{"resolution": 64, "kimg": 1}], "guide": {"name": "onet"}})
    facts = {"guide": {"name": "onet"}}
    with pytest.raises(UserError, match="other weights"):
        choose_loss("guide", config, facts, 64, CPU)
    loss = choose_loss("onet", config, {}, 64, CPU)
    images = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    seen = loss.seen(images)
    assert seen[1] is not None
    assert torch.allclose(seen[1].square().sum(1), torch.ones(3), atol=1e-5)
    pixels, features = loss.terms(seen, (images.flip(0), seen[1].flip(0)))
    assert features[1] == 0 and features[0] > 0.01 and pixels[1] == 0
    blurred = images.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(
        loss.between(loss.seen(blurred), loss.seen(images.roll(1, 0))).sum(), blurred
    )
    assert gradient.abs().sum((1, 2, 3)).min() > 0


def test_without_imageio_the_way_is_a_gif_and_that_is_said(
    runs, photos, tmp_path, monkeypatch, caplog
):
    monkeypatch.setattr(module, "can_write_mp4", lambda: False)
    monkeypatch.setattr(show, "can_write_mp4", lambda: False)
    with caplog.at_level(logging.WARNING):
        found = project(tiny(runs("dcgan"), next(photos.iterdir()), tmp_path))
    assert "pip install 'dinogen[video]'" in caplog.text
    path = found.folder / found.done[0]["name"] / found.done[0]["files"]["video"]
    assert path.suffix == ".gif"
    assert Image.open(path).n_frames == 3 + show.HOLD


def test_a_photo_is_cut_out_as_the_data_were(runs, tmp_path):
    """The projected image is the one that was trained on, to the last bit."""
    photos = tmp_path / "photos"
    photos.mkdir()
    astronaut = Image.open(f"{skimage.data_dir}/astronaut.png").convert("RGB")
    astronaut.crop((60, 0, 380, 320)).save(photos / "one.png")
    twice = Image.new("RGB", (640, 320))
    twice.paste(astronaut.crop((60, 0, 380, 320)), (0, 0))
    twice.paste(astronaut.crop((60, 0, 380, 320)).resize((240, 240)), (340, 40))
    faces = {"size": 64, "align": "ffhq"}
    config = parse_config(
        {
            "stages": [{"resolution": 16, "kimg": 1}],
            "data": {"path": str(tmp_path / "data")},
            "prepare": {"faces": faces},
        }
    )
    prepare_data(photos, tmp_path / "data", config.prepare, None)
    data = open_dataset(tmp_path / "data")
    trained = data.read([0], image_size=16)["image"][0]
    # the manifest counts, and not what the config says by now
    changed = config.prepare.model_copy(update={"faces": FacesConfig()})
    cutting = cutting_of(config.model_copy(update={"prepare": changed}), align=True)
    assert cutting.source == "the manifest of the run's data"
    twice.save(photos / "two.png")
    targets, rejected, notes = read_targets([photos], cutting, 16, CPU)
    assert [target.photo.name for target in targets] == ["one.png", "two.png"]
    assert torch.equal(targets[0].image, trained)
    assert not rejected
    assert len(notes) == 1 and "2 faces: the largest is projected" in notes[0]
    every = dataclasses.replace(cutting, config=cutting.config.model_copy(update={"which": "all"}))
    targets, _, notes = read_targets([photos / "two.png"], every, 16, CPU)
    assert len(targets) == 2 and "each is projected" in notes[0]
    with pytest.raises(UserError, match="smaller --stage"):
        read_targets([photos], cutting, 128, CPU)


def test_data_that_are_gone_are_said(runs, caplog):
    config = parse_config({"stages": [{"resolution": 16, "kimg": 1}], "data": {"path": "gone"}})
    with caplog.at_level(logging.WARNING):
        cutting = cutting_of(config, align=True)
    assert cutting.source == "prepare.faces of the run's config"
    assert "cannot be read" in caplog.text


def test_an_exported_file_takes_the_same_latents(projected, runs, tmp_path):
    (one, *_) = read_projected([projected("dcgan")])
    export(runs("dcgan"), tmp_path / "g.safetensors")
    images = [
        decode_projected(snapshot_of(place, [one])[0], one, one.latents)
        for place in (runs("dcgan"), tmp_path / "g.safetensors")
    ]
    assert torch.equal(*images)


@pytest.mark.parametrize("kind", ["run", "file"])
def test_a_run_on_the_hub_takes_photos_too(kind, runs, photos, tmp_path, monkeypatch):
    """Results go into the current folder, and those of a file say where it is from."""
    run = runs("stylegan2_ada")
    (tmp_path / "cwd").mkdir()
    files = {str(one.relative_to(run)): one.read_bytes() for one in run.rglob("*") if one.is_file()}
    if kind == "file":
        export(run, tmp_path / "g.safetensors")
        files = {"model.safetensors": (tmp_path / "g.safetensors").read_bytes()}
    monkeypatch.chdir(tmp_path / "cwd")
    with hub_server() as server:
        use_hub(monkeypatch, server, tmp_path / "home")
        name = f"someone--run-{server.add('someone/run', files)[:7]}"

        def invoke(*words):
            done = CliRunner().invoke(app, [*map(str, words)])
            assert done.exit_code == 0, f"{done.output} {done.exception!r}"

        quick = ["--no-align", "--steps", 1, "--loss", "pixels"]
        invoke("project", "hf://someone/run", photos, *quick, "--out", "p")
        said = json.loads(next(Path("p").glob(f"*/{RESULTS}")).read_text())
        assert said["run"] == name
        address = name if kind == "run" else "hf://someone/run@"
        assert f"dinogen project {address}" in said["command"]
        invoke("sample", "hf://someone/run", "--latents", "p")
        invoke("look", "hf://someone/run", "--latents", "p")
        invoke("video", "hf://someone/run", "--seconds", 0.1, "--size", 16)
        invoke("video", "hf://someone/run", "--latents", "p", "--seconds", 0.1)
    samples, videos = Path(name).rglob("grid_*.png"), Path(name).rglob("*.mp4")
    about = json.loads(Image.open(next(samples)).text["dinogen"])
    assert about["run"] == name and f"dinogen sample {address}" in about["command"]
    assert len(list(videos)) == 2


def test_latents_of_another_run_or_of_nothing_are_refused(projected, runs, tmp_path):
    found = read_projected([projected("dcgan")])
    with pytest.raises(UserError, match="projected into another run"):
        snapshot_of(runs("wgan_gp"), found)
    with pytest.raises(UserError, match="leave --stage out"):
        snapshot_of(runs("dcgan"), found, 32)
    with pytest.raises(UserError, match=r"holds no projected\.safetensors"):
        read_projected([tmp_path])
    with pytest.raises(UserError, match="is not there"):
        read_projected([tmp_path / FILE])
    (tmp_path / FILE).write_bytes(b"nothing")
    with pytest.raises(UserError, match="is no projection"):
        read_projected([tmp_path / FILE])
    other = found[0].settings["checkpoint"] | {"nimg": 1}
    info = found[0].info | {"settings": found[0].settings | {"checkpoint": other}}
    write_projected(tmp_path / FILE, found[0].latents, None, info)
    with pytest.raises(UserError, match="not the same checkpoint"):
        read_projected([found[0].path, tmp_path / FILE])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "/elsewhere/a"}, "is no projection .name"),
        ({"name": "../a"}, "is no projection .name"),
        ({"name": ".."}, "is no projection .name"),
        ({"sha256": None}, "is no projection .sha256"),
        ({"settings": []}, "is no projection .settings"),
        ({"checkpoint": ...}, r"is no projection .settings\.checkpoint"),
        ({"checkpoint": [1]}, r"is no projection .settings\.checkpoint"),
        ({"checkpoint": {"nimg": 32}}, r"is no projection .settings\.checkpoint\.family"),
        ({"label": "x"}, r"is no projection .settings\.label"),
        ({"label": 0}, "is damaged .it is of class 0, and there are 0"),
        ({"sampling": {"num_classes": 3}}, r"is no projection .settings\.sampling"),
        ({"space": "w"}, "is no projection .'w'"),
        ({"latents": torch.zeros(1, 9)}, r"is damaged .z is \(1, 9\)"),
        ({"noise": torch.zeros(1, 9)}, r"is damaged .noise is \(1, 9\)"),
    ],
)
def test_what_a_file_of_others_says_is_checked(changes, message, projected, runs, tmp_path):
    (one, *_) = read_projected([projected("dcgan")])
    settings = {key: changes.get(key, value) for key, value in one.settings.items()}
    settings = {key: value for key, value in settings.items() if value is not ...}
    info = {key: changes.get(key, value) for key, value in one.info.items()}
    info |= {} if "settings" in changes else {"settings": settings}
    tensors = {"z": changes.get("latents", one.latents)}
    tensors |= {"noise": changes["noise"]} if "noise" in changes else {}
    save_file(tensors, tmp_path / FILE, {"dinogen_projection": json.dumps(info)})
    with pytest.raises(UserError, match=message):
        snapshot_of(runs("dcgan"), read_projected([tmp_path / FILE]))


def test_a_new_family_takes_part_without_being_named(tmp_path):
    """By `decode` alone, as any family has it."""
    from dinogen.families.abilities import spaces_of

    class Plain(Family):
        networks = phases = inputs = None  # type: ignore[assignment]

        def __init__(self):
            self.device = CPU

        def latents(self, indices, seed):
            return torch.zeros(len(indices), 2, 3)

    (space,) = spaces_of(Plain()).values()
    assert (space.name, space.shape, space.normal) == ("z", (2, 3), True)


def test_the_difference_is_grey_where_there_is_none(projected):
    folder = next(path for path in projected("dcgan").iterdir() if path.is_dir())
    sheet = np.asarray(Image.open(folder / "projection.png").convert("RGB"))
    assert sheet.shape[1] == 4 * 192 + 3 * 2
    assert abs(int(np.median(sheet[16:, -192:])) - 128) < 110
