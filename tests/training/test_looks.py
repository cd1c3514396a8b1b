"""dinogen look: what the pictures show is what they say, and what is missing is said."""

from __future__ import annotations

import io
import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from dinogen.config_metrics import MetricsConfig
from dinogen.errors import UserError
from dinogen.metrics.judges.base import JudgeInfo
from dinogen.report.pictures import to_uint8
from dinogen.training import looks_latents, looks_nearest, looks_real
from dinogen.training.looks import write_looks
from dinogen.training.looks_history import History
from dinogen.training.looks_scene import LeftOut, Scene
from dinogen.training.run import train
from dinogen.training.snapshot import load_snapshot
from launch.cli import app
from tests.families.tiny import RESOLUTION, pack_discs, tiny_config

ALL = {
    "grid16",
    "grid64",
    "progression",
    "progression_animated",
    "interpolation_linear",
    "interpolation_spherical",
    "psi",
    "styles",
    "directions",
    "reconstructions",
    "worst",
    "neighbours",
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Folder of a run of four steps of a family, all of whose checkpoints were kept."""
    folder = tmp_path_factory.mktemp("looks")
    pack_discs(folder / "data")
    more = {
        "stylegan2_ada": ["augment.flip=0.5"],
        "ddpm": ["checkpoint.keep_last=1"],
    }
    done = {}

    def run_of(family):
        if family not in done:
            keep = ["checkpoint.every_kimg=0.008", "checkpoint.keep_last=9"]
            config = tiny_config(
                family, folder / "data", folder / family, *keep, *more.get(family, [])
            )
            train(config)
            done[family] = config.run
        return done[family]

    return run_of


@pytest.fixture(scope="module")
def scene_of(runs):
    """The newest checkpoint of a family's run under seed 5."""
    scenes = {}

    def make(family):
        if family not in scenes:
            scenes[family] = Scene(load_snapshot(runs(family)), 5)
        return scenes[family]

    return make


def images_of(look):
    """Pictures of a look, (N, R, R, 3) uint8."""
    (sheet,) = look.sheets
    return to_uint8(np.asarray(sheet.images)).astype(int)


def alike(found, expected):
    """The same but for what a batch of another size may round otherwise."""
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= 1


@pytest.fixture(scope="module")
def sampled(scene_of):
    """The first pictures, 16 at most, that `dinogen sample` makes of a scene."""
    found = {}

    def make(family, num):
        if family not in found:
            scene = scene_of(family)
            found[family] = to_uint8(scene.snapshot.sample(16, scene.seed).numpy()).astype(int)
        return found[family][:num]

    return make


def test_the_great_circle():
    a, b = torch.eye(6)[None, 0], torch.eye(6)[None, 3]
    half = looks_latents.spherical(a, b, 0.5)
    torch.testing.assert_close(half, (a + b) / 2**0.5)
    third = looks_latents.spherical(a, b, 1 / 3)
    torch.testing.assert_close(third, a * 0.75**0.5 + b * 0.5)
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 5, 3, 4, 4, generator=generator)
    torch.testing.assert_close(looks_latents.spherical(x, y, 0.0), x)
    torch.testing.assert_close(looks_latents.spherical(x, y, 1.0), y)
    y = y * (x.flatten(1).norm(dim=1) / y.flatten(1).norm(dim=1)).view(5, 1, 1, 1)
    for t in (0.2, 0.5, 0.9):
        moved = looks_latents.spherical(x, y, t)
        torch.testing.assert_close(moved.flatten(1).norm(dim=1), x.flatten(1).norm(dim=1))
        alone = looks_latents.spherical(x[2:3], y[2:3], t)
        torch.testing.assert_close(alone[0], moved[2])
    torch.testing.assert_close(looks_latents.spherical(x, x, 0.3), x)


def test_main_directions_are_the_eigenvectors_of_the_gram_matrix():
    matrix = torch.randn(40, 7, generator=torch.Generator().manual_seed(0))
    values, vectors = np.linalg.eigh((matrix.T @ matrix).numpy().astype(np.float64))
    found = looks_latents.main_directions(matrix, 3).numpy()
    for number in range(3):
        expected = vectors[:, -1 - number]
        assert abs(found[number] @ expected) == pytest.approx(1, abs=1e-5)
        assert found[number][np.abs(found[number]).argmax()] > 0
    assert values[-1] > values[-2] > values[-3]


@pytest.mark.parametrize("family", ["stylegan2_ada", "vae", "ddpm"])
def test_grids_and_the_ends_of_interpolations_are_samples(family, scene_of, sampled):
    scene = scene_of(family)
    samples = sampled(family, 16)
    alike(images_of(looks_latents.grid16(scene)), samples)
    grid = images_of(looks_latents.grid64(scene))
    assert len(grid) == 64
    alike(grid[:16], samples)
    for maker in (looks_latents.interpolation_linear, looks_latents.interpolation_spherical):
        look = maker(scene)
        strips = images_of(look).reshape(4, look.sheets[0].columns, RESOLUTION, RESOLUTION, 3)
        alike(strips[:, 0], samples[0:8:2])
        alike(strips[:, -1], samples[1:8:2])
        middle = strips[:, 4]
        for end in (samples[0:8:2], samples[1:8:2]):
            assert np.abs(middle - end).max() > 1
    latents = scene.latents(torch.arange(2))
    between = scene.decode(latents.mean(0, keepdim=True), torch.zeros(1, dtype=torch.int64))
    linear = images_of(looks_latents.interpolation_linear(scene))[4:5]
    alike(linear, to_uint8(between.numpy()).astype(int))


def test_psi_goes_from_the_mean_to_the_samples(scene_of, sampled):
    scene = scene_of("stylegan2_ada")
    look = looks_latents.psi(scene)
    table = images_of(look).reshape(4, -1, RESOLUTION, RESOLUTION, 3)
    assert look.sheets[0].labels[0] == "psi 0" and look.sheets[0].labels[-1] == "psi 1"
    alike(table[:, 0], np.broadcast_to(table[:1, 0], table[:, 0].shape))
    alike(table[:, -1], sampled("stylegan2_ada", 4))


def test_styles_stand_below_and_beside_what_they_come_from(scene_of, sampled):
    scene = scene_of("stylegan2_ada")
    look = looks_latents.styles(scene)
    table = images_of(look).reshape(5, 7, RESOLUTION, RESOLUTION, 3)
    samples = sampled("stylegan2_ada", 10)
    assert (table[0, 0] == 255).all()
    alike(table[1:, 0], samples[:4])
    alike(table[0, 1:], samples[4:])
    z = scene.latents(torch.tensor([2, 8]))
    with torch.no_grad():
        one = scene.family.mix(scene.networks, z[:1], z[1:], torch.tensor([2]), scene.seed)
    alike(table[3, 5], to_uint8(one.numpy())[0].astype(int))


def test_directions_pass_through_the_samples(scene_of, sampled):
    look = looks_latents.directions(scene_of("vae"))
    table = images_of(look).reshape(4, 2, 9, RESOLUTION, RESOLUTION, 3)
    samples = sampled("vae", 2)
    for row in table:
        alike(row[:, 4], samples)
    assert look.sheets[0].labels == ["-4", "-3", "-2", "-1", "0", "+1", "+2", "+3", "+4"]
    assert list(look.sheets[0].left)[:3] == ["1 a", "1 b", "2 a"]


def test_what_a_family_does_not_have_is_left_out(scene_of):
    for maker in (looks_latents.psi, looks_latents.styles):
        with pytest.raises(LeftOut):
            maker(scene_of("vae"))
    with pytest.raises(LeftOut, match="no vector"):
        looks_latents.directions(scene_of("ddpm"))
    with pytest.raises(LeftOut, match="encodes no"):
        looks_real.reconstructions(scene_of("ddpm"))


def test_reconstructions_stand_below_held_out_pictures(scene_of):
    scene = scene_of("vae")
    both = images_of(looks_real.reconstructions(scene)).reshape(2, -1, RESOLUTION, RESOLUTION, 3)
    numbers = np.linspace(0, scene.data.num_samples("val") - 1, both.shape[1]).astype(int)
    for column, number in enumerate(numbers):
        file = io.BytesIO(scene.data.sample(int(number), "val").image)
        alike(both[0, column], np.asarray(Image.open(file).convert("RGB")).astype(int))
    G = scene.networks["G"]
    with torch.no_grad():
        real = torch.from_numpy(both[0]).permute(0, 3, 1, 2).float() / 127.5 - 1
        alike(both[1], to_uint8(G.decode(G.encode(real)[0]).numpy()).astype(int))


def test_the_worst_are_those_that_the_discriminator_finds_least_real(scene_of):
    scene = scene_of("stylegan2_ada")
    D = type(scene.family.D)(**scene.family.arguments("D"))
    D.load_state_dict(scene.snapshot.checkpoint.tensors("D"))
    with torch.no_grad():
        logits = torch.cat([D.eval()(image[None]) for image in scene.drawn])
    order = logits.argsort()[:16]
    look = looks_real.worst(scene)
    assert np.array_equal(images_of(look), to_uint8(scene.drawn[order].numpy()))
    assert look.sheets[0].labels[0] == f"D {logits.min():+.2f}"


def brute_force(scene, images, flip):
    """Distances (N, M) of pictures to all of train, by numpy, one by one."""
    real = scene.data.read(range(scene.data.num_samples()), image_size=RESOLUTION)["image"].numpy()
    table = np.zeros((len(images), len(real)))
    for i, image in enumerate(images.numpy()):
        for j, other in enumerate(real):
            candidates = [other, other[:, :, ::-1]] if flip else [other]
            table[i, j] = min(
                np.sqrt(((np.clip(image, -1, 1) - c) ** 2).mean()) for c in candidates
            )
    return table * 127.5


@pytest.mark.parametrize("family", ["stylegan2_ada", "vae"])
def test_neighbours_are_those_of_brute_force(family, scene_of):
    scene = scene_of(family)
    table = brute_force(scene, scene.drawn, flip=family == "stylegan2_ada")
    found, usual = scene.nearest
    assert found.num == table.shape[1] == scene.data.num_samples()
    np.testing.assert_allclose(found.distances, np.sort(table, 1)[:, :3], rtol=1e-4, atol=1e-3)
    chosen = np.take_along_axis(table, found.numbers.numpy(), 1)
    np.testing.assert_allclose(found.distances, chosen, rtol=1e-4, atol=1e-3)
    num_val = scene.data.num_samples("val")
    held_out = scene.data.read(range(num_val), split="val", image_size=RESOLUTION)["image"]
    table = brute_force(scene, held_out, flip=family == "stylegan2_ada")
    # torch's median is the lower one of an even number
    assert usual == pytest.approx(np.sort(table.min(1))[(num_val - 1) // 2], rel=1e-4)


def test_a_copy_is_found_out_mirrored_or_not(scene_of, runs):
    scene = Scene(scene_of("stylegan2_ada").snapshot, 5)
    real = scene.data.read([3, 11], image_size=RESOLUTION)["image"]
    drawn = scene_of("stylegan2_ada").drawn.clone()
    drawn[40], drawn[77] = real[0], real[1].flip(2)
    scene.drawn = drawn
    found, _ = scene.nearest
    assert found.numbers[[40, 77], 0].tolist() == [3, 11]
    assert found.mirrored[77, 0] and not found.mirrored[40, 0]
    assert found.distances[[40, 77], 0].max() < 0.01
    look = looks_real.neighbours(scene)
    table = images_of(look).reshape(4, -1, RESOLUTION, RESOLUTION, 3)
    alike(table[0, :2], table[1, :2])
    assert look.sheets[0].labels[table.shape[1] :][:2] == ["rms 0.00", "rms 0.00"]
    assert "of held-out pictures" in look.caption


class Colours:
    """A judge that sees a picture's mean colour alone."""

    info = JudgeInfo("inception768", "0" * 64, "none", 3, 0, random=True)

    def __call__(self, images):
        assert images.dtype == torch.uint8 and images.shape[2] == RESOLUTION
        return {"features": images.float().mean((2, 3))}


def test_a_judge_whose_weights_are_named_says_what_is_near(scene_of, monkeypatch):
    scene = Scene(scene_of("vae").snapshot, 5)
    monkeypatch.setattr(looks_nearest, "load_judge", lambda name, config, device: Colours())
    config = MetricsConfig(inception768="there.safetensors")
    scene.ruler = looks_nearest.choose_ruler(config, RESOLUTION, torch.device("cpu"))
    found, _ = scene.nearest
    real = scene.data.read(range(scene.data.num_samples()), image_size=RESOLUTION)["image"]
    colours = [to_uint8(x.numpy()).mean((1, 2)) for x in (scene.drawn, real)]
    table = np.linalg.norm(colours[0][:, None] - colours[1][None], axis=2)
    assert np.array_equal(found.numbers[:, 0], table.argmin(1))
    np.testing.assert_allclose(found.distances[:, 0], table.min(1), rtol=1e-3, atol=1e-3)
    assert "RANDOM" in looks_real.neighbours(scene).caption


def test_a_judge_that_cannot_be_had_is_said_and_pixels_are_compared(tmp_path, caplog):
    config = MetricsConfig(inception768=str(tmp_path / "gone.safetensors"))
    ruler = looks_nearest.choose_ruler(config, 64, torch.device("cpu"))
    assert (ruler.label, ruler.side) == ("rms", 32)
    assert "gone.safetensors" in caplog.text
    image = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    small = image.unflatten(3, (32, 2)).unflatten(2, (32, 2)).mean((3, 5))
    distance = (ruler.rows(image) - ruler.rows(torch.zeros_like(image))).norm()
    assert distance.item() == pytest.approx(127.5 * small.square().mean().sqrt().item(), rel=1e-4)


def test_without_a_discriminator_the_worst_lie_farthest_from_training(scene_of):
    scene = scene_of("vae")
    nearest = brute_force(scene, scene.drawn, flip=False).min(1)
    look = looks_real.worst(scene)
    order = np.argsort(-nearest)[:16]
    shown = images_of(look)
    alike(shown[0], to_uint8(scene.drawn.numpy())[order[0]].astype(int))
    assert look.sheets[0].labels[0] == f"rms {nearest.max():.2f}"
    assert "farthest" in look.caption


def test_progression_shows_the_same_latents_at_each_checkpoint(scene_of, runs, sampled):
    scene = scene_of("stylegan2_ada")
    history = History(scene)
    look = history.progression(scene)
    assert list(history.pictures) == [8, 16, 24, 32]
    num_train = scene.data.num_samples()
    expected = [f"{nimg / num_train:.1f} epochs" for nimg in (8, 16, 24, 32)]
    assert list(look.sheets[0].labels) == expected
    table = images_of(look).reshape(6, 4, RESOLUTION, RESOLUTION, 3)
    alike(table[:, 3], sampled("stylegan2_ada", 6))
    then = load_snapshot(runs("stylegan2_ada"), nimg=16).sample(6, 5)
    alike(table[:, 1], to_uint8(then.numpy()).astype(int))
    assert len(history.animation(scene).sheets) == 4

    early = Scene(load_snapshot(runs("stylegan2_ada"), nimg=24), 5)
    assert list(History(early).pictures) == [8, 16, 24], "nothing of what came later"
    with pytest.raises(LeftOut, match="keep_every_kimg"):
        History(scene_of("ddpm")).progression(scene_of("ddpm"))


def test_everything_is_written_and_said(runs, tmp_path):
    run = runs("stylegan2_ada")
    result = CliRunner().invoke(app, ["look", str(run), "--seed", "5"])
    assert result.exit_code == 0, result.output
    folder = run / "16x16" / "looks"
    entries = json.loads((folder / "looks.json").read_text())
    assert set(entries) == ALL
    for name, entry in entries.items():
        assert (entry["nimg"], entry["seed"]) == (32, 5)
        assert entry["command"] == f"dinogen look {run} --stage 16 --nimg 32 --seed 5"
        if name == "reconstructions":
            assert entry["file"] is None and "encodes" in entry["reason"]
            continue
        with Image.open(folder / entry["file"]) as picture:
            assert picture.format == ("GIF" if name == "progression_animated" else "PNG")
        assert entry["caption"].endswith(".")
    assert entries["progression_animated"]["file"] == "progression.gif"
    written = {path.name for path in folder.iterdir()}
    assert written == {e["file"] for e in entries.values() if e["file"]} | {"looks.json"}
    assert "reconstructions: left out: this family encodes no pictures" in result.output

    before = (folder / "grid16.png").read_bytes()
    other = write_looks(run, nimg=16, seed=6, out=tmp_path / "some where")
    assert other == tmp_path / "some where" / "looks.json"
    assert json.loads(other.read_text())["psi"]["command"] == (
        f"dinogen look {run} --stage 16 --nimg 16 --seed 6 --out '{tmp_path / 'some where'}'"
    )
    assert (other.parent / "grid16.png").read_bytes() != before
    assert (folder / "grid16.png").read_bytes() == before


def test_without_its_data_a_run_still_shows_what_it_makes(runs, tmp_path):
    run = shutil.copytree(runs("vae"), tmp_path / "run")
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(text.replace(f"{runs('vae').parent}/data", "gone"))
    entries = json.loads(write_looks(run).read_text())
    for name in ("reconstructions", "worst", "neighbours"):
        assert entries[name]["file"] is None
        assert "gone" in entries[name]["reason"]
    assert {n for n, e in entries.items() if e["file"]} == ALL - {
        "reconstructions",
        "worst",
        "neighbours",
        "psi",
        "styles",
    }
    assert (
        "k images"
        in History(Scene(load_snapshot(run), 0))
        .progression(Scene(load_snapshot(run), 0))
        .sheets[0]
        .labels[0]
    )


def test_a_random_guide_marks_every_file(make_config):
    config = make_config("stages.1.kimg=0.08", "stages.0.kimg=0.04")
    train(config)
    entries = json.loads(write_looks(config.run).read_text())
    files = {entry["file"] for entry in entries.values() if entry["file"]}
    assert len(files) >= 6
    assert all(".random-guide." in file for file in files)
    assert (config.run / "8x8" / "looks" / "grid64.random-guide.png").is_file()
    small = write_looks(config.run, resolution=4)
    assert small.parent.parent.name == "4x4"


def test_no_run_is_one_clear_line(tmp_path):
    with pytest.raises(UserError, match="no run here"):
        write_looks(tmp_path)


def test_other_data_than_it_was_trained_on_are_not_taken_for_its_own(runs, tmp_path):
    run = shutil.copytree(runs("vae"), tmp_path / "run")
    other = shutil.copytree(runs("vae").parent / "data", tmp_path / "other")
    manifest = json.loads((other / "manifest.json").read_text())
    manifest["shards"][0]["sha256"] = "0" * 64
    (other / "manifest.json").write_text(json.dumps(manifest))
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(text.replace(f"{runs('vae').parent}/data", str(other)))
    scene = Scene(load_snapshot(run), 0)
    with pytest.raises(LeftOut, match="holds other shards than the checkpoint"):
        looks_real.neighbours(scene)
